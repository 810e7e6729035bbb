"""The machine that csrc/cuda runs on in tests: it does what CUDA says, and what CUDA leaves undefined is an error."""

from pathlib import Path

import pytest
import torch

FAULTS = {
    "no barrier": (1, None),
    "a barrier that a warp does not come to": (
        2,
        r"block \(0, 0, 0\), thread \(0, 0, 0\) waits in __syncthreads \(machine.cu:\d+\)",
    ),
    "a shuffle that a lane does not come to": (
        3,
        r"waits in __shfl_xor_sync \(machine.cu:\d+\), and not all",
    ),
    "copies that are not waited for": (4, "ends before it has waited for its cp.async"),
    "a write behind shared memory": (5, "behind its shared memory"),
    "a copy to no multiple of 16 bytes": (6, r"a cp.async of 16 bytes to or from an address"),
}


@pytest.fixture
def machine(builder):
    torch.ops.load_library(str(builder.build("machine", Path(__file__).parent)))
    return getattr(torch.ops, builder.NAMESPACE)


@pytest.mark.parametrize("transposed", [False, True])
def test_products_by_fragments(machine, order, transposed):
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    out = machine.machine_product(a, b.t().contiguous() if transposed else b, transposed)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_threads_meet_in_every_order(machine, order):
    x = torch.randn(96)
    assert torch.equal(machine.machine_reversed(x, 0), x.flip(0))


@pytest.mark.parametrize("negative", [None, 0, 40, 95])
def test_a_barrier_that_asks(machine, order, negative):
    x = torch.ones(96)
    if negative is not None:
        x[negative] = -1.0
    assert machine.machine_any_negative(x).tolist() == [negative is not None] * 96


@pytest.mark.parametrize("fault", [name for name, (_, message) in FAULTS.items() if message])
def test_what_is_undefined_is_an_error(machine, order, fault):
    number, message = FAULTS[fault]
    with pytest.raises(RuntimeError, match=rf"reverse_kernel.*{message}"):
        machine.machine_reversed(torch.randn(96), number)


def test_a_missing_barrier_shows(machine, order):
    x = torch.randn(96)
    assert not torch.equal(machine.machine_reversed(x, FAULTS["no barrier"][0]), x.flip(0))


def test_an_unknown_order_is_refused(machine, monkeypatch):
    monkeypatch.setenv("CUDA_HOST_ORDER", "sideways")
    with pytest.raises(RuntimeError, match="expected ascending, descending or shuffled, got sideways"):
        machine.machine_reversed(torch.randn(32), 0)


def test_powers_of_two_without_the_unit_for_them(machine):
    """To 3e-6, far below what bfloat16 and float16 keep of a weight; 0 where float32 has no normal numbers left."""
    x = torch.linspace(-126.4, 17.0, 40_001)
    exact = torch.exp2(x.double())
    assert ((machine.machine_power(x) - exact).abs() <= 3e-6 * exact).all()
    ends = torch.tensor([-126.6, -127.0, -3e38, -torch.inf, torch.nan])
    assert machine.machine_power(ends).tolist()[:4] == [0.0] * 4
    assert machine.machine_power(ends)[4].isnan()
