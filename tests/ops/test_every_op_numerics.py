"""Every op, both directions, against float64: the error is that of eager PyTorch or about it."""

import pytest
import torch

from pytorch_ext import backends
from pytorch_ext.testing import REGIMES, SEEDS


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_that_of_eager(case, backend, dtype, regime, check_contract):
    make = lambda g: case.make(g, **REGIMES[regime])  # noqa: E731
    check_contract(backend, case.ours, case.eager, make, dtype, seeds=SEEDS)


test_error_is_at_most_that_of_eager.full_in_interpreter = lambda case, dtype: (
    dtype == torch.float16 and "attention" in case.op
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_shapes_are_those_of_eager(case, backend, dtype, inputs_of):
    tensors = inputs_of(case, backend, dtype)
    expected = case.eager(**tensors)
    with backends.use(backend):
        found = case.ours(**tensors)
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    assert all((a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device) for a, b in pairs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device that PyTorch can use")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_on_a_gpu(case, dtype, check_contract):
    """There it takes other ways than on the CPU: for varlen attention, and for parameters in float32."""
    check_contract("native", case.ours, case.eager, case.make, dtype, device="cuda")
