"""The kernels that work row by row, where small tests do not go by themselves: rows wider than a block, many rows for
one program, runs of tokens over several chunks.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from pytorch_ext import backends, ops
from pytorch_ext.backends import kernel
from pytorch_ext.testing import REGIMES, assert_contract, normal

pytest.importorskip("triton", reason="the package triton is not installed")
from pytorch_ext.kernels.triton import _wide_norms, rows
from pytorch_ext.kernels.triton import dropout_add_layer_norm as add_norm_file
from pytorch_ext.kernels.triton import embedding_layer_norm as embedding_file
from pytorch_ext.kernels.triton import layer_norm as norm_file
from pytorch_ext.kernels.triton._table_gradient import CHUNK, table_gradient

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WHY_NOT = backends.why_not("triton", "layer_norm")
pytestmark = [
    pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu,
    pytest.mark.skipif(bool(WHY_NOT), reason="; ".join(WHY_NOT) or "-"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
RNG = (-(2**62) - 12345, 2**33 + 77)


@pytest.fixture
def narrow_blocks(monkeypatch):
    """Blocks of 16 columns, and rows in one block up to 32 only: what a width of 10,000 meets elsewhere."""
    for module in (norm_file, add_norm_file, embedding_file):
        monkeypatch.setattr(module, "WIDEST_FORWARD", 32)
        monkeypatch.setattr(module, "WIDEST_BACKWARD", 32)
    monkeypatch.setattr(rows, "STREAMED", 16)
    monkeypatch.setattr(_wide_norms, "STREAMED", 16)
    monkeypatch.setattr(_wide_norms, "COLS", 16)
    rows.block_of.cache_clear()
    yield
    rows.block_of.cache_clear()


def on_triton(function):
    def call(**tensors):
        with backends.use("triton"):
            result = function(**{name: t.to(DEVICE) for name, t in tensors.items()})
        return tuple(t.cpu() for t in result) if isinstance(result, tuple) else result.cpu()

    return call


def norm(input, weight=None, bias=None):
    return ops.layer_norm(input, input.shape[-1:], weight, bias)


def eager_norm(input, weight=None, bias=None):
    return F.layer_norm(input, input.shape[-1:], weight, bias)


def add_norm(input, residual, weight, bias=None, input_bias=None):
    return ops.dropout_add_layer_norm(input, residual, weight, bias, input_bias=input_bias, prenorm=True)


def eager_add_norm(input, residual, weight, bias=None, input_bias=None):
    sum = residual + (input if input_bias is None else input + input_bias)
    return F.layer_norm(sum, sum.shape[-1:], weight, bias), sum


@pytest.mark.parametrize("regime", ["normal", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "parameters", [(), ("weight",), ("bias",), ("weight", "bias")], ids=lambda p: "+".join(p) or "none"
)
def test_layer_norm_of_rows_wider_than_a_block(narrow_blocks, parameters, dtype, regime):
    def make(g):
        made = {"input": normal(g, 11, 53, **REGIMES[regime])}
        return made | {name: normal(g, 53) for name in parameters}

    assert_contract(on_triton(norm), eager_norm, make, dtype)


test_layer_norm_of_rows_wider_than_a_block.full_in_interpreter = lambda dtype, regime: (
    dtype == torch.bfloat16 and regime == "offset"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", [("weight",), ("weight", "bias", "input_bias")], ids="+".join)
def test_add_norm_of_rows_wider_than_a_block(narrow_blocks, parameters, dtype):
    def make(g):
        made = {name: normal(g, 11, 53) for name in ("input", "residual")}
        return made | {name: normal(g, 53) for name in parameters}

    assert_contract(on_triton(add_norm), eager_add_norm, make, dtype)


# Where float32 is right, bfloat16 differs in loads and stores alone.
test_add_norm_of_rows_wider_than_a_block.full_in_interpreter = lambda dtype: dtype == torch.bfloat16


def _embedding_inputs(g, entries=7, tokens=(2, 5), hidden=53):
    return {
        "ids": torch.randint(entries, tokens, generator=g),
        "word": normal(g, entries, hidden),
        "weight": normal(g, hidden),
    }


def embedding(ids, word, weight):
    return ops.embedding_layer_norm(ids, None, None, word, None, None, weight, None, eps=1e-5)


def eager_embedding(ids, word, weight):
    return F.layer_norm(F.embedding(ids, word), word.shape[-1:], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embedding_of_rows_wider_than_a_block(narrow_blocks, dtype):
    assert_contract(on_triton(embedding), eager_embedding, _embedding_inputs, dtype)


@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_wide_rows_drop_what_the_reference_drops(narrow_blocks, dropout_p):
    """In each pass over the row, in backward, and in embeddings, by where the results are zero."""
    g = torch.Generator().manual_seed(0)
    rng = torch.tensor(RNG, device=DEVICE)
    x, weight = torch.ones(5, 70, device=DEVICE), torch.ones(70, device=DEVICE)
    dout, dsum = (normal(g, 5, 70).float().to(DEVICE) for _ in range(2))
    ids, word = torch.arange(5, device=DEVICE), normal(g, 5, 70).float().to(DEVICE)
    found = {}
    for name in ("triton", "reference"):
        fwd = kernel(name, "dropout_add_layer_norm_fwd")(x, 0 * x, weight, None, None, rng, dropout_p, 1e-5)
        bwd = kernel(name, "dropout_add_layer_norm_bwd")(
            dout, dsum, fwd[1], x, x, weight, None, weight, *fwd[2:], rng, dropout_p
        )
        out, mean, rstd = kernel(name, "embedding_layer_norm_fwd")(
            ids, None, None, word, None, None, weight, None, rng, dropout_p, 1e-5
        )
        tables = kernel(name, "embedding_layer_norm_bwd")(
            dout, ids, None, None, word, None, None, weight, None, mean, rstd, rng, dropout_p, -1
        )
        found[name] = [fwd[1], bwd[0], bwd[1], bwd[4], out, tables[0]]
    for ours, reference in zip(found["triton"], found["reference"], strict=True):
        assert torch.equal(ours == 0, reference == 0)
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("ours", "eager", "names"),
    [(norm, eager_norm, ("weight", "bias")), (add_norm, eager_add_norm, ("weight", "bias", "input_bias"))],
    ids=["layer_norm", "add_norm"],
)
def test_programs_that_have_many_rows(ours, eager, names, dtype):
    """More rows than programs, and a last round that is not full: the gradients of parameters are long sums."""

    def make(g):
        made = {
            name: normal(g, 203, 24) for name in (("input", "residual") if ours is add_norm else ("input",))
        }
        return made | {name: normal(g, 24) for name in names}

    assert_contract(on_triton(ours), eager, make, dtype)


test_programs_that_have_many_rows.full_in_interpreter = lambda dtype: dtype == torch.bfloat16


def test_a_grid_is_never_larger_than_its_work():
    like = torch.empty(0, device=DEVICE)
    for blocks in (1, 3, 1000):
        for num_warps in (1, 4, 16):
            assert 1 <= rows.programs(like, blocks, num_warps) <= blocks


RUNS = {
    "each once": list(range(40)),
    "one run over all chunks": [3] * (5 * CHUNK + 3),
    "a run that ends with a chunk": [1] * CHUNK + [2] * CHUNK + [5],
    "a run that begins within one chunk and ends within another": [0] * 5 + [4] * (2 * CHUNK) + [6] * 9,
    "runs that meet at the edges": [0] * (CHUNK - 1) + [1] * 2 + [2] * (2 * CHUNK - 2) + [3] * 2,
    "more chunks than are added up at a time": [7] * (20 * CHUNK) + [8],
    "one token": [2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("runs", RUNS)
def test_the_gradient_of_a_table(runs, dtype):
    g = torch.Generator().manual_seed(0)
    ids = torch.tensor(RUNS[runs])[torch.randperm(len(RUNS[runs]), generator=g)]
    dx, table = normal(g, len(ids), 12), torch.zeros(50, 12, dtype=dtype)
    expected = torch.zeros(50, 12, dtype=torch.float64).index_add_(0, ids, dx.float().double())
    given = dx.float().to(DEVICE), ids.to(DEVICE), table.to(DEVICE)
    found = table_gradient(*given)
    assert found.dtype == dtype and torch.equal(found, table_gradient(*given))
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype] * expected.abs().max().clamp(min=1)
    assert (found.cpu().double() - expected).abs().max() <= tolerance
    skipped = table_gradient(*given, skipped=int(ids[0]))
    assert not skipped[ids[0]].any()
    skipped[ids[0]] = found[ids[0]]
    assert torch.equal(skipped, found)


def test_ids_that_are_not_in_a_table_touch_nothing():
    """On a GPU nobody looks at the ids beforehand."""
    ids = torch.tensor([-1, 2, 5, 2, 900], device=DEVICE)
    word = torch.randn(5, 8, device=DEVICE)
    arguments = (ids, None, None, word, None, None, torch.ones(8, device=DEVICE), None)
    out = kernel("triton", "embedding_layer_norm_fwd")(*arguments, None, 0.0, 1e-5)[0]
    assert out.isnan().all(-1).tolist() == [True, False, True, False, True]
    dx = torch.randn(5, 8, device=DEVICE)
    found = table_gradient(dx, ids, word)
    assert found.any(-1).tolist() == [False, False, True, False, False]
    torch.testing.assert_close(found[2], dx[1] + dx[3])


OPS = {
    "layer_norm": (norm, [(70, 24), (24,), (24,)]),
    "add_norm": (add_norm, [(70, 24), (70, 24), (24,), (24,), (24,)]),
    "bias_gelu": (ops.bias_gelu, [(70, 24), (24,)]),
    "linear": (lambda x, w, b: ops.linear(x, w, b, "gelu"), [(70, 24), (40, 24), (40,)]),
    "embedding": (lambda word, w: embedding(torch.arange(70, device=DEVICE) % 9, word, w), [(9, 24), (24,)]),
}


@pytest.mark.parametrize("name", OPS)
def test_backward_repeats_bit_for_bit(name):
    function, shapes = OPS[name]
    g = torch.Generator().manual_seed(0)
    leaves = [normal(g, *shape).float().to(DEVICE).requires_grad_() for shape in shapes]

    def run():
        with backends.use("triton"):
            out = function(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out.square().sum(), leaves)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
