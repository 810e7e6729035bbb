"""What is particular to attention in Triton: both ways to go over the keys, where tiles end, tiles of other sizes, and
what lies behind the last sequence.
"""

import contextlib
import functools
import itertools
import os

import pytest
import torch
import torch.nn.functional as F

from pytorch_ext import backends, ops
from pytorch_ext.backends import kernel
from pytorch_ext.testing import cumulative, normal, padding_mask

pytest.importorskip("triton", reason="the package triton is not installed")
from pytorch_ext.kernels.triton import _attention_call, _attention_configs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WHY_NOT = backends.why_not("triton", "scaled_dot_product_attention")
pytestmark = [
    pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu,
    pytest.mark.skipif(bool(WHY_NOT), reason="; ".join(WHY_NOT) or "-"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
sdpa = functools.partial(ops.scaled_dot_product_attention, enable_gqa=True)
eager_sdpa = functools.partial(F.scaled_dot_product_attention, enable_gqa=True)


def qkv(generator, q_len, k_len, batch=1, heads=1, key_heads=None, dim=16, value_dim=None):
    key_heads = key_heads or heads
    return {
        "query": normal(generator, batch, heads, q_len, dim),
        "key": normal(generator, batch, key_heads, k_len, dim),
        "value": normal(generator, batch, key_heads, k_len, value_dim or dim),
    }


def of(function, **options):
    moved = {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    return lambda **tensors: function(**tensors, **moved)


@pytest.fixture(params=["at once", "by blocks"])
def way(request, monkeypatch):
    """All keys in one tile, as is usual for short sequences; or block by block, as for long ones."""
    if request.param == "by blocks":
        monkeypatch.setattr(_attention_call, "at_once", lambda *sizes, backward: False)
    return request.param


# On both sides of the tiles, and of the half of a tile that a sequence may end in.
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("k_len", [15, 16, 17, 31, 33, 64, 65, 127, 128, 129, 255, 256, 257])
def test_where_tiles_end(k_len, is_causal, check_contract):
    options = {"is_causal": is_causal}
    make = lambda g: qkv(g, k_len if is_causal else 20, k_len, heads=2)  # noqa: E731
    check_contract("triton", of(sdpa, **options), of(eager_sdpa, **options), make, torch.float32)


test_where_tiles_end.full_in_interpreter = lambda k_len, is_causal: (
    k_len not in (16, 33, 65, 257) or (is_causal and k_len > 100)
)

MASKS = {
    "padding": padding_mask((70, 33), 70)[:, None, None],
    "padding on the left": padding_mask((70, 33), 70).flip(1)[:, None, None],
    "holes": (torch.rand(2, 1, 1, 70, generator=torch.Generator().manual_seed(1)) > 0.4),
    "of each head": (torch.rand(2, 4, 1, 70, generator=torch.Generator().manual_seed(2)) > 0.4),
    "of each query": (torch.rand(70, 70, generator=torch.Generator().manual_seed(3)) > 0.4),
    "floats of each key": torch.randn(2, 1, 1, 70, generator=torch.Generator().manual_seed(4)),
    "floats of each score": torch.randn(1, 4, 70, 70, generator=torch.Generator().manual_seed(5)),
    "none": None,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, way, dtype, check_contract):
    def of_mask(function):
        def call(**tensors):
            found = MASKS[mask]
            if found is not None:
                full = found.to(DEVICE).expand(2, 4, 70, 70)
                found = full if full.dtype == torch.bool else full.to(tensors["query"].dtype)
            return function(**tensors, attn_mask=found)

        return call

    make = lambda g: qkv(g, 70, 70, batch=2, heads=4, key_heads=2)  # noqa: E731
    check_contract("triton", of_mask(sdpa), of_mask(eager_sdpa), make, dtype)


test_masks.long_in_interpreter = lambda dtype: dtype == torch.bfloat16
test_masks.full_in_interpreter = lambda mask, way: (
    mask in ("holes", "none", "floats of each key")
    or (way == "by blocks" and mask in ("padding", "of each head", "floats of each score"))
)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (24, 40), (80, 80), (96, 8), (130, 256)])
def test_head_sizes(dim, value_dim, is_causal, way, check_contract):
    options = {"is_causal": is_causal}
    make = lambda g: qkv(g, 40, 70, dim=dim, value_dim=value_dim)  # noqa: E731
    check_contract("triton", of(sdpa, **options), of(eager_sdpa, **options), make, torch.bfloat16)


test_head_sizes.full_in_interpreter = lambda dim, is_causal: is_causal or dim in (16, 130)


SIZES, OTHERS = (16, 32, 64, 128), ({}, {"is_causal": True}, {"scale": -0.3})
# Every pair of sizes, with one of the options each, such that each option meets each size.
TILES = [
    ("by blocks", m, n, OTHERS[(i + j) % 3])
    for (i, m), (j, n) in itertools.product(enumerate(SIZES), repeat=2)
]
TILES += [("at once", m, None, options) for m, options in zip(SIZES, (*OTHERS, {}), strict=True)]


@pytest.mark.parametrize(("way", "block_m", "block_n", "options"), TILES, ids=str, indirect=["way"])
def test_tiles_of_other_sizes(way, block_m, block_n, options, check_contract):
    """Wider and narrower than what is shipped, as `pytorch-ext tune` tries them."""
    tiles = {"BLOCK_M": block_m, "num_warps": 4, "num_stages": 1}
    tables = ("FORWARD_AT_ONCE", "BACKWARD_AT_ONCE")
    if way == "by blocks":
        tiles["BLOCK_N"] = block_n
        tables = ("FORWARD", "BACKWARD_KEYS", "BACKWARD_QUERIES")
    make = lambda g: qkv(g, 70, 100, heads=2, key_heads=1)  # noqa: E731
    with contextlib.ExitStack() as stack:
        for name in tables:
            stack.enter_context(getattr(_attention_configs, name).forced(tiles))
        check_contract("triton", of(sdpa, **options), of(eager_sdpa, **options), make, torch.float32)


test_tiles_of_other_sizes.full_in_interpreter = lambda block_m, block_n: (
    (block_m, block_n) not in ((16, 64), (128, 32), (32, None))
)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(70, 3, 0, 33), (40, 130)], ids=str)
def test_dropout_is_that_of_reference(lengths, is_causal, way):
    """Bit for bit where weights are zero, in every tile; and with the same mask in backward."""
    heads, dropout_p = 2, 0.4
    g = torch.Generator().manual_seed(0)
    total, longest = sum(lengths), max(lengths)
    cu = cumulative(lengths, DEVICE)
    q, k = (normal(g, total, heads, 16).to(DEVICE, torch.float32) for _ in range(2))
    # The values name their keys, so the output shows the dropped weights themselves.
    v = torch.cat([torch.eye(n, longest) for n in lengths])[:, None].expand(total, heads, longest)
    v = v.to(DEVICE).contiguous()
    rng = torch.tensor([-(2**62) - 5, 2**33 + 7], device=DEVICE)
    found = {}
    for name in ("reference", "triton"):
        call = (cu, cu, longest, longest, rng, dropout_p, is_causal, 0.25)
        out, lse = kernel(name, "varlen_attention_fwd")(q, k, v, *call)
        back = kernel(name, "varlen_attention_bwd")(out.cos(), q, k, v, out, lse, *call)
        found[name] = (out, lse, *back)
    assert torch.equal(found["triton"][0] == 0, found["reference"][0] == 0)
    assert 0.2 < (found["triton"][0] == 0).float().mean() < 1
    for one, other in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", [1, 300])
