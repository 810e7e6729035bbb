"""The attention of csrc/cuda over short sequences: on the CPU, and on a GPU where there is one."""

import importlib.util
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pytorch_ext import backends, ops
from pytorch_ext.kernels.reference.philox import keep_attention
from pytorch_ext.testing import REGIMES, cumulative, normal, padding_mask

HERE = Path(__file__).resolve().parent


def _module(name):
    spec = importlib.util.spec_from_file_location(f"cuda_host_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


attention, rows = _module("test_attention"), _module("test_rows")
check, dropped_attention, of, qkv, rng = (
    getattr(attention, name) for name in ("check", "dropped_attention", "of", "qkv", "rng")
)

BF16, FP16 = torch.bfloat16, torch.float16
NAMESPACE = "pytorch_ext_cuda_host_short"


@pytest.fixture(params=attention.DEVICES)
def device(request) -> str:
    """Where the kernels run: compiled for the CPU, as attention_short.cu here says, or on a GPU."""
    if request.param == "cpu":
        request.getfixturevalue("cuda_host")("attention_short", sources=HERE, namespace=NAMESPACE)
    elif reasons := backends.why_not("cuda", attention.OP):
        pytest.skip("; ".join(reasons))
    return request.param


def raw(device) -> object:
    return getattr(torch.ops, NAMESPACE if device == "cpu" else backends.cuda.NAMESPACE)


@pytest.fixture
def wide(device, monkeypatch) -> None:
    """Lets the tests in test_attention.py take heads of 64."""
    shapes = (sum(attention.LENGTHS_Q), 4), (sum(attention.LENGTHS_K), 2), (sum(attention.LENGTHS_K), 2)
    names = ("query", "key", "value")
    patches = {
        "raw": raw,
        "qkv": lambda *args, **kwargs: qkv(*args, **{"dim": 64, **kwargs}),
        "tokens": lambda g: {n: normal(g, *shape, 64) for n, shape in zip(names, shapes, strict=True)},
    }
    for name, patch in patches.items():
        monkeypatch.setattr(attention, name, patch)


# Sizes about those of what a block has room for: 64, 128 or 256 keys; parts of 32; tiles of 16, 32 and 64 queries.
DENSE = {
    "1": (BF16, {"q_len": 1, "k_len": 1}, {}),
    "7": (FP16, {"q_len": 7, "k_len": 7}, {}),
    "63": (BF16, {"q_len": 63, "k_len": 63}, {}),
    "65, causal, grouped": (FP16, {"heads": 4, "q_len": 65, "k_len": 65}, {"is_causal": True}),
    "128, padding": (BF16, {"q_len": 128, "k_len": 128}, {"attn_mask": padding_mask((128, 33), 128)}),
    "200, causal": (BF16, {"batch": 1, "q_len": 200, "k_len": 200}, {"is_causal": True}),
    "256": (BF16, {"batch": 1, "q_len": 256, "k_len": 256}, {"scale": -0.3}),
    "few queries": (BF16, {"q_len": 3, "k_len": 129}, {"attn_mask": padding_mask((0, 97), 129)}),
    "few keys": (BF16, {"q_len": 130, "k_len": 5}, {"is_causal": True}),
    "holes": (
        BF16,
        {"q_len": 70, "k_len": 100},
        {"attn_mask": torch.rand(2, 100, generator=torch.Generator().manual_seed(1)) > 0.4},
    ),
}


def dense_case(case):
    dtype, sizes, options = DENSE[case]
    sizes = {**sizes, "dim": 64}
    if sizes.get("heads") == 4:
        sizes["key_heads"], options = 2, {**options, "enable_gqa": True}
    if "attn_mask" in options:
        options = {**options, "attn_mask": options["attn_mask"][:, None, None]}
    return dtype, sizes, options


def check_dense(device, case) -> None:
    dtype, sizes, options = dense_case(case)
    ours, eager = ops.scaled_dot_product_attention, F.scaled_dot_product_attention
    check(device, of(ours, **options), of(eager, **options), lambda g: qkv(g, **sizes), dtype)


@pytest.mark.long
@pytest.mark.parametrize("case", DENSE)
def test_dense(device, case):
    check_dense(device, case)


def check_dropout(device, rng, length) -> None:
    sizes = {"batch": 2, "heads": 2, "key_heads": 1, "q_len": length, "k_len": length - 3, "dim": 64}
    keep = keep_attention(rng, 0, 4, length, length - 3, 0.3).view(2, 2, length, length - 3)
    ours = of(ops.scaled_dot_product_attention, dropout_p=0.3, enable_gqa=True, is_causal=True)
    eager = of(dropped_attention, keep=keep, dropout_p=0.3, is_causal=True)
    check(device, ours, eager, lambda g: qkv(g, **sizes), BF16, seeds=range(2))


@pytest.mark.long
@pytest.mark.parametrize("length", [60, 100, 140])
def test_dropout(device, rng, length):
    """The mask of the contract, in both directions, in each size of room."""
    check_dropout(device, rng, length)


def test_the_smallest(cuda_host, rng):
    """What the library of the other tests has of these kernels, too: those for 64 keys."""
    cuda_host("attention")
    check_dense("cpu", "63")
    check_dropout("cpu", rng, 60)


@pytest.mark.long
def test_the_bits_of_dropout(device, rng):
    """Values that are the rows of a unit matrix show the weights, one by one: here of the second 64 keys of 192."""
    q, k, _ = (
        t.to(device, BF16)
        for t in qkv(torch.Generator().manual_seed(0), q_len=130, k_len=192, dim=64).values()
    )
    value = torch.zeros(2, 2, 192, 64, dtype=BF16, device=device)
    value[:, :, 64:128] = torch.eye(64)
    with backends.use("cuda"):
        kept = ops.scaled_dot_product_attention(q * 0, k, value, dropout_p=0.3) != 0
        everything = ops.scaled_dot_product_attention(q, k, value, dropout_p=1.0)
    assert torch.equal(kept.cpu().flatten(0, 1), keep_attention(rng, 0, 4, 130, 192, 0.3)[:, :, 64:128])
    assert not everything.any()


@pytest.mark.long
@pytest.mark.parametrize("regime", [name for name in REGIMES if name != "normal"])
def test_regimes(device, regime):
    make = lambda g: qkv(g, k_len=70, dim=64, **REGIMES[regime])  # noqa: E731
    check(device, ops.scaled_dot_product_attention, F.scaled_dot_product_attention, make, BF16)


@pytest.mark.long
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_varlen(device, wide, is_causal):
    attention.test_varlen(device, is_causal)


@pytest.mark.long
def test_varlen_dropout(device, wide, rng):
    attention.test_varlen_dropout(device, rng)


@pytest.mark.long
def test_varlen_and_tokens_behind_the_last_sequence(device):
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(205, 4, 64, generator=g).to(device, BF16) for _ in range(2))
    k, v = (torch.randn(205, 2, 64, generator=g).to(device, BF16) for _ in range(2))
    constants = (*[cumulative((3, 2), device)] * 2, 3, 3, None, 0.0, False, 0.2)
    out, lse = raw(device).varlen_attention_fwd(q, k, v, *constants)
    gradients = raw(device).varlen_attention_bwd(dout, q, k, v, out, lse, *constants)
    assert (lse[:, 5:] == -torch.inf).all()
    for made in (out, *gradients):
        assert not made[5:].any() and made[:5].all()


