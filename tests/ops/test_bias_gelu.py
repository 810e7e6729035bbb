import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pytorch_ext import backends, ops
from pytorch_ext.ops.bias_gelu import bias_gelu_bwd, bias_gelu_fwd
from pytorch_ext.testing import normal

OP = "bias_gelu"
BOTH = pytest.mark.parametrize("approximate", ["none", "tanh"])


def ours(approximate="none"):
    return lambda input, bias: ops.bias_gelu(input, bias, approximate)


def eager(approximate="none"):
    return lambda input, bias: F.gelu(input + bias, approximate=approximate)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 1), (1, 31), (2, 3, 65), (200, 24)], ids=str)
def test_error(backend, shape, dtype, approximate, check_contract):
    # 200 rows: the gradient of the bias is a long sum.
    make = lambda g: {"input": normal(g, *shape), "bias": normal(g, shape[-1])}  # noqa: E731
    check_contract(backend, ours(approximate), eager(approximate), make, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_sum_is_in_the_dtype_of_the_input(backend, dtype, check_contract):
    def of(function):
        return lambda input, bias: function(input, bias.to(torch.promote_types(bias.dtype, torch.float32)))

    make = lambda g: {"input": normal(g, 9, 24), "bias": normal(g, 24)}  # noqa: E731
    assert of(ours())(torch.randn(2, 4, dtype=dtype), torch.randn(4)).dtype == dtype
    check_contract(backend, of(ours()), eager(), make, dtype)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4), (0, 0)], ids=str)
def test_no_elements(backend, shape, device_of):
    x = torch.empty(shape, device=device_of(backend), requires_grad=True)
    b = torch.ones(shape[-1:], device=x.device, requires_grad=True)
    with backends.use(backend):
        out = ops.bias_gelu(x, b)
    dx, db = torch.autograd.grad(out.sum(), (x, b))
    assert out.shape == dx.shape == x.shape
    assert torch.equal(db, torch.zeros_like(b))


@BOTH
def test_gradcheck(approximate):
    g = torch.Generator().manual_seed(0)
    x, b = normal(g, 2, 3, 4, scale=2.0).requires_grad_(), normal(g, 4).requires_grad_()
    with backends.use("reference"):
        assert torch.autograd.gradcheck(ours(approximate), (x, b))
        torch.testing.assert_close(ours(approximate)(x, b), eager(approximate)(x, b))


@pytest.mark.parametrize(
    "layout", [lambda t: t, lambda t: t.t().contiguous().t()], ids=["contiguous", "transposed"]
)
def test_opcheck(kernel_backend, layout, device_of):
    x, dout = (layout(torch.randn(6, 8, device=device_of(kernel_backend))) for _ in range(2))
    b = torch.randn(8, device=x.device)
    torch.library.opcheck(bias_gelu_fwd, (x, b, "none", kernel_backend))
    torch.library.opcheck(bias_gelu_bwd, (dout, x, b, "tanh", kernel_backend))


@given(shape=st.lists(st.integers(1, 12), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_shape(backend, check_contract, shape, seed):
    make = lambda g: {"input": normal(g, *shape), "bias": normal(g, shape[-1])}  # noqa: E731
    check_contract(backend, ours(), eager(), make, torch.float32, seeds=range(seed, seed + 4))


test_any_shape.full_in_interpreter = True

x, b = torch.randn(3, 5), torch.randn(5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, b), TypeError, "input: expected a torch.Tensor, got NoneType"),
        ((x, None), TypeError, "bias: expected a torch.Tensor, got NoneType"),
        ((x.int(), b), RuntimeError, "input: expected a floating-point tensor, got dtype torch.int32"),
        ((x.sum(), b), RuntimeError, "input: expected at least one dimension, got a scalar"),
        ((x, b[:3]), RuntimeError, r"bias: expected shape \(5,\), got \(3,\)"),
        ((x, b.int()), RuntimeError, "bias: expected a floating-point tensor, got dtype torch.int32"),
        ((x, b.to("meta")), RuntimeError, "bias: expected the device of input, cpu, got meta"),
        ((x, b, "quick"), ValueError, "approximate: expected 'none' or 'tanh', got 'quick'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.bias_gelu(*arguments)
