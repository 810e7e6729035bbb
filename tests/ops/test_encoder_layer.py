"""A whole encoder layer as one op, where a backend has it, against the layer out of PyTorch's own ops."""

import math

import pytest
import torch
import torch.nn.functional as F

from pytorch_ext import backends
from pytorch_ext.ops.encoder_layer import encoder_layer_fwd
from pytorch_ext.testing import cumulative, normal

OP = "encoder_layer"
LENGTHS = [7, 0, 1, 70]
HIDDEN, INNER, HEADS = 64, 96, 2
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
VECTORS = {"query": HIDDEN, "key": HIDDEN, "value": HIDDEN, "out": HIDDEN, "up": INNER, "down": HIDDEN}


def make(generator):
    found = {"input": normal(generator, sum(LENGTHS), HIDDEN)}
    for name, rows in VECTORS.items():
        cols = INNER if name == "down" else HIDDEN
        found[f"{name}_weight"] = normal(generator, rows, cols, scale=cols**-0.5)
        found[f"{name}_bias"] = normal(generator, rows)
    for name in ("norm1_weight", "norm1_bias", "norm2_weight"):
        found[name] = normal(generator, HIDDEN) + 1.0
    return found


def eager(activation, causal):
    def layer(input, norm1_weight, norm1_bias, norm2_weight, **p):
        def linear(x, name):
            return F.linear(x, p[f"{name}_weight"], p[f"{name}_bias"])

        three = (linear(input, name).unflatten(-1, (HEADS, -1)) for name in ("query", "key", "value"))
        contexts = []
        for sequence in zip(*(t.split(LENGTHS) for t in three), strict=True):
            by_head = (t.transpose(0, 1) for t in sequence)
            contexts.append(F.scaled_dot_product_attention(*by_head, is_causal=causal).transpose(0, 1))
        x = input + linear(torch.cat(contexts).flatten(1), "out")
        x = F.layer_norm(x, (HIDDEN,), norm1_weight, norm1_bias, 1e-12)
        y = linear(ACTIVATIONS[activation](linear(x, "up")), "down")
        return F.layer_norm(x + y, (HIDDEN,), norm2_weight, None, 1e-5)

    return layer


def ours(activation, causal, joined):
    def layer(input, norm1_weight, norm1_bias, norm2_weight, **p):
        three = ("query", "key", "value")
        weights, biases = ([p[f"{name}_{kind}"] for name in three] for kind in ("weight", "bias"))
        if joined:
            weights, biases = [torch.cat(weights)], [torch.cat(biases)]
        first = (p["out_weight"], p["out_bias"], norm1_weight, norm1_bias)
        second = (p["up_weight"], p["up_bias"], p["down_weight"], p["down_bias"], norm2_weight, None)
        where = (cumulative(LENGTHS, input.device), max(LENGTHS), HEADS)
        options = (activation, causal, math.sqrt(HEADS / HIDDEN), 1e-12, 1e-5)
        return encoder_layer_fwd(
            input, weights, biases, *first, *second, *where, *options, backends.requested()
        )

    return layer


@pytest.mark.parametrize(
    ("activation", "causal", "joined"),
    [("gelu", False, False), ("gelu_tanh", False, True), ("relu", True, True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_contract(backend, dtype, activation, causal, joined, check_contract):
    if backend == "cuda" and dtype == torch.float32:
        pytest.skip("its attention multiplies 16 bits")
    call, reference = ours(activation, causal, joined), eager(activation, causal)
    check_contract(backend, call, reference, make, dtype, gradients=False)


def test_no_tokens(backend, device_of):
    tensors = {name: t.to(device_of(backend)) for name, t in make(torch.Generator().manual_seed(0)).items()}
    tensors = {name: t.bfloat16() for name, t in tensors.items()}
    tensors["input"] = tensors["input"][:0]
    with backends.use(backend):
        assert ours("gelu", False, True)(**tensors).shape == (0, HIDDEN)


def test_tokens_behind_the_last_sequence_reach_no_other(backend, device_of):
    tensors = make(torch.Generator().manual_seed(0))
    tensors = {name: t.to(device_of(backend), torch.bfloat16) for name, t in tensors.items()}
    with backends.use(backend):
        expected = ours("gelu", False, False)(**tensors)
        behind = torch.full((3, HIDDEN), float("nan")).to(tensors["input"])
        got = ours("gelu", False, False)(**tensors | {"input": torch.cat([tensors["input"], behind])})
    assert torch.equal(got[: sum(LENGTHS)], expected)