@pytest.mark.long
def test_a_longest_that_is_none(device):
    """Sequences longer than it was said spoil nothing but themselves."""
    g = torch.Generator().manual_seed(0)
    tokens = [torch.randn(300, 1, 64, generator=g).to(device, BF16) for _ in range(4)]

    def results(q, k, v, dout, *lengths):
        cu_seqlens = cumulative(lengths, device)
        constants = (cu_seqlens, cu_seqlens, 40, 40, None, 0.0, False, 0.2)
        out, lse = raw(device).varlen_attention_fwd(q, k, v, *constants)
        return out, *raw(device).varlen_attention_bwd(dout, q, k, v, out, lse, *constants)

    alone = results(*(t[290:] for t in tokens), 10)
    for beside, right in zip(results(*tokens, 290, 10), alone, strict=True):
        assert torch.equal(beside[290:], right)


@pytest.mark.long
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("hidden", ["by causality", "by padding"])
def test_what_is_hidden_influences_nothing(device, wide, hidden, bad):
    attention.test_what_is_hidden_influences_nothing(device, hidden, bad)


@pytest.mark.long
def test_what_no_query_sees_has_no_gradient(device):
    """Whatever the queries are."""
    q, k, v = (
        t.to(device, BF16) for t in qkv(torch.Generator().manual_seed(0), q_len=40, k_len=40, dim=64).values()
    )
    q[:, :, 3] = math.nan
    mask = (torch.arange(40, device=device) % 3 > 0)[None, None, None]
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with backends.use("cuda"):
        out = ops.scaled_dot_product_attention(*leaves, mask)
    for gradient in torch.autograd.grad(out, leaves[1:], torch.ones_like(out)):
        assert not gradient[:, :, ::3].any() and not gradient[:, :, 1::3].isfinite().any()