def test_tokens_behind_the_last_sequence(tail, way):
    """A batch that is filled up, as for a CUDA graph: zeros there, in gradients too, and the others as without."""
    lengths, heads = (5, 0, 40), 2
    total = sum(lengths)
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (normal(g, total + tail, heads, 16).to(DEVICE, torch.float32) for _ in range(4))
    q[total:], k[total:], v[total:], dout[total:] = (float("nan"),) * 4
    cu = cumulative(lengths, DEVICE)
    call = (cu, cu, 40, 40, None, 0.0, False, 0.25)

    def run(count):
        tensors = q[:count], k[:count], v[:count]
        out, lse = kernel("triton", "varlen_attention_fwd")(*tensors, *call)
        back = kernel("triton", "varlen_attention_bwd")(dout[:count], *tensors, out, lse, *call)
        return [out, lse.T, *back]

    for filled, exact in zip(run(total + tail), run(total), strict=True):
        assert torch.equal(filled[:total], exact)
        rest = filled[total:]
        assert torch.equal(rest, torch.full_like(rest, 0.0 if rest.dim() == 3 else -torch.inf))


@pytest.mark.parametrize("lengths", [[100, 1, 40, 64, 17], [256, 30, 128, 129], [0, 257, 16]], ids=str)
def test_lengths_that_differ(lengths, way, check_contract):
    """Sequences that fit into half of the tile of the longest, and that do not."""

    def ours(query, key, value):
        cu = cumulative(lengths, query.device)
        return ops.varlen_attention(query, key, value, cu, cu, max(lengths), max(lengths))

    def eager(query, key, value):
        pieces = zip(*(t.split(lengths) for t in (query, key, value)), strict=True)
        dense = ([t.transpose(0, 1)[None] for t in one] for one in pieces)
        return torch.cat([F.scaled_dot_product_attention(*one)[0].transpose(0, 1) for one in dense])

    make = lambda g: {n: normal(g, sum(lengths), 1, 16) for n in ("query", "key", "value")}  # noqa: E731
    check_contract("triton", ours, eager, make, torch.bfloat16)


