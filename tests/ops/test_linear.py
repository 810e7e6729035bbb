import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pytorch_ext import backends, ops
from pytorch_ext.ops.linear import linear_bwd, linear_fwd
from pytorch_ext.testing import normal

OP = "linear"
ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
EVERY = pytest.mark.parametrize("activation", ACTIVATIONS)


def ours(activation):
    return lambda input, weight, bias=None: ops.linear(input, weight, bias, activation)


def eager(activation):
    return lambda input, weight, bias=None: ACTIVATIONS[activation](F.linear(input, weight, bias))


def inputs(generator, rows=(4,), fan_in=24, fan_out=17, bias=True):
    made = {
        "input": normal(generator, *rows, fan_in),
        "weight": normal(generator, fan_out, fan_in, scale=max(fan_in, 1) ** -0.5),
    }
    return made | {"bias": normal(generator, fan_out)} if bias else made


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error(backend, activation, dtype, check_contract):
    check_contract(backend, ours(activation), eager(activation), inputs, dtype)


# A vector, one row, one column on either side, odd sizes, a sum long enough for a bfloat16 accumulator to fail.
SHAPES = [
    ((), 8, 3),
    ((1,), 1, 1),
    ((3,), 1, 5),
    ((2, 3), 5, 1),
    ((7,), 33, 65),
    ((2, 1, 3), 24, 16),
    ((3,), 3072, 8),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "fan_in", "fan_out"), SHAPES, ids=str)
def test_shapes(backend, rows, fan_in, fan_out, dtype, check_contract):
    make = lambda g: inputs(g, rows, fan_in, fan_out)  # noqa: E731
    check_contract(backend, ours("gelu"), eager("gelu"), make, dtype)


def test_without_a_bias(backend, check_contract):
    check_contract(backend, ours("relu"), eager("relu"), lambda g: inputs(g, bias=False), torch.float32)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_inputs_are_left_alone(backend, activation, device_of):
    # An activation may be written over the product, and over nothing else.
    tensors = {name: t.to(device_of(backend), torch.float32) for name, t in inputs(torch.Generator()).items()}
    copies = {name: t.clone() for name, t in tensors.items()}
    with backends.use(backend):
        ours(activation)(**tensors)
    assert all(torch.equal(t, copies[name]) for name, t in tensors.items())


@EVERY
@pytest.mark.parametrize(
    ("rows", "fan_in", "fan_out"), [((0,), 5, 3), ((2, 0), 5, 3), ((3,), 0, 4), ((3,), 5, 0)]
)
def test_no_elements(backend, rows, fan_in, fan_out, activation, device_of):
    made = inputs(torch.Generator().manual_seed(0), rows, fan_in, fan_out)
    leaves = [t.to(device_of(backend), torch.float32).requires_grad_() for t in made.values()]
    with backends.use(backend):
        out = ours(activation)(*leaves)
    expected = eager(activation)(*leaves)
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out.sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), leaves))


@EVERY
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_gradcheck(activation, bias):
    leaves = [
        t.requires_grad_() for t in inputs(torch.Generator().manual_seed(0), (2, 3), 5, 4, bias).values()
    ]
    with backends.use("reference"):
        assert torch.autograd.gradcheck(ours(activation), leaves)
        torch.testing.assert_close(ours(activation)(*leaves), eager(activation)(*leaves))


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize(
    "layout", [lambda t: t, lambda t: t.t().contiguous().t()], ids=["contiguous", "transposed"]
)
def test_opcheck(kernel_backend, layout, activation, device_of):
    made = inputs(torch.Generator().manual_seed(0), (6,), 8, 4)
    x, w, b = (t.to(device_of(kernel_backend), torch.float32) for t in made.values())
    x, w, dout = layout(x), layout(w), layout(torch.randn(6, 4, device=x.device))
    keep = activation != "none"
    b = b if keep else None
    torch.library.opcheck(linear_fwd, (x, w, b, activation, keep, False, kernel_backend))
    _, preactivation = linear_fwd(x, w, b, activation, keep, False, kernel_backend)
    torch.library.opcheck(linear_bwd, (dout, x, w, b, preactivation, activation, kernel_backend))


@given(
    rows=st.lists(st.integers(1, 5), max_size=3),
    fan_in=st.integers(1, 40),
    fan_out=st.integers(1, 40),
    activation=st.sampled_from([None, "gelu_tanh"]),
    seed=st.integers(0, 99),
)
def test_any_shape(backend, check_contract, rows, fan_in, fan_out, activation, seed):
    make = lambda g: inputs(g, rows, fan_in, fan_out)  # noqa: E731
    seeds = range(seed, seed + 4)
    check_contract(backend, ours(activation), eager(activation), make, torch.float32, seeds=seeds)


x, w, b = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((x.numpy(), w), TypeError, "input: expected a torch.Tensor, got ndarray"),
        ((x, None), TypeError, "weight: expected a torch.Tensor, got NoneType"),
        ((x, w, 0.0), TypeError, "bias: expected a torch.Tensor, got float"),
        ((x.long(), w), RuntimeError, "input: expected a floating-point tensor, got dtype torch.int64"),
        (
            (x, w[0]),
            RuntimeError,
            r"weight: expected 2 dimensions \(out_features, in_features\), got shape \(5,\)",
        ),
        ((x[:, :4], w), RuntimeError, r"input: expected shape \(\*, 5\), got \(3, 4\)"),
        ((x.sum(), w), RuntimeError, r"input: expected shape \(\*, 5\), got \(\)"),
        ((x, w, b[:3]), RuntimeError, r"bias: expected shape \(4,\), got \(3,\)"),
        (
            (x, w.half()),
            RuntimeError,
            "weight: expected the dtype of input, torch.float32, got torch.float16",
        ),
        (
            (x, w, b.double()),
            RuntimeError,
            "bias: expected the dtype of input, torch.float32, got torch.float64",
        ),
        ((x, w.to("meta")), RuntimeError, "weight: expected the device of input, cpu, got meta"),
        ((x, w, b.to("meta")), RuntimeError, "bias: expected the device of input, cpu, got meta"),
        ((x, w, b, "silu"), ValueError, r"activation: expected one of \(None, 'relu', .*\), got 'silu'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.linear(*arguments)
