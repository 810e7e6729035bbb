"""Weights that the C++ of the CPU lays out for inference: the next product sees a weight as it is then."""

import gc

import pytest
import torch
from torch import nn

from pytorch_ext import backends, ops
from pytorch_ext.backends import cpu

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="; ".join(backends.why_not("cpu", "linear")))


@pytest.fixture
def weight():
    return nn.Parameter(torch.randn(40, 24, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def x():
    return torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


def product(x, weight):
    with torch.no_grad(), backends.use("cpu"):
        return ops.linear(x, weight)


def assert_current(x, weight):
    torch.testing.assert_close(product(x, weight), x @ weight.detach().T)


def refill(weight):
    """As FSDP does around each forward: the same Parameter, its storage resized, no version counted."""
    values = weight.detach() * 1.1
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
        weight.untyped_storage().resize_(0)
        weight.untyped_storage().resize_(values.nbytes)
        weight.copy_(values)


def one_step(weight):
    optimiser = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones_like(weight)
    optimiser.step()


CHANGES = {
    ".data.mul_": lambda w: w.data.mul_(1.1),
    ".data.copy_": lambda w: w.data.copy_(w.data.flip(0)),
    ".data assigned": lambda w: setattr(w, "data", w.detach() * 1.1),
    ".data transposed": lambda w: setattr(w, "data", w.detach().T.contiguous().T * 1.1),
    "numpy": lambda w: w.detach().numpy().__imul__(1.1),
    "in place": lambda w: nn.init.orthogonal_(w),
    "fused optimiser": one_step,
    "its storage freed and filled anew": refill,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(weight, x, change):
    assert_current(x, weight)
    before = weight.detach().clone()
    CHANGES[change](weight)
    assert not torch.equal(before, weight.detach())
    assert_current(x, weight)


def test_one_layout_for_each_weight_and_none_for_what_takes_a_gradient(weight, x):
    assert backends.layout_bytes([weight]) == 0
    with backends.use("cpu"):
        ops.linear(x, weight).sum().backward()
    assert backends.layout_bytes([weight]) == 0
    product(x, weight)
    size = backends.layout_bytes([weight])
    assert size >= weight.nbytes
    product(x, weight)
    assert backends.layout_bytes([weight]) == size


def test_dropped_when_asked_and_with_the_weight(weight, x):
    product(x, weight)
    backends.drop_layouts([weight])
    assert backends.layout_bytes([weight]) == 0
    product(x, weight)
    del weight
    gc.collect()
    for _ in range(20):  # one of these may lie where it lay
        assert_current(x, nn.Parameter(torch.randn(40, 24)))


def test_an_element_between_the_samples_needs_dropping(x):
    large = nn.Parameter(torch.randn(400, 24))
    assert_current(x, large)
    large.data.view(-1)[1] += 1.0
    backends.drop_layouts([large])
    assert_current(x, large)


def test_each_instruction_set_has_its_own(weight, x):
    library = cpu.library()
    before = library.isa()
    try:
        for name in (*library.isas(), *library.isas()):
            library.set_isa(name)
            assert_current(x, weight)
    finally:
        library.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_layout_of_a_narrow_weight_is_as_narrow(dtype, x):
    weight = nn.Parameter(torch.randn(64, 64, dtype=dtype))
    inputs = torch.randn(3, 64).to(dtype)
    result = product(inputs, weight)
    torch.testing.assert_close(result, inputs @ weight.detach().T)
    assert backends.layout_bytes([weight]) == weight.nbytes


def test_inference_mode_and_inference_tensors(x):
    with torch.inference_mode():
        weight = torch.randn(40, 24)
        for _ in range(2):
            assert_current(x, weight)
