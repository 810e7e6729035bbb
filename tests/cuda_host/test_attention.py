"""The attention of csrc/cuda: on the CPU, and on a GPU where there is one."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pytorch_ext import backends, ops
from pytorch_ext.kernels.reference.philox import keep_attention
from pytorch_ext.testing import REGIMES, assert_contract, cumulative, normal, padding_mask

OP = "scaled_dot_product_attention"
BF16, FP16 = torch.bfloat16, torch.float16
SEED, OFFSET = -(2**62) - 12345, 2**33 + 77


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def running(request, stem) -> str:
    """The device where the kernels run: compiled for the CPU (docs/cuda-host.md says which), or on a GPU."""
    if request.param == "cpu":
        request.getfixturevalue("cuda_host")(stem)
    elif reasons := backends.why_not("cuda", OP):
        pytest.skip("; ".join(reasons))
    return request.param


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return running(request, "attention")


@pytest.fixture(params=DEVICES)
def varlen_device(request) -> str:
    return running(request, "varlen_attention")


def check(device, ours, eager, make, dtype, **options) -> None:
    """The numerical contract. ``ours`` and ``eager`` take tensors by name."""

    def moved(function):
        return lambda **tensors: function(**{name: t.to(device) for name, t in tensors.items()}).cpu()

    def on_backend(**tensors):
        with backends.use("cuda"):
            return ours(**tensors)

    options.setdefault("exact", eager)
    assert_contract(moved(on_backend), moved(eager), make, dtype, **options)


def qkv(generator, batch=2, heads=2, key_heads=None, q_len=5, k_len=9, dim=32, **regime):
    of_keys = (batch, key_heads or heads, k_len, dim)
    made = {"query": (batch, heads, q_len, dim), "key": of_keys, "value": of_keys}
    return {name: normal(generator, *shape, **regime) for name, shape in made.items()}


def of(function, **options):
    def call(**tensors):
        given = {n: t.to(tensors["query"].device) if isinstance(t, Tensor) else t for n, t in options.items()}
        return function(**tensors, **given)

    return call


# Sizes about those of tiles: 64 or 128 queries, 64 or 32 keys; one more, one less, one.
DENSE = {
    "short": (BF16, {}, {}),
    "one": (FP16, {"q_len": 1, "k_len": 2}, {}),
    "float16, causal, grouped": (
        FP16,
        {"heads": 4, "q_len": 67, "k_len": 65},
        {"is_causal": True, "enable_gqa": True},
    ),
    "long": (BF16, {"batch": 1, "q_len": 129, "k_len": 193, "dim": 64}, {}),
    "long, causal": (BF16, {"batch": 1, "q_len": 200, "k_len": 161, "dim": 64}, {"is_causal": True}),
    "wide": (BF16, {"batch": 1, "q_len": 66, "k_len": 97, "dim": 96}, {}),
    "wide, causal, grouped": (
        BF16,
        {"batch": 1, "heads": 4, "q_len": 65, "k_len": 70, "dim": 96},
        {"is_causal": True, "enable_gqa": True},
    ),
    "negative scale": (BF16, {"q_len": 64, "k_len": 64}, {"scale": -0.5}),
    "no scale": (BF16, {}, {"scale": 0.0}),
    "padding": (BF16, {"k_len": 130}, {"attn_mask": padding_mask((130, 0), 130)[:, None, None]}),
    "padding, expanded": (
        BF16,
        {"batch": 3, "k_len": 70},
        {"attn_mask": padding_mask((1, 64, 70), 70)[:, None, None].expand(3, 2, 5, 70)},
    ),
    "holes of each head": (
        BF16,
        {"q_len": 70, "k_len": 100},
        {"attn_mask": torch.rand(2, 1, 100, generator=torch.Generator().manual_seed(1)) > 0.4},
    ),
}


@pytest.mark.parametrize("case", DENSE)
def test_dense(device, case):
    dtype, sizes, options = DENSE[case]
    if options.get("enable_gqa"):
        sizes = {**sizes, "key_heads": 2}
    ours, eager = ops.scaled_dot_product_attention, F.scaled_dot_product_attention
    check(device, of(ours, **options), of(eager, **options), lambda g: qkv(g, **sizes), dtype)


@pytest.mark.parametrize("regime", [name for name in REGIMES if name != "normal"])
def test_regimes(device, regime):
    make = lambda g: qkv(g, k_len=70, **REGIMES[regime])  # noqa: E731
    check(device, ops.scaled_dot_product_attention, F.scaled_dot_product_attention, make, BF16)


def dropped_attention(query, key, value, keep, dropout_p, is_causal=False):
    """``keep`` is the mask of the contract, of one sequence or of a batch."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    scale = 1.0 / (1.0 - dropout_p)
    return (torch.softmax(scores, -1) * keep.to(query.device, query.dtype) * scale) @ value


