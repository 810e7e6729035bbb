import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pytorch_ext import backends, ops
from pytorch_ext.ops.gelu import gelu_bwd, gelu_fwd
from pytorch_ext.testing import normal

OP = "gelu"
BOTH = pytest.mark.parametrize("approximate", ["none", "tanh"])


def of(function, approximate):
    return lambda input: function(input, approximate=approximate)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 5.0, 1e4])
def test_error(backend, approximate, dtype, scale, check_contract):
    make = lambda g: {"input": normal(g, 7, 33, scale=scale)}  # noqa: E731
    check_contract(backend, of(ops.gelu, approximate), of(F.gelu, approximate), make, dtype)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_a_half_precision(backend, approximate, dtype, check_contract):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = values[values.isfinite()].double()
    make = lambda g: {"input": values}  # noqa: E731
    check_contract(backend, of(ops.gelu, approximate), of(F.gelu, approximate), make, dtype)


@BOTH
def test_far_tails_and_what_is_no_number(backend, approximate, device_of):
    # Eager PyTorch's derivative by tanh is NaN where the cube of x overflows; a kernel's is not.
    far = 1e4 if backend == "native" else 3e38
    x = torch.tensor([0.0, -0.0, 30.0, 1e4, far, -30.0, -1e4, -far, math.inf, math.nan, -math.inf])
    x = x.to(device_of(backend)).requires_grad_()
    with backends.use(backend):
        out = ops.gelu(x, approximate)
    (dx,) = torch.autograd.grad(out.sum(), x)
    # The derivative at 0 is 1/2; far out it has reached 0 or 1, and nothing overflows on the way there.
    assert out.tolist()[:8] == [0.0, 0.0, *x[2:5].tolist(), 0.0, 0.0, 0.0]
    assert dx.tolist()[:8] == [0.5, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert out[9].isnan() and dx[9].isnan()
    if backend != "native":  # PyTorch's own gives NaN for infinity on processors with AVX-512
        assert out[8] == math.inf
    assert torch.equal(out[10].isnan(), F.gelu(x, approximate=approximate)[10].isnan())


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 3, 0, 4)], ids=str)
def test_any_number_of_dimensions(backend, shape, device_of):
    x = torch.full(shape, 1.5, device=device_of(backend), requires_grad=True)
    with backends.use(backend):
        out = ops.gelu(x)
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert out.shape == dx.shape == shape
    torch.testing.assert_close(out, F.gelu(x))


@BOTH
def test_gradcheck(approximate):
    x = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    with backends.use("reference"):
        assert torch.autograd.gradcheck(lambda x: ops.gelu(x, approximate), x)
        torch.testing.assert_close(ops.gelu(x, approximate), F.gelu(x, approximate=approximate))


@BOTH
@pytest.mark.parametrize(
    "layout", [lambda t: t, lambda t: t.t().contiguous().t()], ids=["contiguous", "transposed"]
)
def test_opcheck(kernel_backend, layout, approximate, device_of):
    x, dout = (layout(torch.randn(6, 8, device=device_of(kernel_backend))) for _ in range(2))
    torch.library.opcheck(gelu_fwd, (x, approximate, kernel_backend))
    torch.library.opcheck(gelu_bwd, (dout, x, approximate, kernel_backend))


@given(shape=st.lists(st.integers(1, 9), max_size=4), seed=st.integers(0, 99))
def test_any_shape(backend, check_contract, shape, seed):
    make = lambda g: {"input": normal(g, *shape)}  # noqa: E731
    seeds = range(seed, seed + 4)
    check_contract(backend, of(ops.gelu, "none"), of(F.gelu, "none"), make, torch.float32, seeds=seeds)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0,), TypeError, "input: expected a torch.Tensor, got float"),
        ((torch.arange(3),), RuntimeError, "input: expected a floating-point tensor, got dtype torch.int64"),
        ((torch.randn(3), "erf"), ValueError, "approximate: expected 'none' or 'tanh', got 'erf'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.gelu(*arguments)
