import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pytorch_ext import backends, ops
from pytorch_ext.ops.dropout_add_layer_norm import dropout_add_layer_norm_bwd, dropout_add_layer_norm_fwd
from pytorch_ext.testing import normal

OP = "dropout_add_layer_norm"
ALL = ("weight", "bias", "input_bias")


def inputs(generator, shape=(5, 33), parameters=ALL, **regime):
    made = {name: normal(generator, *shape, **regime) for name in ("input", "residual")}
    return made | {name: normal(generator, shape[-1]) for name in parameters}


def ours(input, residual, weight, **options):
    return ops.dropout_add_layer_norm(input, residual, weight, **options)


def eager(input, residual, weight, bias=None, input_bias=None, prenorm=False, eps=1e-5):
    sum = residual + (input if input_bias is None else input + input_bias)
    out = F.layer_norm(sum, sum.shape[-1:], weight, bias, eps)
    return (out, sum) if prenorm else out


def of(function, **options):
    return lambda **tensors: function(**tensors, **options)


@pytest.mark.parametrize("prenorm", [False, True], ids=["out", "prenorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "parameters", [("weight",), ("weight", "bias"), ("weight", "input_bias")], ids="+".join
)
def test_parameters(backend, parameters, dtype, prenorm, check_contract):
    make = lambda g: inputs(g, parameters=parameters)  # noqa: E731
    check_contract(backend, of(ours, prenorm=prenorm), of(eager, prenorm=prenorm), make, dtype)


@pytest.mark.parametrize("shape", [(1, 1), (1,), (3, 7), (2, 2, 65), (2, 768), (2, 5001)], ids=str)
def test_shapes(backend, shape, check_contract):
    check_contract(backend, ours, eager, lambda g: inputs(g, shape), torch.float32)


@pytest.mark.parametrize("wide", ["input", "residual"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_input_and_residual_of_two_dtypes(backend, dtype, wide, check_contract):
    """A residual stream in float32 beside half-precision layers, with parameters in either."""

    def of(function, to_dtype=None):
        def call(prenorm=True, **tensors):
            tensors[wide] = tensors[wide].to(torch.promote_types(tensors[wide].dtype, torch.float32))
            for name in ("weight", "bias") if wide == "input" or to_dtype else ():
                tensors[name] = tensors[name].to(torch.promote_types(tensors[name].dtype, torch.float32))
            out, sum = function(**tensors, prenorm=True)
            assert out.dtype == sum.dtype == tensors[wide].dtype
            return out, sum

        return call

    check_contract(backend, of(ours), of(eager, to_dtype=torch.float32), inputs, dtype)


def test_eps(backend, check_contract):
    check_contract(backend, of(ours, eps=0.3), of(eager, eps=0.3), inputs, torch.float32)


def test_eval_drops_nothing(backend, check_contract):
    check_contract(backend, of(ours, dropout_p=0.5, training=False), eager, inputs, torch.float32)


@pytest.mark.parametrize("used", [0, 1], ids=["out", "sum"])
def test_one_output_of_two_is_used(backend, used, check_contract):
    """The gradient of the other one is then not zeros but absent."""

    def of(function):
        return lambda **tensors: function(**tensors, prenorm=True)[used]

    check_contract(backend, of(ours), of(eager), inputs, torch.float32)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_no_elements(backend, shape, device_of):
    made = inputs(torch.Generator().manual_seed(0), shape)
    leaves = {n: t.to(device_of(backend), torch.float32).requires_grad_() for n, t in made.items()}
    with backends.use(backend):
        out, sum = ours(**leaves, prenorm=True, dropout_p=0.5)
    found = torch.autograd.grad((out.sum(), sum.sum()), list(leaves.values()))
    assert out.shape == sum.shape == shape
    for name, gradient in zip(leaves, found, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaves[name]))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("prenorm", [False, True], ids=["out", "prenorm"])
@pytest.mark.parametrize("parameters", [("weight",), ALL], ids="+".join)
def test_gradcheck(parameters, prenorm, dropout_p, fixed_rng):
    fixed_rng(1, 2)
    made = inputs(torch.Generator().manual_seed(0), (2, 3, 5), parameters)
    leaves = [t.requires_grad_() for t in made.values()]

    def call(*values):
        return ours(**dict(zip(made, values, strict=True)), prenorm=prenorm, dropout_p=dropout_p)

    with backends.use("reference"):
        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("full", [True, False], ids=["full", "plain"])
@pytest.mark.parametrize(
    "layout", [lambda t: t, lambda t: t.t().contiguous().t()], ids=["contiguous", "transposed"]
)
def test_opcheck(kernel_backend, layout, full, device_of):
    device = device_of(kernel_backend)
    x, residual, dout, dsum = (layout(torch.randn(6, 8, device=device)) for _ in range(4))
    w, b, input_bias = torch.randn(3, 8, device=device).unbind()
    rng, p = torch.tensor([3, 4], device=device), 0.5
    if not full:
        b = input_bias = dsum = rng = None
        p = 0.0
    forward = (x, residual, w, b, input_bias, rng, p, 1e-5, kernel_backend)
    torch.library.opcheck(dropout_add_layer_norm_fwd, forward)
    _, sum, mean, rstd = dropout_add_layer_norm_fwd(*forward)
    backward = (dout, dsum, sum, x, residual, w, b, input_bias, mean, rstd, rng, p, kernel_backend)
    torch.library.opcheck(dropout_add_layer_norm_bwd, backward)


@given(rows=st.lists(st.integers(1, 5), max_size=3), cols=st.integers(1, 70), seed=st.integers(0, 99))
def test_any_shape(backend, check_contract, rows, cols, seed):
    make = lambda g: inputs(g, (*rows, cols))  # noqa: E731
    check_contract(backend, ours, eager, make, torch.float32, seeds=range(seed, seed + 4))


test_any_shape.full_in_interpreter = True

x, w = torch.randn(3, 5), torch.randn(5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], x, w), {}, TypeError, "input: expected a torch.Tensor, got list"),
        ((x, None, w), {}, TypeError, "residual: expected a torch.Tensor, got NoneType"),
        ((x, x, None), {}, TypeError, "weight: expected a torch.Tensor, got NoneType"),
        ((x, x, w, "b"), {}, TypeError, "bias: expected a torch.Tensor, got str"),
        ((x.int(), x, w), {}, RuntimeError, "input: expected a floating-point tensor, got dtype torch.int32"),
        (
            (x, x.bool(), w),
            {},
            RuntimeError,
            "residual: expected a floating-point tensor, got dtype torch.bool",
        ),
        ((x.sum(), x.sum(), w), {}, RuntimeError, r"input: expected shape \(\*, hidden\), got a scalar"),
        ((x, x[:1], w), {}, RuntimeError, r"residual: expected shape \(3, 5\), got \(1, 5\)"),
        ((x, x.to("meta"), w), {}, RuntimeError, "residual: expected the device of input, cpu, got meta"),
        ((x, x, w[:2]), {}, RuntimeError, r"weight: expected shape \(5,\), got \(2,\)"),
        (
            (x, x, w, w.half()),
            {},
            RuntimeError,
            "bias: expected the dtype of input, torch.float32, got torch.float16",
        ),
        ((x, x, w, w.to("meta")), {}, RuntimeError, "bias: expected the device of input, cpu, got meta"),
        (
            (x, x, w),
            {"input_bias": w[None]},
            RuntimeError,
            r"input_bias: expected shape \(5,\), got \(1, 5\)",
        ),
        (
            (x, x, w),
            {"dropout_p": 1.1},
            ValueError,
            "dropout_p: expected a probability between 0 and 1, got 1.1",
        ),
        ((x, x, w), {"dropout_p": -0.1}, ValueError, "dropout_p: expected a probability .* got -0.1"),
        ((x, x, w), {"dropout_p": float("nan")}, ValueError, "dropout_p: expected a probability .* got nan"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.dropout_add_layer_norm(*arguments, **options)