@pytest.fixture
def rng(monkeypatch) -> Tensor:
    """What every op draws."""
    drawn = torch.tensor([SEED, OFFSET])
    for op in ("attention", "varlen_attention"):
        module = __import__(f"pytorch_ext.ops.{op}", fromlist=["draw_rng"])
        monkeypatch.setattr(module, "draw_rng", lambda like: drawn.to(like.device))
    return drawn


@pytest.mark.parametrize("dim", [64, 96])
def test_dropout(device, rng, dim):
    """The mask of the contract, in both directions: with two keys to a lane's draw, and with four."""
    sizes = {"batch": 2, "heads": 2, "key_heads": 1, "q_len": 70, "k_len": 67, "dim": dim}
    keep = keep_attention(rng, 0, 4, 70, 67, 0.3).view(2, 2, 70, 67)
    ours = of(ops.scaled_dot_product_attention, dropout_p=0.3, enable_gqa=True, is_causal=True)
    eager = of(dropped_attention, keep=keep, dropout_p=0.3, is_causal=True)
    check(device, ours, eager, lambda g: qkv(g, **sizes), BF16)


def test_the_bits_of_dropout(device, rng):
    """Values that are the rows of a unit matrix show the weights, one by one."""
    q, k, _ = (
        t.to(device, BF16) for t in qkv(torch.Generator().manual_seed(0), q_len=130, k_len=32).values()
    )
    value = torch.eye(32, dtype=BF16, device=device).expand(2, 2, 32, 32)
    with backends.use("cuda"):
        kept = ops.scaled_dot_product_attention(q, k, value, dropout_p=0.3) != 0
        everything = ops.scaled_dot_product_attention(q, k, value, dropout_p=1.0)
    assert torch.equal(kept.cpu().flatten(0, 1), keep_attention(rng, 0, 4, 130, 32, 0.3))
    assert not everything.any()


LENGTHS_Q, LENGTHS_K = (5, 0, 130, 1), (9, 3, 70, 0)


def varlen(function, lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K, **options):
    def call(query, key, value):
        cu = [cumulative(lengths, query.device) for lengths in (lengths_q, lengths_k)]
        return function(query, key, value, *cu, max(lengths_q), max(lengths_k), **options)

    return call


def one_by_one(query, key, value, cu_q, cu_k, *_, keeps=None, **options):
    outs = []
    for i in range(len(cu_q) - 1):
        at_q, at_k = slice(*cu_q[i : i + 2].tolist()), slice(*cu_k[i : i + 2].tolist())
        one = [t.transpose(0, 1)[None] for t in (query[at_q], key[at_k], value[at_k])]
        if keeps:
            out = dropped_attention(*one, keeps[i], **options)
        else:
            out = F.scaled_dot_product_attention(*one, enable_gqa=True, **options)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def tokens(generator, heads=4, key_heads=2):
    shapes = (sum(LENGTHS_Q), heads), (sum(LENGTHS_K), key_heads), (sum(LENGTHS_K), key_heads)
    names = ("query", "key", "value")
    return {name: normal(generator, *shape, 32) for name, shape in zip(names, shapes, strict=True)}


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_varlen(varlen_device, is_causal):
    options = {"is_causal": is_causal}
    check(varlen_device, varlen(ops.varlen_attention, **options), varlen(one_by_one, **options), tokens, BF16)


