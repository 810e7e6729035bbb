"""Every op under torch.compile: the whole graph, dynamic shapes, the same result and the same kernel."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pytorch_ext import backends, ops

OP = "scaled_dot_product_attention"  # of the one test that is about no case
ONE_OF_EACH_OP = (
    "layer_norm",
    "prenorm",
    "gelu",
    "bias_gelu",
    "linear_gelu",
    "embedding",
    "attention",
    "varlen",
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def results(function, tensors) -> list[torch.Tensor]:
    """The outputs, and the gradients of their sum of squares if there are any."""
    out = function(**tensors)
    outs = out if isinstance(out, tuple) else (out,)
    leaves = [t for t in tensors.values() if t.requires_grad]
    if not leaves:
        return list(outs)
    return [*outs, *torch.autograd.grad(sum(t.square().sum() for t in outs), leaves)]


def test_equals_the_uncompiled_function(case, backend, inputs_of, check_contract):
    equals_the_uncompiled_function(case, backend, True, inputs_of, check_contract)


# A compilation takes a second or two: one per op, and one more for the attention that has no mask.
test_equals_the_uncompiled_function.cases = (*ONE_OF_EACH_OP, "causal")


def test_equals_the_uncompiled_function_without_gradients(case, backend, inputs_of, check_contract):
    equals_the_uncompiled_function(case, backend, False, inputs_of, check_contract)


test_equals_the_uncompiled_function_without_gradients.cases = ONE_OF_EACH_OP


def equals_the_uncompiled_function(case, backend, gradients, inputs_of, check_contract):
    function = compiled(case.ours)
    check_contract(backend, function, case.eager, case.make, case.dtype, gradients=gradients)
    if backend != "native":  # one kernel ran, whoever called it, so the bits are the same too
        tensors = inputs_of(case, backend, grad=gradients)
        with backends.use(backend):
            pairs = zip(results(function, tensors), results(case.ours, tensors), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_one_tensor_twice(kernel_backend, device_of):
    """Self-attention of a single tensor: eager autograd takes it, Dynamo alone does not."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, device=device_of(kernel_backend), requires_grad=True)
    call = lambda x: ops.scaled_dot_product_attention(x, x, x, x[..., :4])  # noqa: E731
    with backends.use(kernel_backend):
        # Not bit for bit: its four gradients may be added up in another order.
        torch.testing.assert_close(results(compiled(call), {"x": x}), results(call, {"x": x}))


def test_inductor(case, kernel_backend, check_contract):
    """`native` hands Inductor PyTorch's own ops, which are PyTorch's to test.

    But for varlen attention, where it takes a way of its own for compilers: test_varlen_attention.
    """
    check_contract(kernel_backend, compiled(case.ours, "inductor"), case.eager, case.make, case.dtype)


test_inductor.cases = ONE_OF_EACH_OP
test_inductor.full_in_interpreter = True


def test_another_backend_is_compiled_anew(case, kernel_backend, inputs_of):
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(case.ours, counter)
    tensors = inputs_of(case, kernel_backend)
    raw_op = f"pytorch_ext.{case.op}_fwd"
    for name in ("native", kernel_backend):
        with backends.use(name):
            function(**tensors)
        assert (raw_op in str(counter.graphs[-1].graph)) == (name == kernel_backend)
    count = counter.frame_count
    for name in ("native", kernel_backend, "native"):
        with backends.use(name):
            function(**tensors)
    assert counter.frame_count == count, "both versions are kept"


# The choice is the same few lines in every op.
test_another_backend_is_compiled_anew.cases = ("layer_norm", "attention")


def test_what_auto_takes_is_compiled(case, kernel_backend, inputs_of, monkeypatch):
    tensors = inputs_of(case, kernel_backend)
    monkeypatch.setitem(backends._auto.FASTEST, (case.op, device_key(tensors)), kernel_backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled(case.ours, counter)(**tensors)
    assert f"pytorch_ext.{case.op}_fwd" in str(counter.graphs[-1].graph)


test_what_auto_takes_is_compiled.cases = ("gelu", "varlen")


def device_key(tensors) -> str:
    device = next(iter(tensors.values())).device
    if device.type == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
