"""Attention where a kernel's blocks end: many keys, one head for many threads, and values that a mask hides."""

import math

import pytest
import torch
import torch.nn.functional as F

from pytorch_ext import backends, ops
from pytorch_ext.testing import cumulative, normal, padding_mask

OP = "scaled_dot_product_attention"


def qkv(generator, batch=1, heads=2, key_heads=None, q_len=40, k_len=1100, dim=16):
    shapes = {
        "query": (heads, q_len),
        "key": (key_heads or heads, k_len),
        "value": (key_heads or heads, k_len),
    }
    return {name: normal(generator, batch, *shape, dim) for name, shape in shapes.items()}


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    if request.param > 1 and "triton" in request.node.callspec.params.values():
        pytest.skip("PyTorch's threads have no part in what Triton runs")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "padded": {"attn_mask": padding_mask((1050,), 1100)[:, None, None]},
    "mask": {"attn_mask": torch.rand(40, 1100, generator=torch.Generator().manual_seed(7)) > 0.4},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 2)])
def test_many_keys(backend, threads, heads, key_heads, dtype, options, check_contract):
    """More than a kernel looks at in one pass; with one head, threads have to share it."""

    def of(function):
        def call(**tensors):
            moved = {
                name: t.to(tensors["query"].device) if name == "attn_mask" else t for name, t in given.items()
            }
            return function(**tensors, **moved, enable_gqa=True)

        given = OPTIONS[options]
        return call

    make = lambda g: qkv(g, heads=heads, key_heads=key_heads)  # noqa: E731
    ours, eager = ops.scaled_dot_product_attention, F.scaled_dot_product_attention
    check_contract(backend, of(ours), of(eager), make, dtype)


test_many_keys.not_in_interpreter = True


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_many_queries_and_keys(backend, threads, is_causal, check_contract):
    options = {"is_causal": is_causal}
    make = lambda g: qkv(g, heads=1, q_len=1100)  # noqa: E731
    call = lambda **t: ops.scaled_dot_product_attention(**t, **options)  # noqa: E731
    check_contract(
        backend, call, lambda **t: F.scaled_dot_product_attention(**t, **options), make, torch.float32
    )


test_many_queries_and_keys.not_in_interpreter = True


def test_the_first_keys_hidden_by_the_mask(backend, check_contract):
    """The first pass finds nothing, and what it leaves must not count."""
    keep = torch.arange(1100) >= 1000

    def of(function):
        return lambda query, key, value: function(query, key, value, keep.to(query.device).expand(40, 1100))

    check_contract(
        backend, of(ops.scaled_dot_product_attention), of(F.scaled_dot_product_attention), qkv, torch.float32
    )


test_the_first_keys_hidden_by_the_mask.not_in_interpreter = True


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("reach", "size"), [(40, 1.0), (59, 1.0), (59, 1e-25), (59, 1e30), (61, 1.0), (160, 1.0), (59, 0.0)]
)
def test_scores_far_from_0(backend, reach, size, is_causal, check_contract):
    """Powers of all scores of a query lie near 2^reach, or near 2^-reach: a kernel may know and use that."""

    def make(g):
        made = qkv(g, k_len=100, q_len=90)
        one = normal(g, 16)
        query, key = (F.normalize(one + 0.5 * made[name], dim=-1) for name in ("query", "key"))
        query[..., ::2, :] *= -1.0
        return {"query": query * reach * math.log(2.0) * 4.0, "key": key, "value": made["value"] * size}

    call = lambda **t: ops.scaled_dot_product_attention(**t, is_causal=is_causal)  # noqa: E731
    eager = lambda **t: F.scaled_dot_product_attention(**t, is_causal=is_causal)  # noqa: E731
    check_contract(backend, call, eager, make, torch.float32, gradients=False)


test_scores_far_from_0.not_in_interpreter = True


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("k_len", [70, 1100])
def test_values_hidden_from_some_queries(kernel_backend, k_len, bad, device_of):
    """Values that are not finite, at a key that half of the queries may attend: those alone see them."""
    device = device_of(kernel_backend)
    made = qkv(torch.Generator().manual_seed(0), k_len=k_len)
    keep = torch.ones(40, k_len, dtype=torch.bool)
    keep[:20, 33] = False
    outs = []
    for value in (None, bad):
        q, k, v = (t.to(device, torch.float32, copy=True) for t in made.values())
        if value is not None:
            v[:, :, 33, 5] = value
        leaves = [t.requires_grad_() for t in (q, k, v)]
        with backends.use(kernel_backend):
            out = ops.scaled_dot_product_attention(*leaves, keep.to(device))
        outs.append([out, *torch.autograd.grad(out[:, :, :20].sum(), leaves)])
    (clean, dq, _, dv), (found, found_dq, _, found_dv) = outs
    torch.testing.assert_close(found[:, :, :20], clean[:, :, :20])
    assert not found[:, :, 20:, 5].isfinite().any()
    others = torch.arange(16, device=device) != 5
    torch.testing.assert_close(found[..., others], clean[..., others])
    torch.testing.assert_close(found_dq[:, :, :20], dq[:, :, :20])
    torch.testing.assert_close(found_dv, dv)


test_values_hidden_from_some_queries.not_in_interpreter = lambda k_len: k_len > 1000


@pytest.mark.parametrize("k_len", [130, 1100])
@pytest.mark.parametrize("heads", [1, 3])
def test_backward_repeats_bit_for_bit(kernel_backend, threads, heads, k_len, device_of):
    made = qkv(torch.Generator().manual_seed(0), heads=heads, q_len=130, k_len=k_len).values()
    q, k, v = (t.to(device_of(kernel_backend), torch.float32).requires_grad_() for t in made)
    with backends.use(kernel_backend):
        out = ops.scaled_dot_product_attention(q, k, v)
    dout = torch.ones_like(out)
    first, *others = (torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for _ in range(5))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


test_backward_repeats_bit_for_bit.not_in_interpreter = lambda k_len: k_len > 1000


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_a_long_sequence_beside_short_ones(backend, threads, is_causal, check_contract):
    """Laid end to end, as views of one product of queries, keys and values."""
    if backends.why_not(backend, "varlen_attention"):
        pytest.skip("this backend has no attention without padding")
    lengths = [5, 1100, 0, 70]

    def ours(product):
        cu = cumulative(lengths, product.device)
        return ops.varlen_attention(*product.unbind(1), cu, cu, 1100, 1100, is_causal=is_causal)

    def eager(product):
        outs = []
        for one in product.split(lengths):
            q, k, v = (t.transpose(0, 1)[None] for t in one.unbind(1))
            outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)[0].transpose(0, 1))
        return torch.cat(outs)

    make = lambda g: {"product": normal(g, sum(lengths), 3, 2, 16)}  # noqa: E731
    check_contract(backend, ours, eager, make, torch.float32)


test_a_long_sequence_beside_short_ones.not_in_interpreter = True
