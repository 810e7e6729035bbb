"""The kernels of csrc/cuda that work row by row, on the CPU: the tests of their ops, and what those do not ask."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEMS = ("bias_gelu", "dropout_add_layer_norm", "embedding_layer_norm", "gelu", "layer_norm")


def run_op_tests(
    stems, files, order="shuffled", sources=None, *arguments, **environment
) -> subprocess.CompletedProcess:
    """Runs tests/ops/test_<file>.py with the backend `cuda`, of which these stems are loaded."""
    paths = [f"tests/ops/test_{file}.py" for file in files]
    environment |= {"CUDA_HOST_STEMS": " ".join(stems), "PYTHONPATH": str(HERE)}
    return run_tests(paths, order, sources, "-p", "plugin", *arguments, **environment)


def run_tests(paths, order, sources, *arguments, **environment) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        **({"CUDA_HOST_SOURCES": str(sources)} if sources else {}),
        "CUDA_HOST_ORDER": order,
        **environment,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, *paths]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def assert_passed(done: subprocess.CompletedProcess, at_least: int) -> None:
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least, done.stdout[-500:]


def test_the_tests_of_the_ops(builder):
    """Against float64 in every regime and dtype, on sizes that are odd and empty."""
    assert_passed(run_op_tests(STEMS, [*STEMS, "every_op_numerics"], "shuffled", None, "-m", "not full"), 200)


@pytest.mark.full
def test_the_tests_of_a_layer(builder):
    stems = ("bias_gelu", "encoder_layer", "varlen_attention")  # what it calls, the last for bfloat16 alone
    assert_passed(run_op_tests(stems, ["encoder_layer"], "shuffled", None, "-k", "bfloat16 or tokens"), 5)


@pytest.mark.long
def test_the_tests_of_attention(builder):
    """Those that a GPU runs too; on the CPU not all of its kernels are compiled, and few for float16."""
    files = [f"every_op_{what}" for what in ("numerics", "layouts", "autograd", "autocast", "dropout")]
    chosen = ("-m", "not full", "-k", "not torch.float16")
    assert_passed(run_op_tests(("attention", "varlen_attention"), files, "descending", None, *chosen), 80)


@pytest.mark.long
def test_in_another_order(builder):
    """In every layout too, and far past 32 bits."""
    files = [*STEMS, "every_op_numerics", "every_op_layouts", "every_op_dropout"]
    assert_passed(run_op_tests(STEMS, files, "descending"), 300)


@pytest.mark.long
def test_compiled_and_differentiated(builder):
    files = ["linear", "every_op_autocast", "every_op_autograd", "every_op_compiled"]
    assert_passed(run_op_tests(STEMS, files, "ascending"), 100)


@pytest.fixture
def sanitized(builder) -> dict[str, str]:
    """The environment in which the sanitizers of addresses and of undefined behaviour end the process at the first."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = (subprocess.check_output([builder.compiler(), f"-print-file-name={name}"]) for name in names)
    return {
        "CUDA_HOST_SANITIZE": "1",
        # All have to be there before Python is. It does not free everything at its end.
        "LD_PRELOAD": ":".join(path.decode().strip() for path in found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTEST_ADDOPTS": "--capture=no",  # what is captured is lost with the process
    }


@pytest.mark.long
def test_nothing_is_read_or_written_that_should_not_be(sanitized):
    files = ("dropout_add_layer_norm", "embedding_layer_norm", "every_op_layouts")
    stems = (*files[:2], "layer_norm")  # which the first calls in backward
    assert_passed(run_op_tests(stems, files, "shuffled", None, "-m", "not full", **sanitized), 90)


VARLEN = ("-m", "not gpu", "-k", "varlen")


OF_TILES = (
    "dense and (short or one or wide or padding or holes) or regimes and offset or varlen or no_elements"
)


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "chosen", "at_least"),
    [("test_attention.py", OF_TILES, 18), ("test_attention_short.py", "not planted", 34)],
)
def test_attention_reads_and_writes_what_it_should(sanitized, file, chosen, at_least):
    done = run_tests([HERE / file], "shuffled", None, "-m", "not gpu", "-k", chosen, **sanitized)
    assert_passed(done, at_least)


