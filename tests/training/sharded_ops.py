"""Two processes compute on halves of tensors what one computes on whole ones: run by ``two_processes.py``."""

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module

import pytorch_ext
from pytorch_ext import backends, ops
from pytorch_ext.dropin._by_tokens import _dropped
from pytorch_ext.dropin._padding import last_forward
from pytorch_ext.models import BertConfig, BertModel
from pytorch_ext.training import sequence_parallel, tensor_parallel

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
        layers_by_tokens(mesh)
        dropout_by_tokens(mesh)
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


def make_model(dropout=0.0) -> BertModel:
    config = BertConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=12,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(2)
    return BertModel(config).double()


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask: 21 of 27 positions are real, which two ranks cannot share evenly."""
    ids, mask = torch.randint(1, 31, (3, 9), generator=torch.Generator().manual_seed(3)), torch.ones(3, 9)
    mask[0, 3:] = 0
    return ids, mask


def seen_by(name, function) -> list:
    """The shape of the first argument of the op ``name``, each time that ``function`` calls it."""
    seen, original = [], getattr(ops, name)
    setattr(ops, name, lambda x, *args, **kwargs: seen.append(x.shape) or original(x, *args, **kwargs))
    try:
        function()
    finally:
        setattr(ops, name, original)
    return seen


def layers_by_features(mesh) -> None:
    """Tensor parallel without padding, and with sums where the ranks have to meet."""
    model, other = make_model(), make_model()
    tensor_parallel(pytorch_ext.optimize(other), mesh)
    ids, mask = make_batch()
    for _ in range(2):
        want, got = model(ids, mask).last_hidden_state, other(ids, mask).last_hidden_state
        close(got[mask.bool()], want[mask.bool()], "tensor parallel")
    assert last_forward(other.encoder) == "without padding: 21 of 27 positions were real tokens"
    queries = other.encoder.layer[0].attention.self.query.weight
    assert isinstance(queries, DTensor) and queries.to_local().shape == (8, 16)
    seen = seen_by("varlen_attention", lambda: other(ids, mask))
    assert seen == [(21, 2, 4)] * 2, "half of the heads, of the real tokens"
    try:
        tensor_parallel(model, mesh)
    except ValueError as error:
        assert "expected an optimised encoder" in str(error)
    else:
        raise AssertionError("a model that was not optimised is refused")


def layers_by_tokens(mesh) -> None:
    """Sequence parallel without padding, under every mask, and where something wants to see padded batches."""
    model, other = make_model(), make_model()
    sequence_parallel(pytorch_ext.optimize(other), mesh)
    ids, mask = make_batch()
    left = mask.flip(1)
    for given in (mask, None, left):
        found = []
        for m in (model, other):
            m.zero_grad()
            out = m(ids, given, output_hidden_states=given is mask)
            shown = sum(out.hidden_states) if given is mask else out.last_hidden_state
            found.append(shown if given is None else shown[given.bool()])
            found[-1].square().sum().backward()
        close(found[1], found[0], "sequence parallel")
        for (name, p), q in zip(model.named_parameters(), other.named_parameters(), strict=True):
            if p.grad is not None and not name.endswith("key.bias"):
                gradient = q[1].grad
                close(getattr(gradient, "full_tensor", lambda g=gradient: g)(), p.grad, f"gradient of {name}")
    half = [(11 if mesh.get_local_rank() == 0 else 10, 16)] * 4
    assert seen_by("dropout_add_layer_norm", lambda: other(ids, mask)) == half, "a part of the real tokens"
    assert seen_by("varlen_attention", lambda: other(ids, mask)) == [(21, 2, 4)] * 2, "half of the heads"
    seen = seen_by("dropout_add_layer_norm", lambda: other(ids[:1, :1]))
    assert seen == [(1 - mesh.get_local_rank(), 16)] * 4, "a rank may have no token at all"
    hook = other.encoder.layer[1].output.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    close(
        other(ids, mask).last_hidden_state, (model(ids, mask).last_hidden_state * mask[..., None]), "hooked"
    )
    assert seen[-1] == (3, 9, 16), "module by module, with padding"
    hook.remove()


def dropout_by_tokens(mesh) -> None:
    """Each rank drops elements of its own tokens, and what the ranks draw together afterwards stays alike."""
    model = sequence_parallel(pytorch_ext.optimize(make_model(dropout=0.3)), mesh)
    ids, mask = make_batch()
    torch.manual_seed(4)
    found = model(ids, mask).last_hidden_state
    found.square().sum().backward()
    norm = model.encoder.layer[0].output.LayerNorm
    for tensor in (found.detach(), norm.weight.grad, torch.get_rng_state()):
        first, second = (torch.empty_like(tensor) for _ in range(2))
        dist.all_gather([first, second], tensor.contiguous())
        assert torch.equal(first, second), "alike on both ranks"
    kept = _dropped(torch.ones(100, 64), 0.3, mesh)
    first, second = (torch.empty_like(kept) for _ in range(2))
    dist.all_gather([first, second], kept)
    assert abs((kept == 0).double().mean() - 0.3) < 0.03
    # Of two independent masks 0.7² + 0.3² of the elements agree; of one mask all.
    assert abs(((first == 0) == (second == 0)).double().mean() - 0.58) < 0.03
    close(kept.max(), torch.tensor(1 / 0.7), "scale")


def close(got, want, what) -> None:
    rtol, atol = (1e-4, 1e-5) if want.dtype == torch.float32 else (1e-9, 1e-10)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}")
