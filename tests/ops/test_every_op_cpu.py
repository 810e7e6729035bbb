"""What is particular to the kernels of the CPU: every instruction set that the processor has, and several threads."""

import pytest
import torch
from torch import Tensor

from pytorch_ext import backends, ops
from pytorch_ext.backends import cpu, kernel
from pytorch_ext.testing import REGIMES, cumulative, normal, padding_mask

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="; ".join(backends.why_not("cpu", "gelu")))

ISAS = cpu.library().isas() if cpu.library() else []


@pytest.fixture(params=ISAS)
def isa(request):
    before = cpu.isa()
    cpu.library().set_isa(request.param)
    yield request.param
    cpu.library().set_isa(before)


@pytest.mark.parametrize("regime", ["normal", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_contract_holds_with_every_instruction_set(isa, case, dtype, regime, check_contract):
    check_contract("cpu", case.ours, case.eager, lambda g: case.make(g, **REGIMES[regime]), dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 1.0])
def test_every_instruction_set_drops_the_same(isa, dropout_p):
    rng = torch.tensor([-(2**62) - 5, 2**33 + 7])
    x, weight = torch.ones(37, 131), torch.ones(131)
    args = (x, torch.zeros_like(x), weight, None, None, rng, dropout_p, 1e-5)
    sums = [kernel(name, "dropout_add_layer_norm_fwd")(*args)[1] for name in ("cpu", "reference")]
    assert torch.equal(*sums)
    # Equal scores, and one value for each key: the weights themselves come out.
    query, key, value = torch.zeros(2, 3, 37, 8), torch.zeros(2, 3, 71, 8), torch.eye(71).expand(2, 3, 71, 71)
    args = (query, key, value, None, rng, dropout_p, False, 1.0)
    ours, reference = (
        kernel(name, "scaled_dot_product_attention_fwd")(*args)[0] for name in ("cpu", "reference")
    )
    assert torch.equal(ours == 0, reference == 0)


# --- Sizes that are shared among threads ---


def _attention(query, key, value):
    mask = padding_mask((150, 70, 33), 150)[:, None, None, :]
    return ops.scaled_dot_product_attention(query, key, value, mask)


def _varlen(query, key, value):
    ends = cumulative((40, 100, 3, 157))
    return ops.varlen_attention(query, key, value, ends, ends, 157, 157)


ROWS, COLS = 300, 512
CALLS = {
    "layer_norm": (lambda x, w, b: ops.layer_norm(x, (COLS,), w, b), [(ROWS, COLS), (COLS,), (COLS,)]),
    "dropout_add_layer_norm": (
        lambda x, y, w, b: ops.dropout_add_layer_norm(x, y, w, b),
        [(ROWS, COLS), (ROWS, COLS), (COLS,), (COLS,)],
    ),
    "gelu": (ops.gelu, [(ROWS, COLS)]),
    "bias_gelu": (ops.bias_gelu, [(ROWS, COLS), (COLS,)]),
    "linear": (
        lambda x, w, b: ops.linear(x, w, b, "gelu"),
        [(ROWS, COLS), (700, COLS), (700,)],
    ),
    "embedding_layer_norm": (
        lambda word, w, b: ops.embedding_layer_norm(
            torch.arange(ROWS).reshape(3, 100) % 77, None, None, word, None, None, w, b, eps=1e-12
        ),
        [(77, COLS), (COLS,), (COLS,)],
    ),
    "scaled_dot_product_attention": (_attention, [(3, 4, 150, 64)] * 3),
    "varlen_attention": (_varlen, [(ROWS, 4, 64)] * 3),
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(name: str, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of one call."""
    function, shapes = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    leaves = [normal(generator, *shape).to(dtype).requires_grad_() for shape in shapes]
    with backends.use("cpu"):
        out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, normal(generator, *out.shape).to(dtype))]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_threads_compute_what_one_does_and_repeat_it(name, dtype, threads):
    threads(1)
    alone = run(name, dtype)
    threads(2)
    first, second = run(name, dtype), run(name, dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for a, b in zip(alone, first, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_several_threads_may_call_at_once(name, threads):
    """Autograd's threads, or a server's: scratch memory belongs to one thread alone."""
    from concurrent.futures import ThreadPoolExecutor

    threads(1)
    expected = run(name, torch.float32)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: run(name, torch.float32), range(8)):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