def test_varlen_dropout(varlen_device, rng):
    pairs = enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True))
    keeps = [keep_attention(rng, 4 * i, 4, q_len, k_len, 0.3) for i, (q_len, k_len) in pairs]
    ours = varlen(ops.varlen_attention, dropout_p=0.3)
    check(varlen_device, ours, varlen(one_by_one, keeps=keeps, dropout_p=0.3), tokens, BF16)


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "shifted"])
def test_varlen_on_views_of_one_product(varlen_device, shift):
    """Queries, keys and values as a linear layer leaves them; at no multiple of 16 bytes they are copied."""
    lengths = (70, 3)

    def split(product):
        rows = torch.cat([product.flatten()[:1].detach(), product.flatten()])[1:] if shift else product
        return rows.view(73, 3, 2, 32).unbind(1)

    def ours(product):
        return varlen(ops.varlen_attention, lengths, lengths)(*split(product))

    def eager(product):
        return varlen(one_by_one, lengths, lengths)(*split(product))

    check(varlen_device, ours, eager, lambda g: {"product": normal(g, 73, 192)}, BF16, seeds=range(2))


def raw(device) -> object:
    return getattr(torch.ops, "pytorch_ext_cuda_host" if device == "cpu" else backends.cuda.NAMESPACE)


def test_varlen_and_tokens_behind_the_last_sequence(varlen_device):
    """As in a batch that is filled up to a bucket: more of them than the longest sequence has."""
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(205, 2, 32, generator=g).to(varlen_device, BF16) for _ in range(4))
    lengths = (*[cumulative((3, 2), varlen_device)] * 2, 3, 3)
    constants = (None, 0.0, False, 0.2)
    out, lse = raw(varlen_device).varlen_attention_fwd(q, k, v, *lengths, *constants)
    gradients = raw(varlen_device).varlen_attention_bwd(dout, q, k, v, out, lse, *lengths, *constants)
    assert (lse[:, 5:] == -torch.inf).all()
    for made in (out, *gradients):
        assert not made[5:].any() and made[:5].all()


def test_what_forward_leaves(device):
    """The output lies in memory as the next linear layer reads it; lse is float32, a natural logarithm."""
    tensors = qkv(torch.Generator().manual_seed(0), k_len=130, dim=64).values()
    q, k, v = (t.to(device, BF16) for t in tensors)
    mask = padding_mask((130, 0), 130, device)[:, None, None]
    out, lse = raw(device).scaled_dot_product_attention_fwd(q, k, v, mask, None, 0.0, False, 0.25)
    assert out.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32
    exact = torch.logsumexp(q[0].double() @ k[0].double().mT * 0.25, -1)
    torch.testing.assert_close(lse[0].double(), exact, rtol=1e-5, atol=1e-5)
    assert (lse[1] == -torch.inf).all() and not out[1].any()


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"q_len": 0}, {"k_len": 0}, {"q_len": 0, "k_len": 0}], ids=str
)
def test_no_elements(device, sizes):
    made = qkv(torch.Generator().manual_seed(0), **sizes).values()
    q, k, v = (t.to(device, BF16).requires_grad_() for t in made)
    with backends.use("cuda"):
        out = ops.scaled_dot_product_attention(q, k, v)
    assert out.shape == q.shape and not out.any()
    for t, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert gradient.shape == t.shape and not gradient.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("hidden", ["by causality", "by padding"])
