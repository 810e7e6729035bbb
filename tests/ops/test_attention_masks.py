"""Attention under masks: every shape that broadcasts, rows with nothing to attend, and what a mask hides."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pytorch_ext import backends, ops
from pytorch_ext.testing import normal, padding_mask

OP = "scaled_dot_product_attention"
B, H, L, S, D = 2, 3, 5, 7, 8
SHAPES = [
    (),
    (1,),
    (S,),
    (1, 1),
    (L, 1),
    (1, S),
    (L, S),
    (H, 1, S),
    (H, L, S),
    (B, 1, 1, 1),
    (B, 1, 1, S),
    (B, 1, L, S),
    (1, H, L, S),
    (B, H, L, 1),
    (B, H, L, S),
]


def without_noise(function):
    """A mask that gives every key the same moves nothing: its gradient is zero but for rounding, and not compared."""

    def call(attn_mask, **tensors):
        same = attn_mask.dim() == 0 or attn_mask.shape[-1] == 1
        return function(**tensors, attn_mask=attn_mask.detach() if same else attn_mask)

    return call


def qkv(generator, batch=B, heads=H, q_len=L, k_len=S):
    sizes = {"query": q_len, "key": k_len, "value": k_len}
    return {name: normal(generator, batch, heads, n, D) for name, n in sizes.items()}


def sdpa(query, key, value, attn_mask):
    return ops.scaled_dot_product_attention(query, key, value, attn_mask)


def eager(query, key, value, attn_mask):
    # Written out in full: of fewer dimensions PyTorch's flash attention takes some and rejects others.
    full = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return F.scaled_dot_product_attention(query, key, value, full)


def composed(query, key, value, attn_mask):
    scores = query @ key.mT * query.shape[-1] ** -0.5 + attn_mask
    return torch.softmax(scores, -1) @ value


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bool_masks_of_every_shape(backend, shape, check_contract):
    def make(g):
        return qkv(g) | {"attn_mask": torch.rand(shape, generator=g) > 0.3}

    check_contract(backend, sdpa, eager, make, torch.float32)


test_bool_masks_of_every_shape.full_in_interpreter = lambda shape: len(shape) in (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float_masks_of_every_shape_and_their_gradients(backend, shape, dtype, check_contract):
    make = lambda g: qkv(g) | {"attn_mask": normal(g, *shape)}  # noqa: E731
    check_contract(backend, without_noise(sdpa), without_noise(eager), make, dtype)


test_float_masks_of_every_shape_and_their_gradients.full_in_interpreter = lambda shape, dtype: (
    dtype == torch.bfloat16 or len(shape) in (0, 3)
)


@pytest.mark.parametrize("floating", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("shape", [(1, 1, 1, S), (B, 1, 1, S), (1, 1, L, 1), (B, H, 1, S)], ids=str)
def test_expanded_masks(backend, shape, floating, check_contract):
    """Stride 0, as Hugging Face's masks are: ``(B, 1, 1, S)`` expanded over heads and queries."""

    def make(g):
        keep = torch.rand(shape, generator=g) > 0.3
        return qkv(g) | {"attn_mask": torch.where(keep, 0.0, -torch.inf).double() if floating else keep}

    def expanded(function):
        return lambda query, key, value, attn_mask: function(query, key, value, attn_mask.expand(B, H, L, S))

    # A mask of zeros and minus infinities has no gradient worth comparing: eager's is NaN in a row it hides.
    def detached(function):
        return lambda attn_mask, **tensors: expanded(function)(**tensors, attn_mask=attn_mask.detach())

    check_contract(backend, detached(sdpa), detached(eager), make, torch.float32)


