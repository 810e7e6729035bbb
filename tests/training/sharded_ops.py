"""Two processes compute on halves of tensors what one computes on whole ones: run by ``two_processes.py``."""

import warnings

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module

import pytorch_ext
from pytorch_ext import backends, ops
from pytorch_ext.dropin._padding import last_forward
from pytorch_ext.models import BertConfig, BertModel
from pytorch_ext.training import tensor_parallel

BACKENDS = ("reference", "cpu")


def check_all(mesh) -> list[str]:
    """The backends with which every op was checked."""
    warnings.filterwarnings("ignore", message=".*experimental")
    names = [name for name in BACKENDS if name in backends.available()]
    for backend in names:
        for case in cases():
            check(mesh, backend, *case)
    with backends.use("reference"):
        norms_by_sequence(mesh)
        layers_by_features(mesh)
    return names


def cases():
    """What runs, its inputs, on which dimension each is split (None: whole), and how the result has to be split."""
    torch.manual_seed(0)

    def t(*shape):
        return torch.randn(*shape)

    row, wide = {"x": 0}, {"x": 1}
    yield lambda x: ops.gelu(x), {"x": t(4, 6, 8)}, wide, 1
    yield ops.bias_gelu, {"input": t(4, 6, 8), "bias": t(8)}, {"input": 2, "bias": 0}, 2
    yield ops.bias_gelu, {"input": t(4, 6, 8), "bias": t(8)}, {"input": 1}, 1
    norm = {"x": t(4, 6, 8), "w": t(8), "b": t(8)}
    yield lambda x, w, b: ops.layer_norm(x, 8, w, b), norm, wide, 1
    yield lambda x, w, b: ops.layer_norm(x, 8, w, b), norm, {"x": 2}, None
    yield lambda x: ops.layer_norm(x, (6, 8)), {"x": t(4, 6, 8)}, row, 0
    added = {"x": t(4, 6, 8), "r": t(4, 6, 8), "w": t(8), "b": t(8), "i": t(8)}

    def add_norm(x, r, w, b, i):
        return ops.dropout_add_layer_norm(x, r, w, b, input_bias=i)

    yield add_norm, added, {"x": 1, "r": 1}, 1
    linear = {"input": t(4, 6, 8), "weight": t(10, 8), "bias": t(10)}
    for activation in (None, "gelu"):

        def activated(input, weight, bias=None, activation=activation):
            return ops.linear(input, weight, bias, activation)

        yield activated, linear, {"input": 1}, 1
        yield activated, linear, {"weight": 0, "bias": 0}, 2
    without_bias = {name: linear[name] for name in ("input", "weight")}
    yield ops.linear, without_bias, {"input": 2, "weight": 1}, "sum"
    heads = {"query": t(2, 4, 5, 8), "key": t(2, 4, 5, 8), "value": t(2, 4, 5, 8)}
    for d in (0, 1):
        yield ops.scaled_dot_product_attention, heads, dict.fromkeys(heads, d), d
        yield (
            ops.scaled_dot_product_attention,
            {**heads, "attn_mask": t(2, 1, 5, 5)},
            dict.fromkeys(heads, d),
            d,
        )
    lengths = torch.tensor([0, 3, 4, 7], dtype=torch.int32)
    packed = {"query": t(7, 4, 8), "key": t(7, 4, 8), "value": t(7, 4, 8)}

    def varlen(query, key, value):
        return ops.varlen_attention(query, key, value, lengths, lengths, 3, 3)

    yield varlen, packed, dict.fromkeys(packed, 1), 1
    yield varlen, {name: tensor.repeat(2, 1, 1)[:7] for name, tensor in packed.items()}, {}, None


def check(mesh, backend, function, inputs, split, expected) -> None:
    """Results and gradients of the parts, put together, against those of the whole; and that they stayed in parts."""
    whole = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    parts = {}
    for name, x in inputs.items():
        placement = Shard(split[name]) if split.get(name) is not None else Replicate()
        parts[name] = distribute_tensor(x, mesh, [placement]).requires_grad_()
    with backends.use(backend):
        want, got = function(**whole), function(**parts)
        weights = torch.linspace(-1, 2, want.numel()).view_as(want)
        (want * weights).sum().backward()
        (got * distribute_tensor(weights, mesh, [Replicate()])).sum().backward()
    (placement,) = got.placements
    if expected == "sum":
        assert placement.is_partial(), placement
    elif expected is None:
        assert placement.is_replicate(), placement
    else:
        assert placement.is_shard(expected), (function, placement)
    close(got.full_tensor(), want, f"{backend} {function}")
    for name, x in whole.items():
        close(parts[name].grad.full_tensor(), x.grad, f"{backend} {function} d{name}")


def norms_by_sequence(mesh) -> None:
    """PyTorch's style of sequence parallel, on a LayerNorm that ``optimize`` has swapped."""
    torch.manual_seed(1)
    block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12)).double()
    nn.init.normal_(block[0].weight)
    other = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12)).double()
    other.load_state_dict(block.state_dict())
    pytorch_ext.optimize(other)
    parallelize_module(
        other,
        mesh,
        {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())},
    )
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    want, got = block(x), other(distribute_tensor(x, mesh, [Shard(1)]))
    want.square().sum().backward()
    got.square().sum().backward()
    close(got, want, "sequence parallel")
    close(other[0].weight.grad.full_tensor(), block[0].weight.grad, "sequence parallel, gradient of the norm")


def layers_by_features(mesh) -> None:
    """Tensor parallel without padding, and with sums where the ranks have to meet."""
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config).double()
    other = BertModel(config).double()
    other.load_state_dict(model.state_dict())
    tensor_parallel(pytorch_ext.optimize(other), mesh)
    ids, mask = torch.randint(1, 31, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, 4:] = 0
    for _ in range(2):
        want, got = model(ids, mask).last_hidden_state, other(ids, mask).last_hidden_state
        close(got[mask.bool()], want[mask.bool()], "tensor parallel")
    assert last_forward(other.encoder) == "without padding: 22 of 27 positions were real tokens"
    queries = other.encoder.layer[0].attention.self.query.weight
    assert isinstance(queries, DTensor) and queries.to_local().shape == (8, 16)
    seen = []
    original = ops.varlen_attention
    ops.varlen_attention = lambda q, *args, **kwargs: seen.append(q.shape) or original(q, *args, **kwargs)
    other(ids, mask)
    ops.varlen_attention = original
    assert seen == [(22, 2, 4)] * 2, "half of the heads, of the real tokens"
    try:
        tensor_parallel(model, mesh)
    except ValueError as error:
        assert "expected an optimised encoder" in str(error)
    else:
        raise AssertionError("a model that was not optimised is refused")


def close(got, want, what) -> None:
    rtol, atol = (1e-4, 1e-5) if want.dtype == torch.float32 else (1e-9, 1e-10)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}")
