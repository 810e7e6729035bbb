"""Every op as a node of PyTorch's graph, by an autograd.Function or by the compiled backend: the same either way."""

import functools
import itertools
import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from pytorch_ext import backends, ops
from pytorch_ext.backends import cpu
from pytorch_ext.ops import _raw
from pytorch_ext.testing import cumulative

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="; ".join(backends.why_not("cpu", "gelu")))


@pytest.fixture
def by_python(monkeypatch, the_long_way):
    """Makes nodes by Python's functions from now on."""

    def switch():
        the_long_way()
        monkeypatch.setattr(_raw, "differentiable", lambda name, op: None)

    return switch


@pytest.fixture(params=["compiled", "python"])
def way(request, by_python):
    if request.param == "python":
        by_python()
    with backends.use("cpu"):
        yield request.param


@pytest.fixture
def small(case, inputs_of):
    """The leaves of a case, and its outputs from them."""
    tensors = inputs_of(case, "cpu", grad=True)
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}
    return leaves, lambda: outputs(case.ours(**tensors))


def outputs(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def upstream(outs) -> list:
    """A gradient for each output, one in every other column of memory."""
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(*o.shape[:-1], 2 * o.shape[-1], generator=draw).to(o.dtype)[..., ::2] for o in outs]


def gradients(outs, leaves, **options) -> tuple:
    return torch.autograd.grad(outs, list(leaves.values()), upstream(outs), **options)


def same(found, wanted) -> bool:
    pairs = list(zip(found, wanted, strict=True))
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


# --- The same bits ---


def test_bits(case, inputs_of, by_python):
    def once(dtype, autocast):
        tensors = inputs_of(case, "cpu", dtype, grad=True)
        leaves = {name: t for name, t in tensors.items() if t.requires_grad}
        with backends.use("cpu"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outs = outputs(case.ours(**tensors))
        return [*outs, *gradients(outs, leaves)], outs[0].grad_fn

    kinds = ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True))
    compiled = [once(*kind) for kind in kinds]
    by_python()
    for kind, (found, node) in zip(kinds, compiled, strict=True):
        wanted, python_node = once(*kind)
        assert same(found, wanted)
        if python_node.name().endswith("FunctionBackward"):  # under autocast it may be what casts the output
            assert node.name() == case.op.title().replace("_", "") + "Backward"
        assert not isinstance(node, torch.autograd.function.BackwardCFunction)


def _add_norm(cols, dtypes, prenorm, p):
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(7, cols, generator=draw).to(dtype) for dtype in dtypes]
    tensors += [torch.randn(cols, generator=draw) for _ in range(2)]
    leaves = [t.requires_grad_() for t in tensors]
    bias = leaves[3].to(dtypes[0])
    out = ops.dropout_add_layer_norm(*leaves[:3], input_bias=bias, dropout_p=p, prenorm=prenorm)
    return outputs(out), leaves


def _embedding(cols, p):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(9, (3, 5), generator=draw)
    leaves = [torch.randn(*shape, generator=draw).requires_grad_() for shape in ((9, cols), (cols,))]
    out = ops.embedding_layer_norm(
        ids, None, None, leaves[0], None, None, leaves[1], None, eps=1e-5, padding_idx=3, dropout_p=p
    )
    return (out,), leaves


def _attention(p):
    draw = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 3, 9, 8, generator=draw).requires_grad_() for _ in "qkv"]
    mask = torch.randn(9, 9, generator=draw).requires_grad_()
    return (ops.scaled_dot_product_attention(*leaves, mask, dropout_p=p),), [*leaves, mask]


def _varlen(p):
    leaves = [
        torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)
    ]
    ends = cumulative((4, 5))
    return (ops.varlen_attention(*leaves, ends, ends, 5, 5, dropout_p=p),), leaves


FLOAT, HALF = torch.float32, torch.bfloat16
DROPPING = {
    **{
        f"add_norm-{cols}-{'-'.join(str(d)[6:] for d in dtypes)}-{prenorm}-{p}": functools.partial(
            _add_norm, cols, dtypes, prenorm, p
        )
        for cols, dtypes, prenorm, p in (
            (40, (FLOAT, FLOAT), False, 0.3),
            (40, (HALF, FLOAT), True, 0.3),
            (1, (FLOAT, HALF), False, 0.5),
            (131, (HALF, HALF), True, 0.1),
            (1100, (FLOAT, FLOAT), False, 0.1),
            (40, (FLOAT, FLOAT), False, 1.0),
        )
    },
    "embedding-40": functools.partial(_embedding, 40, 0.3),
    "embedding-1100": functools.partial(_embedding, 1100, 0.1),
    "attention": functools.partial(_attention, 0.2),
    "varlen": functools.partial(_varlen, 0.2),
}


@pytest.mark.parametrize("isa", cpu.library().isas() if cpu.library() else [])
def test_bits_with_dropout(isa, fixed_rng, by_python):
    """Which Python's way draws once more in backward, and the compiled one may have kept."""
    fixed_rng(-(2**62) - 5, 2**33 + 7)
    before = cpu.isa()
    cpu.library().set_isa(isa)

    def every():
        found = {}
        with backends.use("cpu"):
            for name, function in DROPPING.items():
                outs, leaves = function()
                found[name] = [*outs, *torch.autograd.grad(outs, leaves, upstream(outs))]
        return found

    try:
        compiled = every()
        by_python()
        wanted = every()
    finally:
        cpu.library().set_isa(before)
    different = [name for name in DROPPING if not same(compiled[name], wanted[name])]
    assert not different
    assert not any(t.isnan().any() for tensors in wanted.values() for t in tensors)