test_lengths_that_differ.full_in_interpreter = lambda lengths: max(lengths) > 100

HIDING = {"causal": None, "mask": torch.rand(40, 70, generator=torch.Generator().manual_seed(1)) > 0.3}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("hiding", HIDING)
def test_what_is_not_finite_reaches_only_who_may_see_it(hiding, bad, way):
    """A query, its incoming gradient, a key and its value: what has nothing to do with them stays as it was."""
    mask = HIDING[hiding]
    allowed = torch.ones(40, 70, dtype=torch.bool).tril() if mask is None else mask
    g = torch.Generator().manual_seed(0)
    clean = [t.to(DEVICE, torch.float32) for t in qkv(g, 40, 70, heads=2, key_heads=1).values()]
    clean.append(normal(g, 1, 2, 40, 16).to(DEVICE, torch.float32))
    given = None if mask is None else mask.to(DEVICE)[None, None]
    call = (None, 0.0, mask is None, 0.25)

    def run(q, k, v, dout):
        out, lse = kernel("triton", "scaled_dot_product_attention_fwd")(q, k, v, given, *call)
        backward = kernel("triton", "scaled_dot_product_attention_bwd")
        return [out, *backward(dout, q, k, v, given, out, lse, *call, False)[:3]]

    query, key = 20, 15
    assert allowed[query].any() and not allowed[query].all() and not allowed[:, key].all()
    expected = run(*clean)
    for which in range(4):
        spoiled = [t.clone() for t in clean]
        spoiled[which][:, :, query if which in (0, 3) else key, 3] = bad
        rows = torch.zeros(40, dtype=torch.bool)  # the queries that see it
        if which in (0, 3):
            rows[query] = True
        else:
            rows |= allowed[:, key]
        keys = (allowed & rows[:, None]).any(0)  # and the keys whose gradients these make
        found = run(*spoiled)
        for name, one, other in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            untouched = ~(keys if name in ("dk", "dv") else rows).to(DEVICE)
            assert torch.equal(one[:, :, untouched], other[:, :, untouched]) or torch.allclose(
                one[:, :, untouched], other[:, :, untouched], rtol=1e-4, atol=1e-5
            ), (name, which)
        if which < 3:
            assert not found[0][:, :, rows].isfinite().all()


test_what_is_not_finite_reaches_only_who_may_see_it.long_in_interpreter = lambda way: way == "at once"
test_what_is_not_finite_reaches_only_who_may_see_it.full_in_interpreter = lambda bad, hiding: (
    bad != bad or hiding == "causal"
)


def test_the_gradient_of_a_mask_of_many_keys(check_contract):
    """It is made by the kernel that owns queries, block by block."""

    def of_mask(function):
        return lambda attn_mask, **tensors: function(**tensors, attn_mask=attn_mask)

    make = lambda g: qkv(g, 40, 300, heads=2) | {"attn_mask": normal(g, 1, 2, 40, 300)}  # noqa: E731
    check_contract("triton", of_mask(sdpa), of_mask(eager_sdpa), make, torch.float32)


@pytest.mark.parametrize("way_of", ["query", "value"])
def test_heads_that_are_too_wide(way_of):
    g = torch.Generator().manual_seed(0)
    made = qkv(g, 3, 3, dim=257 if way_of == "query" else 16, value_dim=16 if way_of == "query" else 300)
    q, k, v = (t.to(DEVICE, torch.float32) for t in made.values())
    found = 257 if way_of == "query" else 300
    message = f"{way_of}: expected heads of at most 256 for the backend triton, got {found}"
    with backends.use("triton"), pytest.raises(RuntimeError, match=message):
        sdpa(q, k, v)
