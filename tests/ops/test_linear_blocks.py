"""Linear layers where the blocks of the CPU's kernels end, and what they share: bits, sums, scratch memory."""

import pytest
import torch
import torch.nn.functional as F

from pytorch_ext import backends, ops
from pytorch_ext.backends import cpu, kernel
from pytorch_ext.testing import normal

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="; ".join(backends.why_not("cpu", "linear")))

# Rows, inward, outward: sums of more than one block in each of the three products, items of several blocks and columns
# that more than one item has, tiles and vectors that are not full, and so many rows that all is laid out first.
SHAPES = [(100, 390, 210), (391, 9, 35), (4, 40, 790), (2101, 5, 19)]


@pytest.fixture(params=[1, 2, 5], ids=["1 thread", "2 threads", "more threads than items"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def inputs(generator, rows, inward, outward):
    return {
        "input": normal(generator, rows, inward),
        "weight": normal(generator, outward, inward, scale=inward**-0.5),
        "bias": normal(generator, outward),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_blocks_end(shape, dtype, threads, check_contract):
    check_contract("cpu", ops.linear, F.linear, lambda g: inputs(g, *shape), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_to_lay_matrices_out_gives_the_same_bits(shape, dtype, threads):
    """Kept for the next call or laid out for this one, by its own thread or for all: one order of the sums."""
    x, w, b = (t.to(dtype) for t in inputs(torch.Generator().manual_seed(0), *shape).values())
    dout = normal(torch.Generator().manual_seed(1), shape[0], shape[2]).to(dtype)
    forward, backward = (kernel("cpu", f"linear_{direction}") for direction in ("fwd", "bwd"))

    def results():
        return [
            *(forward(x, w, b, "none", False, frozen)[0] for frozen in (False, True)),
            *backward(dout, x, w, b, torch.empty(0), "none"),
        ]

    found = results()
    assert torch.equal(found[0], found[1])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(found, results(), strict=True))