# --- What autograd promises ---


def test_no_second_derivative(way, small):
    """Of any gradient by any input, whoever asks, and with an incoming gradient that needs none."""
    leaves, run = small
    outs = run()
    ones = [torch.ones_like(o, requires_grad=True) for o in outs]
    for weights in (ones, [o.detach() for o in ones]):
        found = torch.autograd.grad(outs, list(leaves.values()), weights, create_graph=True)
        others = [*leaves.values(), *(w for w in weights if w.requires_grad)]
        assert all(g.requires_grad for g in found)
        for gradient, other in itertools.product(found, others):
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(gradient.sum(), other, retain_graph=True)


def test_some_inputs_and_some_outputs(way, small):
    close = torch.testing.assert_close
    leaves, run = small
    wanted = dict(zip(leaves, gradients(run(), leaves), strict=True))
    for name, leaf in leaves.items():
        outs = run()
        close(gradients(outs, {name: leaf})[0], wanted[name])  # a bias's alone is summed up in another order
        leaf.requires_grad_(False)
        others = {n: t for n, t in leaves.items() if n != name}
        if others:
            outs = run()
            close(gradients(outs, others), [wanted[n] for n in others])
        leaf.requires_grad_(True)
    outs = run()
    for out, weight in zip(outs, upstream(outs), strict=True):  # the gradient of the other is absent
        zeros = [torch.zeros_like(o) if o is not out else weight for o in outs]
        alone = torch.autograd.grad(out, list(leaves.values()), weight, retain_graph=True, allow_unused=True)
        both = torch.autograd.grad(outs, list(leaves.values()), zeros, retain_graph=True)
        for one, other in zip(alone, both, strict=True):
            close(other if one is None else one, other)


def test_backward_twice(way, small):
    leaves, run = small
    outs = run()
    first = gradients(outs, leaves, retain_graph=True)
    assert same(first, gradients(outs, leaves))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(outs, leaves)


def test_saved_tensors_hooks_and_checkpoint(way, small):
    leaves, run = small
    wanted = gradients(run(), leaves)
    packed, unpacked = [], []

    def pack(t):
        packed.append(t)
        return len(packed) - 1, t.clone()

    def unpack(kept):
        unpacked.append(kept[0])
        return kept[1]

    with saved_tensors_hooks(pack, unpack):
        outs = run()
    assert same(gradients(outs, leaves), wanted)
    assert packed and sorted(unpacked) == list(range(len(packed)))
    # It ends the second forward pass by an exception from the hook of the last tensor that is needed.
    outs = outputs(checkpoint(lambda: run() if len(run()) > 1 else run()[0], use_reentrant=False))
    assert same(gradients(outs, leaves), wanted)


def test_what_backward_needs_must_not_change(way, case, small):
    leaves, run = small
    if case.op == "dropout_add_layer_norm":
        changed = "weight" if case.name == "add_norm" else None  # the sum
    else:
        changed = next(iter(leaves))
    outs = run()
    with torch.no_grad():
        (outs[1] if changed is None else leaves[changed]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(outs, leaves)


def test_memory_is_released(way, case, small, inputs_of):
    tensors = inputs_of(case, "cpu")
    name = "value" if "value" in tensors else "word" if "word" in tensors else "input"
    leaf = tensors[name].requires_grad_()
    tensors[name] = leaf * 1
    kept = weakref.ref(tensors[name])
    outs = outputs(case.ours(**tensors))
    del tensors
    # The sum alone is needed.
    assert (kept() is None) == (way == "compiled" and case.op == "dropout_add_layer_norm")
    gradients(outs, {name: leaf})
    assert kept() is None


def test_hooks_of_the_node_and_anomalies(way, case, small):
    leaves, run = small
    outs = run()
    seen = []
    outs[0].grad_fn.register_prehook(lambda grads: seen.append(len(grads)))
    outs[0].grad_fn.register_hook(lambda results, grads: seen.append(len(results)))
    gradients(outs, leaves)
    assert seen[0] == 1 + (case.name in ("prenorm",) or (way == "python" and case.name == "add_norm"))
    assert seen[1] >= len(leaves)
    with pytest.warns(UserWarning, match="Anomaly|Error detected"), torch.autograd.detect_anomaly():
        outs = run()
        with pytest.raises(RuntimeError, match=f"'{outs[0].grad_fn.name()}' returned nan"):
            outs[0].backward(torch.full_like(outs[0], torch.nan))


def test_nothing_is_recorded_without_gradients(way, small):
    _, run = small
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert all(o.grad_fn is None and not o.requires_grad for o in run())


class Names(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


def test_who_looks_on_sees_the_raw_ops(case, small):
    leaves, run = small
    with backends.use("cpu"), Names() as names:
        outs = run()
        gradients(outs, leaves)
    assert f"pytorch_ext::{case.op}_fwd" in names.seen
    assert f"pytorch_ext::{case.op}_bwd" in names.seen or case.op == "dropout_add_layer_norm"