@pytest.mark.long
def test_what_forward_leaves(device, wide):
    attention.test_what_forward_leaves(device)


@pytest.mark.long
def test_the_same_bits_in_every_order(device, wide, monkeypatch):
    attention.test_the_same_bits_in_every_order(device, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"q_len": 0}, {"k_len": 0}], ids=str)
def test_no_elements(device, wide, sizes):
    attention.test_no_elements(device, sizes)


@pytest.mark.long
def test_it_is_left_out_where_that_is_asked_for(device, monkeypatch):
    """The kernels for long sequences sum up in another order; what they make is as right."""
    tensors = qkv(torch.Generator().manual_seed(0), q_len=70, k_len=70, dim=64).values()
    q, k, v = (t.to(device, BF16) for t in tensors)
    constants = (None, None, 0.0, False, 0.2)
    short = raw(device).scaled_dot_product_attention_fwd(q, k, v, *constants)
    monkeypatch.setenv("PYTORCH_EXT_CUDA_SHORT", "0")
    others = raw(device).scaled_dot_product_attention_fwd(q, k, v, *constants)
    assert not torch.equal(short[1], others[1])
    torch.testing.assert_close(short[1], others[1])
    check_dense(device, "63")


# The file, what is right and what is wrong there.
BACKWARD, FORWARD = "attention_short_backward.cuh", "attention_short_forward.cuh"
FAULTS = {
    "gradients of scores that may not be there yet": (
        BACKWARD,
        "__syncthreads();  // the gradients of scores are there",
        "",
    ),
    "sums that a faster warp overwrites": (BACKWARD, "(i % 2 * (S::THREADS / WARP) + warp)", "warp"),
    "the other half of a fragment": (
        BACKWARD,
        "row + of_sixteen(matrix / 2)",
        "row + of_sixteen(matrix % 2)",
    ),
    "zero times what is no number": (
        BACKWARD,
        "if (hidden(m, of_keys % 2, lane % 4 * 4 + of_four)) kept_x[m][n][e] = dx[m][n][e] = 0.0f;",
        "",
    ),
    "queries that a warp does not wait for": (FORWARD, "wait_for_copies<0>();\n        __syncwarp();", ""),
    "a last part that is not copied": ("attention_short.cuh", "if (first < end)", "if (first + PART <= end)"),
}


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(builder, fault, tmp_path):
    file, right, wrong = FAULTS[fault]
    sources = tmp_path / "cuda"
    shutil.copytree(rows.ROOT / "csrc" / "cuda", sources)
    text = (sources / file).read_text()
    assert text.count(right) == 1
    (sources / file).write_text(text.replace(right, wrong))
    chosen = ("-x", "-m", "not gpu", "-k", "dense or hidden or none")
    done = rows.run_tests([Path(__file__)], "shuffled", sources, *chosen)
    assert done.returncode == 1, done.stdout[-2000:]
    assert " failed" in done.stdout, done.stdout[-2000:]