# Accesses that change no result: the file, what is right and wrong there, and what is said.
OUT_OF_BOUNDS = {
    "outputs of queries that are not there": (
        "attention_backward.cuh",
        "out.at(at.sequence, at.head, there ? row : at.first_q)",
        "out.at(at.sequence, at.head, row)",
        "heap-buffer-overflow",
    ),
    "numbers behind shared memory": (
        "attention_backward.cuh",
        "= numbers(tile)[QUERIES + row];",
        "= numbers(tile)[QUERIES + row] + 0.0f * numbers(tile)[4 * QUERIES + row];",
        "use-after-poison",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("access", OUT_OF_BOUNDS)
def test_an_access_out_of_bounds_is_caught(sanitized, access, tmp_path):
    file, right, wrong, message = OUT_OF_BOUNDS[access]
    sources = changed(tmp_path, file, right, wrong)
    done = run_tests([HERE / "test_attention.py"], "shuffled", sources, "-x", *VARLEN, **sanitized)
    assert done.returncode != 0 and message in done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
    assert "attention_bwd" in done.stderr, "the report names the kernel"


def changed(folder: Path, file: str, right: str, wrong: str) -> Path:
    """A copy of csrc/cuda with something wrong in it."""
    sources = folder / "cuda"
    shutil.copytree(ROOT / "csrc" / "cuda", sources)
    text = (sources / file).read_text()
    assert text.count(right) == 1
    (sources / file).write_text(text.replace(right, wrong))
    return sources


# Each is a mistake that is easily made: the stem to run, the file, what is right and what is wrong there.
FAULTS = {
    "a bound one too far": ("layer_norm", "vec.cuh", "i < count ? p[i]", "i <= count ? p[i]"),
    "no barrier before a sum is read": (
        "layer_norm",
        "reduce.cuh",
        "room[warp] = x;\n    __syncthreads();",
        "room[warp] = x;",
    ),
    "no barrier between warps that add": (
        "layer_norm",
        "rows.cuh",
        "if (L::ROWS > 1) __syncthreads();",
        "",
    ),
    "one word for eight columns": ("dropout_add_layer_norm", "rows.cuh", "(col + i) / 4", "col / 4"),
    "the last edge of a run": ("embedding_layer_norm", "table_gradient.cuh", "at < end;", "at < end - 1;"),
    "a key too many": ("varlen_attention", "attention.cuh", "key < plain ||", "key <= plain ||"),
    "no barrier before a tile is multiplied": (
        "varlen_attention",
        "attention_forward.cuh",
        "__syncthreads();  // the tile is there",
        "// the tile is there",
    ),
    "the other half of a fragment": (
        "varlen_attention",
        "attention_tiles.cuh",
        "of_sixteen(matrix % 2)",
        "of_sixteen(matrix / 2)",
    ),
}


OF_EACH_KIND = ("a bound one too far", "no barrier before a sum is read", "the other half of a fragment")


@pytest.mark.full
@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=[] if fault in OF_EACH_KIND else pytest.mark.long) for fault in FAULTS],
)
def test_a_planted_fault_is_caught(builder, fault, tmp_path):
    stem, *change = FAULTS[fault]
    sources = changed(tmp_path, *change)
    if "attention" in stem:
        done = run_tests([HERE / "test_attention.py"], "shuffled", sources, "-x", *VARLEN)
    else:
        done = run_op_tests((stem,), [stem, "every_op_dropout"], "shuffled", sources, "-x")
    assert done.returncode == 1, done.stdout[-2000:]
    assert re.search(r"\d+ failed", done.stdout), done.stdout[-2000:]


# --- What the tests of the ops cannot ask ----------------------------------------------------------------------