def test_what_is_hidden_influences_nothing(device, hidden, bad):
    """Nothing that is not finite at a key or at a query comes to those that may not see it, in any gradient."""
    q, k, v = (t.to(device, BF16) for t in qkv(torch.Generator().manual_seed(0), q_len=80, k_len=80).values())
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device, BF16)
    causal, at = hidden == "by causality", 70
    mask = None if causal else (torch.arange(80, device=device) != at)[None, None, None]

    def run(spoil):
        tensors = [t.clone() for t in (q, k, v, dout)]
        for t in {"keys": tensors[1:3], "queries": tensors[::3]}.get(spoil, ()):
            t[:, :, at] = bad
        leaves = [t.requires_grad_() for t in tensors[:3]]
        with backends.use("cuda"):
            out = ops.scaled_dot_product_attention(*leaves, mask, is_causal=causal)
        return out, *torch.autograd.grad(out, leaves, tensors[3])

    clean = run(None)
    found = run("keys")
    before = slice(0, at) if causal else torch.arange(80) != at
    assert all(
        torch.equal(a[:, :, before], b[:, :, before]) for a, b in zip(clean[:2], found[:2], strict=True)
    )
    if causal:
        assert not found[0][:, :, at:].isfinite().all(-1).any(), "and those that may attend it are spoiled"
        # A query sees all keys up to its own, and their gradients come from it; those behind it leaves alone.
        for a, b in zip(clean[2:], run("queries")[2:], strict=True):
            assert torch.equal(a[:, :, at + 1 :], b[:, :, at + 1 :])
            assert not b[:, :, : at + 1].isfinite().all(-1).any()
    else:
        assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))
        assert not found[2][:, :, at].any() and not found[3][:, :, at].any()


def test_the_same_bits_in_every_order(device, monkeypatch):
    """Whichever thread, warp or block comes first; and so again and again."""
    q, k, v = (t.to(device, BF16) for t in qkv(torch.Generator().manual_seed(0), 1, 2, 1, 130, 140).values())
    rng, constants = torch.tensor([SEED, OFFSET], device=device), (0.3, True, 0.2)
    results = []
    for order in ("ascending", "descending", "shuffled"):
        monkeypatch.setenv("CUDA_HOST_ORDER", order)
        saved = raw(device).scaled_dot_product_attention_fwd(q, k, v, None, rng, *constants)
        inputs = (q, q, k, v, None, *saved, rng, *constants, False)
        results.append((*saved, *raw(device).scaled_dot_product_attention_bwd(*inputs)[:3]))
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


def test_what_goes_elsewhere_and_why(device):
    q, mask = (
        torch.empty(2, 2, 5, 64, dtype=BF16, device=device),
        torch.ones(5, 5, dtype=torch.bool, device=device),
    )
    single, narrow = q.float(), q[..., :40]
    keys = mask[:1].expand(5, 5)
    asked = {
        "its attention is for bfloat16 and float16, and this is torch.float32": (single, single, single),
        "its attention is for heads of 32, 64, 96 or 128 elements, and these have 40": (
            narrow,
            narrow,
            narrow,
        ),
        "its attention is for heads of 32, 64, 96 or 128 elements, and these have 64 and 40": (q, q, narrow),
        "its attention takes masks of torch.bool, and this one is torch.bfloat16": (q, q, q, mask.to(BF16)),
        "its attention takes masks of keys, and this one differs from query to query": (q, q, q, mask),
        "its attention takes one mask for the heads that share keys, and this one differs": (
            *(q, q[:, :1], q[:, :1]),
            mask[:2, None],
        ),
    }
    for reason, tensors in asked.items():
        assert backends.why_not("cuda", OP, *tensors) == [reason]
    assert backends.why_not("cuda", OP, q, q, q, keys) == backends.why_not("cuda", OP, q, q, q) == []
    with torch.autocast(device, dtype=BF16):
        assert backends.why_not("cuda", OP, single, single, single) == []
    with backends.use("cuda"), pytest.raises(backends.BackendError, match="differs from query to query"):
        ops.scaled_dot_product_attention(q, q, q, mask)
