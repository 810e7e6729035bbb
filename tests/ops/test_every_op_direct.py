"""The short way through an op: the bits of the long way, and only where nothing about the call is unusual."""

import collections
import contextlib
import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from pytorch_ext import backends, ops
from pytorch_ext.backends import cpu
from pytorch_ext.ops import _direct
from pytorch_ext.testing import cumulative

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="; ".join(backends.why_not("cpu", "gelu")))


@pytest.fixture
def answers(monkeypatch):
    """Whether each call went the short way, by op, in their order."""
    found = collections.defaultdict(list)

    def watched(name, op):
        function = backends._registry.direct_function(name, op)
        if function is None:
            return None

        @functools.wraps(function)
        def call(*args):
            out = function(*args)
            found[op].append(out is not None)
            return out

        return call

    monkeypatch.setattr(_direct, "direct_function", watched)
    return found


def outputs(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def everything(case, inputs_of, dtype, grad) -> list:
    """The outputs of a case, and the gradients of all that has one."""
    torch.manual_seed(5)  # for dropout
    tensors = inputs_of(case, "cpu", dtype, grad=grad)
    with backends.use("cpu"):
        outs = outputs(case.ours(**tensors))
    leaves = [t for t in tensors.values() if t.requires_grad]
    return (
        [*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])] if grad else [*outs]
    )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits(case, inputs_of, answers, the_long_way, dtype, grad):
    found = everything(case, inputs_of, dtype, grad)
    assert answers[case.op] == [True]
    the_long_way()
    wanted = everything(case, inputs_of, dtype, grad)
    assert len(answers[case.op]) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert [o.grad_fn is None for o in found] == [o.grad_fn is None for o in wanted]


class Silent(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def _traced(run):
    torch.jit.trace(run, (torch.ones(1),), check_trace=False)


UNUSUAL = {
    "a dispatch mode": lambda run: _within(Silent(), run),
    "autocast": lambda run: _within(torch.autocast("cpu", torch.bfloat16), run),
    "a profiler": lambda run: _within(torch.profiler.profile(), run),
    "forward-mode AD": lambda run: _within(forward_ad.dual_level(), run),
    "vmap": lambda run: torch.vmap(run)(torch.ones(1)),
    "make_fx": lambda run: make_fx(run)(torch.ones(1)),
    "torch.jit.trace": _traced,
}


def _within(context: contextlib.AbstractContextManager, run):
    with context:
        run(None)


@pytest.mark.parametrize("who", UNUSUAL)
@pytest.mark.filterwarnings("ignore")  # of what is deprecated, or traced as a constant
def test_who_looks_on_gets_the_long_way(case, inputs_of, answers, who):
    tensors = inputs_of(case, "cpu")

    def run(x):
        case.ours(**tensors)
        return x

    # A backend that is asked for by name refuses a transform, and a tracer may refuse a raw op.
    with contextlib.suppress(RuntimeError), backends.use("cpu"):
        UNUSUAL[who](run)
    assert answers[case.op] == [False]
    with backends.use("cpu"):
        run(None)
    assert answers[case.op] == [False, True]


class Tagged(torch.Tensor):
    pass


DISGUISES = {
    "a subclass": lambda t: t.as_subclass(Tagged),
    "negative": lambda t: torch._neg_view(-t),
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_what_is_not_what_it_seems_goes_the_long_way(case, inputs_of, answers, disguise):
    """And comes to the same."""
    for name, t in inputs_of(case, "cpu").items():
        if not t.is_floating_point():
            continue
        tensors = inputs_of(case, "cpu")
        hidden = DISGUISES[disguise](t)
        answers.clear()
        with backends.use("cpu"):
            torch.manual_seed(5)
            found = outputs(case.ours(**{**tensors, name: hidden}))
            assert not any(answers[case.op]), name
            torch.manual_seed(5)
            plain = torch.zeros_like(t) if disguise.startswith("zeros") else t
            wanted = outputs(case.ours(**{**tensors, name: plain}))
        assert all(torch.equal(torch.Tensor(a), b) for a, b in zip(found, wanted, strict=True)), name


def test_float64_and_other_types_of_arguments(answers):
    """None of them may come back as an error that names arguments of the compiled function."""
    x, w, b = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6)
    with backends.use("cpu"):
        with pytest.raises(ValueError, match=r"activation: expected one of"):
            ops.linear(x, w, b, 5)
        with pytest.raises(ValueError, match=r"approximate: expected"):
            ops.gelu(x, None)
        with pytest.raises(TypeError, match=r"weight: expected a torch.Tensor"):
            ops.linear(x, [1.0], b)
        with pytest.raises(backends.BackendError, match="float64"):
            ops.gelu(x.double())
        with pytest.raises(ValueError, match=r"dropout_p: expected a probability"):
            ops.dropout_add_layer_norm(x, x, torch.ones(8), dropout_p=2.0, training=False)
        with pytest.raises(ValueError, match=r"dropout_p: expected a probability"):
            options = {"eps": 1e-5, "dropout_p": -1.0, "training": False}
            ops.embedding_layer_norm(torch.tensor([1]), None, None, w, None, None, w[0], None, **options)
    with pytest.raises(TypeError, match=r"input: expected a torch.Tensor"):
        ops.layer_norm([1.0, 2.0], 2)
    assert not any(a for found in answers.values() for a in found)


def test_numbers_of_other_types(answers):
    x, w = torch.randn(40, 8), torch.ones(8)
    ends = cumulative((3, 5))
    q = torch.randn(8, 2, 4)
    with backends.use("cpu"):
        ops.dropout_add_layer_norm(x, x, w, dropout_p=0, eps=1)
        ops.layer_norm(x, 8)
        ops.layer_norm(x, [8])
        ops.layer_norm(x, torch.Size((40, 8)))
        ops.varlen_attention(q, q, q, ends, ends, 5, 5, dropout_p=0, scale=1)
    assert all(all(found) for found in answers.values()) and len(answers["layer_norm"]) == 3


def test_auto_takes_it_where_its_table_says_so(answers):
    large, small = torch.randn(2000, 768), torch.randn(2, 768)
    ops.layer_norm(large, (768,))
    ops.layer_norm(small, (768,))
    with backends.use("native"):
        ops.layer_norm(large, (768,))
    with backends.use("reference"):
        ops.layer_norm(small, (768,))
    assert answers["layer_norm"] == [True]