@pytest.mark.parametrize("cols", [96, 770, 1024, 1540])
def test_the_same_bits_in_every_order(cuda_host, cols, monkeypatch):
    """Sums over lanes, warps and blocks are made in one order, whichever of them comes first."""
    ops = cuda_host("dropout_add_layer_norm")
    g = torch.Generator().manual_seed(0)
    dout, x, residual = (torch.randn(37, cols, generator=g).bfloat16() for _ in range(3))
    weight, bias, rng = x[0], x[1], torch.tensor([2**62 + 5, 77])
    results = []
    for order in ("ascending", "descending", "shuffled"):
        monkeypatch.setenv("CUDA_HOST_ORDER", order)
        out, *kept = ops.dropout_add_layer_norm_fwd(x, residual, weight, bias, bias, rng, 0.1, 1e-5)
        inputs = (kept[0], x, residual, weight, bias, bias, *kept[1:], rng, 0.1)
        results.append((out, *ops.dropout_add_layer_norm_bwd(dout, None, *inputs)))
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


def test_ids_outside_of_their_table(cuda_host):
    """A GPU is not asked whether ids are right: a wrong one spoils its own row, and reads and writes nothing."""
    ops = cuda_host("embedding_layer_norm")
    g = torch.Generator().manual_seed(0)
    word, ones = torch.randn(5, 12, generator=g), torch.ones(12)
    ids = torch.tensor([[0, 5, 2], [-1, 4, 2**40]])
    bad = (ids < 0) | (ids >= 5)
    inputs = (ids, None, None, word, None, None, ones, None)
    out, mean, rstd = ops.embedding_layer_norm_fwd(*inputs, None, 0.0, 1e-5)
    assert out[bad].isnan().all() and out[~bad].isfinite().all()
    dword = ops.embedding_layer_norm_bwd(out.new_ones(out.shape), *inputs, mean, rstd, None, 0.0, -1)[0]
    assert torch.equal(dword[[1, 3]], torch.zeros(2, 12)) and dword.isfinite().all()


def test_an_entry_that_most_tokens_use(cuda_host):
    """Its run goes over many chunks, and the tokens of others begin and end within them."""
    ops = cuda_host("embedding_layer_norm")
    g = torch.Generator().manual_seed(0)
    ids = torch.where(torch.rand(700, generator=g) < 0.8, 3, torch.randint(9, (700,), generator=g))
    word, weight = torch.randn(9, 20, generator=g), torch.randn(20, generator=g)
    dout = torch.randn(700, 20, generator=g)
    _, mean, rstd = ops.embedding_layer_norm_fwd(
        ids, None, None, word, None, None, weight, None, None, 0.0, 1e-5
    )
    got = ops.embedding_layer_norm_bwd(
        dout, ids, None, None, word, None, None, weight, None, mean, rstd, None, 0.0, 7
    )[0]
    leaf = word.double().requires_grad_()
    out = torch.nn.functional.layer_norm(leaf[ids], (20,), weight.double())
    (exact,) = torch.autograd.grad(out, leaf, dout.double())
    exact[7] = 0.0
    # Each element is a sum of at most 700 rounded terms.
    assert (got - exact).abs().max() <= 700 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_rows_that_are_too_wide(cuda_host):
    x = torch.randn(2, 4, 4096)
    with pytest.raises(RuntimeError, match="expected rows of at most 8192 elements, got 16384"):
        cuda_host("layer_norm").layer_norm_fwd(x, [4, 4096], None, None, 1e-5)


def test_words_among_the_arguments_are_let_go_of(cuda_host):
    """PyTorch's conversion to a string of C++ keeps one of 48 bytes in each call."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    gelu, nothing = cuda_host("gelu").gelu_fwd, torch.empty(0)
    for _ in range(1000):
        gelu(nothing, "none")
    before = resident()
    for _ in range(60_000):
        gelu(nothing, "none")
    assert resident() - before < 1_000_000