@pytest.mark.parametrize("mask_scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_mask_beside_a_lower_dtype(backend, dtype, mask_scale, check_contract):
    """Distances and slopes reach the hundreds: rounded to bfloat16 they would be off by a half."""
    masks = {s: torch.randn(L, S, generator=torch.Generator().manual_seed(s)) * mask_scale for s in range(4)}

    def of(function):
        def call(seed, query, **tensors):
            mask = masks[int(seed)].to(query.device, torch.promote_types(query.dtype, torch.float32))
            return function(query, **tensors, attn_mask=mask)

        return call

    def make(g):
        return qkv(g) | {"seed": torch.tensor(g.initial_seed())}

    check_contract(backend, of(sdpa), of(eager), make, dtype)


@pytest.mark.parametrize("value", [-1e4, torch.finfo(torch.float32).min, 1e4])
def test_large_finite_masks(backend, value, check_contract):
    """Some hide with the most negative number instead of with infinity; a row of them is then no hidden row.

    Written out for the exact result, because flash attention's gradient of such a row is wrong in PyTorch, in float64
    too: its logarithm of the row's sum is lost beside that number.
    """

    def of(function):
        def call(keep, **tensors):
            mask = torch.where(keep, 0.0, value).to(tensors["query"].dtype)
            return function(**tensors, attn_mask=mask)

        return call

    def make(g):
        keep = torch.rand(B, 1, L, S, generator=g) > 0.3
        keep[0, 0, 1] = False
        return qkv(g) | {"keep": keep}

    check_contract(backend, of(sdpa), of(eager), make, torch.float32, exact=of(composed))


def hiding(kind, keep):
    return keep if kind == "bool" else torch.where(keep, 0.0, -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("hidden", ["row", "sequence", "everything"])
def test_a_query_that_may_attend_nothing(backend, hidden, kind, dtype, device_of):
    """Zeros, and zero gradients, never NaN."""
    keep = torch.ones(B, H, L, S, dtype=torch.bool)
    at = {"row": (0, 1, 2), "sequence": (1,), "everything": ()}[hidden]
    keep[at] = False
    device = device_of(backend)
    made = qkv(torch.Generator().manual_seed(0)).values()
    q, k, v = (t.to(device, dtype).requires_grad_() for t in made)
    with backends.use(backend):
        out = sdpa(q, k, v, hiding(kind, keep).to(device))
    assert not out[at].any()
    assert out.isfinite().all() and bool(out.any()) == (hidden != "everything")
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert not dq[at].any()
    assert all(g.isfinite().all() for g in (dq, dk, dv))
    if hidden != "row":
        assert not dk[at].any() and not dv[at].any()


KEYS = padding_mask((7, 4), S)  # the last three keys of the second sequence are padding
PADDING = {
    "(S,)": (KEYS[1], 0),  # one mask for the whole batch
    "(1, S)": (KEYS[1:], 0),
    "(B, 1, 1, S)": (KEYS[:, None, None], 1),
    "expanded": (KEYS[:, None, None], 1),
}
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("mask", PADDING)
def test_what_padding_holds_influences_nothing(backend, mask, kind, bad, device_of):
    keep, first = PADDING[mask]
    expand = (B, H, L, S) if mask == "expanded" else keep.shape
    check_hidden(backend, keep, slice(first, B), slice(4, S), kind, bad, device_of(backend), expand)


test_what_padding_holds_influences_nothing.full_in_interpreter = lambda bad: math.isinf(bad)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_whole_batch_entry_that_is_hidden_influences_nothing(backend, kind, bad, device_of):
    keep = torch.tensor([True, False]).view(B, 1, 1, 1)
    check_hidden(backend, keep, slice(1, B), slice(0, S), kind, bad, device_of(backend))


test_a_whole_batch_entry_that_is_hidden_influences_nothing.full_in_interpreter = lambda bad: math.isinf(bad)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_what_every_query_is_forbidden_influences_nothing(kernel_backend, kind, bad, device_of):
    """Also where the mask differs from query to query; `native` leaves that as PyTorch has it (docs/backends.md)."""
    keep = torch.rand(B, H, L, S, generator=torch.Generator().manual_seed(3)) > 0.4
    keep[1, :, :, 4:] = False
    check_hidden(kernel_backend, keep, slice(1, B), slice(4, S), kind, bad, device_of(kernel_backend))


test_what_every_query_is_forbidden_influences_nothing.full_in_interpreter = lambda bad: math.isinf(bad)


def check_hidden(backend, keep, entries, keys, kind, bad, device, expand=None):
    made = qkv(torch.Generator().manual_seed(0))
    spoiled = {name: t.clone() for name, t in made.items()}
    for name in ("key", "value"):
        spoiled[name][entries, :, keys] = bad

    def run(tensors):
        leaves = [t.to(device, torch.float32).requires_grad_() for t in tensors.values()]
        with backends.use(backend):
            mask = hiding(kind, keep).to(device)
            out = sdpa(*leaves, mask.expand(expand) if expand else mask)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    clean, found = run(made), run(spoiled)
    for one, other in zip(found, clean, strict=True):
        torch.testing.assert_close(one, other)
    _, _, dk, dv = found
    assert not dk[entries, :, keys].any() and not dv[entries, :, keys].any()


@pytest.mark.parametrize("bad", BAD)
def test_causality_hides_what_comes_later(kernel_backend, bad, device_of):
    made = qkv(torch.Generator().manual_seed(0), q_len=S)
    q, k, v = (t.to(device_of(kernel_backend), torch.float32) for t in made.values())
    spoiled_k, spoiled_v = k.clone(), v.clone()
    spoiled_k[:, :, 4], spoiled_v[:, :, 4] = bad, bad
    with backends.use(kernel_backend):
        clean = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
        found = ops.scaled_dot_product_attention(q, spoiled_k, spoiled_v, is_causal=True)
    torch.testing.assert_close(found[:, :, :4], clean[:, :, :4])
    assert not found[:, :, 4:].isfinite().all(-1).any(), "and those that may attend it are spoiled"


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_what_is_attended_comes_out_as_in_eager(backend, where, masked, bad, device_of):
    made = qkv(torch.Generator().manual_seed(0))
    made[where][0, 1, 2, 3] = bad
    mask = padding_mask((S, 4), S)[:, None, None].to(device_of(backend)) if masked else None
    tensors = [t.to(device_of(backend), torch.float32) for t in made.values()]
    with backends.use(backend):
        found = ops.scaled_dot_product_attention(*tensors, mask)
    # In whichever order the sums are taken: infinities make NaN in some and stay infinite in others.
    torch.testing.assert_close(found.isfinite(), F.scaled_dot_product_attention(*tensors, mask).isfinite())


def test_an_expanded_mask_without_queries(backend, device_of):
    made = qkv(torch.Generator().manual_seed(0), q_len=0)
    q, k, v = (t.to(device_of(backend), torch.float32) for t in made.values())
    mask = torch.ones(B, 1, 1, S, dtype=torch.bool, device=q.device).expand(B, H, 0, S)
    with backends.use(backend):
        assert sdpa(q, k, v, mask).shape == (B, H, 0, D)


FIVE = [(5, 7), (3, 5, 7), (3, 1, 7), (2, 3, 5, 7), (2, 1, 1, 7), (4, 2, 3, 1, 7), (4, 1, 1, 1, 1)]


@pytest.mark.parametrize("shape", FIVE, ids=str)
def test_masks_of_five_dimensional_queries(backend, shape, check_contract):
    def make(g):
        made = {name: normal(g, 4, 2, 3, n, D) for name, n in (("query", L), ("key", S), ("value", S))}
        return made | {"attn_mask": torch.rand(shape, generator=g) > 0.3}

    check_contract(backend, sdpa, eager, make, torch.float32)


test_masks_of_five_dimensional_queries.full_in_interpreter = lambda shape: shape != (4, 2, 3, 1, 7)


@pytest.mark.parametrize("shape", [(L, S), (B, 1, S), (B, L, S), (S,)], ids=str)
def test_masks_of_three_dimensional_queries(backend, shape, check_contract):
    def make(g):
        made = {name: normal(g, B, n, D) for name, n in (("query", L), ("key", S), ("value", S))}
        return made | {"attn_mask": torch.rand(shape, generator=g) > 0.3}

    check_contract(backend, sdpa, eager, make, torch.float32)


@st.composite
def mask_shapes(draw):
    full = [draw(st.integers(1, n)) for n in (3, 3, 9, 9)]
    return full, [n if draw(st.booleans()) else 1 for n in full][draw(st.integers(0, 3)) :]


@given(shapes=mask_shapes(), floating=st.booleans(), seed=st.integers(0, 99))
def test_any_mask(backend, check_contract, shapes, floating, seed):
    (batch, heads, q_len, k_len), shape = shapes

    def make(g):
        mask = normal(g, *shape) if floating else torch.rand(shape, generator=g) > 0.4
        return qkv(g, batch, heads, q_len, k_len) | {"attn_mask": mask}

    seeds = range(seed, seed + 4)
    check_contract(backend, without_noise(sdpa), without_noise(eager), make, torch.float32, seeds=seeds)


test_any_mask.full_in_interpreter = True
