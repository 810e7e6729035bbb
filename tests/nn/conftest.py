"""Modules with random weights, and what it means that two do the same."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are too small to share out: on a busy machine waiting for a second thread takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_pair():
    """``make_pair(theirs, ours, ...)``: PyTorch's module in float64, and ours with the same constructor and weights."""

    def make(theirs, ours, *args, **kwargs):
        pair = [cls(*args, **kwargs).double() for cls in (theirs, ours)]
        # Biases and LayerNorms too: with the zeros and ones that they start from, a wrong one would not show.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in pair[0].parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        pair[1].load_state_dict(pair[0].state_dict(), strict=True)
        return pair

    return make


@pytest.fixture(scope="session")
def assert_alike():
    """That two modules give the same for one call, to rounding: outputs, gradients of all, or the kind of error.

    ``real`` picks the part of the first output that counts. Beside the modules' parameters, all floating tensors that
    require a gradient among the arguments get one.
    """

    def check(theirs, ours, *args, real=lambda out: out, rtol=1e-9, atol=1e-10, **kwargs):
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
        expected, got = (_run(module, given, real, args, kwargs) for module in (theirs, ours))
        if isinstance(expected, type) or isinstance(got, type):
            assert got is expected
            return
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            if other is None or one is None:
                assert one is other
            else:
                torch.testing.assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True)

    return check


def _run(module, given, real, args, kwargs):
    """Outputs and gradients, or the class of the error."""
    try:
        out = module(*args, **kwargs)
    except (AssertionError, RuntimeError) as error:
        return AssertionError if isinstance(error, AssertionError) else RuntimeError
    first, *rest = out if isinstance(out, tuple) else (out,)
    outputs = [real(first), *rest]
    loss = sum(t.nan_to_num().sin().sum() for t in outputs if t is not None)
    gradients = torch.autograd.grad(loss, [*given, *module.parameters()], allow_unused=True)
    return [*outputs, *gradients]
