"""Every op and autograd's other uses: twice, forwards, through torch.func, from another thread."""

import threading

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pytorch_ext import backends, ops


@pytest.fixture
def differentiable_attention():
    # Of PyTorch's attentions the one that is composed of other ops has second derivatives and forward-mode AD.
    with sdpa_kernel(SDPBackend.MATH):
        yield


def scalar(out) -> torch.Tensor:
    return sum(t.square().sum() for t in (out if isinstance(out, tuple) else (out,)))


def of_floats(function, tensors):
    """``function`` of its floating tensors alone, by position, and these tensors."""
    floats = {name: t for name, t in tensors.items() if t.is_floating_point()}
    others = {name: t for name, t in tensors.items() if name not in floats}

    def call(*values):
        return function(**dict(zip(floats, values, strict=True)), **others)

    return call, tuple(floats.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_repeats_bit_for_bit(case, backend, dtype, inputs_of):
    def once():
        tensors = inputs_of(case, backend, dtype, grad=True)
        with backends.use(backend):
            out = scalar(case.ours(**tensors))
        return torch.autograd.grad(out, [t for t in tensors.values() if t.requires_grad])

    first, second = once(), once()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_backward_on_another_thread_keeps_the_backend(case, kernel_backend, inputs_of):
    tensors = inputs_of(case, kernel_backend, grad=True)
    leaves = [t for t in tensors.values() if t.requires_grad]
    with backends.use(kernel_backend):
        out = scalar(case.ours(**tensors))
        wanted = torch.autograd.grad(out, leaves, retain_graph=True)
    found = []
    with backends.use("native"):
        thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(out, leaves)))
        thread.start()
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("loss", ["sum", "square"])
def test_second_derivative_of_a_kernel_is_refused(case, kernel_backend, loss, inputs_of):
    # The gradient of a plain sum needs no gradient itself: the case in which torch's once_differentiable says nothing.
    tensors = inputs_of(case, kernel_backend, grad=True)
    leaf = next(t for t in tensors.values() if t.requires_grad)
    with backends.use(kernel_backend):
        out = case.ours(**tensors)
    out = out[0] if isinstance(out, tuple) else out
    (gradient,) = torch.autograd.grad(getattr(out, loss)().sum(), leaf, create_graph=True)
    total = leaf.square().sum() + gradient.square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        total.backward()


def test_second_derivative_of_native(case, inputs_of, differentiable_attention):
    call, values = of_floats(case.ours, inputs_of(case, "native", torch.float64, grad=True))
    with backends.use("native"):
        assert torch.autograd.gradgradcheck(call, values, fast_mode=True)


TRANSFORMS = {
    "grad": lambda f, values: torch.func.grad(lambda *v: scalar(f(*v)))(*values),
    "vmap": lambda f, values: torch.func.vmap(f)(*(torch.stack([v, v.flip(0)]) for v in values)),
    "jvp": lambda f, values: torch.func.jvp(f, values, tuple(v.cos() for v in values))[1],
    "forward AD": lambda f, values: _forward_ad(f, values),
}


def _forward_ad(f, values):
    with torch.autograd.forward_ad.dual_level():
        out = f(*(torch.autograd.forward_ad.make_dual(v, v.cos()) for v in values))
        outs = out if isinstance(out, tuple) else (out,)
        return tuple(torch.autograd.forward_ad.unpack_dual(t).tangent for t in outs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch, of vmap over its own attention
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_go_to_native_under_auto(
    case, transform, inputs_of, differentiable_attention, monkeypatch
):
    # As if `reference` had been measured to be the fastest: auto must leave it for this.
    monkeypatch.setitem(backends._auto.FASTEST, (case.op, "cpu"), "reference")
    monkeypatch.setattr(backends._auto, "WORTHWHILE", {})
    call, values = of_floats(case.ours, inputs_of(case, "native", torch.float64))
    eager, _ = of_floats(case.eager, inputs_of(case, "native", torch.float64))
    assert backends.choose(case.op, *values) == "reference"
    torch.testing.assert_close(TRANSFORMS[transform](call, values), TRANSFORMS[transform](eager, values))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused_by_a_named_kernel(case, kernel_backend, transform, inputs_of):
    call, values = of_floats(case.ours, inputs_of(case, kernel_backend))
    with backends.use(kernel_backend), pytest.raises(backends.BackendError, match="need the backend native"):
        TRANSFORMS[transform](call, values)


def test_vmap_over_ids_and_indices():
    """Whose values are looked at otherwise, which vmap forbids."""
    ids, word, weight = torch.randint(7, (2, 3)), torch.randn(7, 4), torch.ones(4)

    def embed(ids):
        return ops.embedding_layer_norm(ids, None, None, word, None, None, weight, None, eps=1e-5)

    torch.testing.assert_close(torch.func.vmap(embed)(ids), embed(ids))
    tokens, indices = torch.randn(2, 3, 4), torch.tensor([[0, 1, 5], [2, 3, 4]])
    padded = torch.func.vmap(lambda t, i: ops.pad_input(t, i, 2, 3))(tokens, indices)
    assert torch.equal(padded[1], ops.pad_input(tokens[1], indices[1], 2, 3))
