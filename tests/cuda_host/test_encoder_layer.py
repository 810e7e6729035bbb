"""A whole encoder layer as one op of csrc/cuda: against float64, and by the modules that run it."""

import math

import pytest
import torch
import torch.nn.functional as F

import pytorch_ext
from pytorch_ext import backends
from pytorch_ext import nn as px
from pytorch_ext.models import BertConfig, BertModel
from pytorch_ext.testing import assert_contract, cumulative, normal, padding_mask

STEMS = ("bias_gelu", "encoder_layer", "varlen_attention")
LENGTHS = [7, 0, 1, 15]
HIDDEN, INNER, HEADS = 64, 96, 2
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
VECTORS = {"query": HIDDEN, "key": HIDDEN, "value": HIDDEN, "out": HIDDEN, "up": INNER, "down": HIDDEN}


def make(generator):
    def weight(rows, cols):
        return normal(generator, rows, cols, scale=cols**-0.5)

    found = {"input": normal(generator, sum(LENGTHS), HIDDEN)}
    for name, size in VECTORS.items():
        found[f"{name}_weight"] = weight(size, INNER if name == "down" else HIDDEN)
        found[f"{name}_bias"] = normal(generator, size)
    for name in ("norm1_weight", "norm1_bias", "norm2_weight"):
        found[name] = normal(generator, HIDDEN) + 1.0
    return found


def eager(activation, causal):
    """The layer out of PyTorch's own ops."""

    def layer(input, norm1_weight, norm1_bias, norm2_weight, **p):
        def linear(x, name):
            return F.linear(x, p[f"{name}_weight"], p[f"{name}_bias"])

        three = (linear(input, name).unflatten(-1, (HEADS, -1)) for name in ("query", "key", "value"))
        sequences = zip(*(t.split(LENGTHS) for t in three), strict=True)
        contexts = [
            F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in qkv), is_causal=causal).transpose(
                0, 1
            )
            for qkv in sequences
        ]
        y = linear(torch.cat(contexts).flatten(1), "out")
        x = F.layer_norm(input + y, (HIDDEN,), norm1_weight, norm1_bias, 1e-12)
        y = linear(ACTIVATIONS[activation](linear(x, "up")), "down")
        return F.layer_norm(x + y, (HIDDEN,), norm2_weight, None, 1e-5)

    return layer


def raw(op, activation, causal, joined):
    def layer(input, norm1_weight, norm1_bias, norm2_weight, **p):
        weights, biases = (
            [p[f"{n}_{kind}"] for n in ("query", "key", "value")] for kind in ("weight", "bias")
        )
        if joined:
            weights, biases = [torch.cat(weights)], [torch.cat(biases)]
        first = (p["out_weight"], p["out_bias"], norm1_weight, norm1_bias)
        second = (p["up_weight"], p["up_bias"], p["down_weight"], p["down_bias"], norm2_weight, None)
        where = (cumulative(LENGTHS), max(LENGTHS), HEADS)
        scale = math.sqrt(HEADS / HIDDEN)
        return op(input, weights, biases, *first, *second, *where, activation, causal, scale, 1e-12, 1e-5)

    return layer


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def on_device(request):
    """The raw op where there are kernels for it, of tensors that lie on the CPU, as its result then does."""
    if request.param == "cpu":
        return request.getfixturevalue("cuda_host")(*STEMS).encoder_layer_fwd
    if reasons := backends.why_not("cuda", "encoder_layer"):
        pytest.skip("; ".join(reasons))

    def there(value):
        if isinstance(value, list):
            return [there(v) for v in value]
        return value.cuda() if isinstance(value, torch.Tensor) else value

    return lambda *arguments: backends.kernel("cuda", "encoder_layer_fwd")(*map(there, arguments)).cpu()


@pytest.mark.parametrize(
    ("activation", "causal", "joined"),
    [("gelu", False, False), ("gelu_tanh", False, True), ("relu", True, True)],
)
def test_the_contract(on_device, activation, causal, joined):
    ours = raw(on_device, activation, causal, joined)
    assert_contract(ours, eager(activation, causal), make, torch.bfloat16, gradients=False)


def test_no_tokens(on_device):
    p = {name: t.bfloat16() for name, t in make(torch.Generator().manual_seed(0)).items()}
    p["input"] = p["input"][:0]
    assert raw(on_device, "gelu", False, True)(**p).shape == (0, HIDDEN)


@pytest.fixture(params=["bert", "torch"])
def case(request):
    """An encoder, and what runs it on a padded batch."""
    torch.manual_seed(0)
    real = padding_mask([9, 4, 6], 9)
    x = torch.randn(3, 9, HIDDEN).bfloat16()
    if request.param == "bert":
        sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "intermediate_size": INNER}
        config = BertConfig(vocab_size=9, num_hidden_layers=2, **sizes)
        encoder = pytorch_ext.optimize(BertModel(config).encoder)
        layers, run = encoder.layer, lambda: encoder(x, real).last_hidden_state[real]
    else:
        layer = px.TransformerEncoderLayer(HIDDEN, HEADS, INNER, batch_first=True)
        encoder = px.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        layers, run = encoder.layers, lambda: encoder(x, None, ~real)[real]
    encoder.bfloat16().eval()
    return encoder, layers, run


def test_modules_run_it(cuda_host, case):
    """These files have nothing that a layer could run op by op."""
    cuda_host(*STEMS)
    run = case[2]
    with torch.no_grad():
        expected = run()
        with backends.use("cuda"):
            got = run()
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    assert not torch.equal(got, expected)


@pytest.mark.parametrize("change", ["gradients", "training", "hook", "dtype", "class"])
def test_where_it_would_bypass_something(cuda_host, case, change):
    cuda_host(*STEMS)
    encoder, layers, run = case
    encoder.requires_grad_(change == "gradients")
    if change == "training":
        encoder.train()
    norm = next(m for m in layers[1].modules() if isinstance(m, torch.nn.LayerNorm))
    if change == "hook":
        norm.register_forward_hook(lambda *_: None)
    if change == "dtype":
        norm.float()
    if change == "class":
        norm.__class__ = type("Another", (torch.nn.LayerNorm,), {})
    with backends.use("cuda"), pytest.raises(backends.BackendError, match="no kernel for"):
        run()
