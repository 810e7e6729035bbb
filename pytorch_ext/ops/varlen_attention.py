"""Attention over sequences without padding, laid end to end."""

import torch
from torch import Tensor

from ..backends import choose
from ..backends.native.varlen_attention import varlen_attention as native
from . import _checks as check
from ._autocast import lowered
from ._direct import direct
from ._raw import apply, call, define, draw_rng, first_order, statistics_dtype, wants_grad


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention within each of many sequences; the names are flash-attn's (Dao 2023, arXiv 2307.08691).

    Args:
        query: ``(total_q, query_heads, head_dim)``.
        key: ``(total_k, key_heads, head_dim)``; ``key_heads`` divides ``query_heads``.
        value: ``(total_k, key_heads, value_dim)``.
        cu_seqlens_q, cu_seqlens_k: int32 ``(batch + 1,)``: 0, then the running sum of the sequences' lengths. Pass the
            same tensor twice for self-attention.
        max_seqlen_q, max_seqlen_k: at least the longest length.
        dropout_p: the probability of zeroing an attention weight, applied whenever it is above 0.
        is_causal: query ``i`` of a sequence attends its keys 0 to ``i`` (upper-left alignment, as SDPA's).
        scale: of the scores; ``head_dim ** -0.5`` by default.

    Returns:
        ``(total_q, query_heads, value_dim)``. A query of a sequence without keys gets zeros.

    Raises:
        ValueError: ``dropout_p`` outside [0, 1]; ``cu_seqlens`` that does not start at 0, decreases, or does not end at
            the number of tokens; a ``max_seqlen`` that is too small (the values are read on the CPU alone: a GPU would
            have to be waited for).
        RuntimeError: a shape, dtype or device that does not fit.
    """
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out = direct("varlen_attention", query, key, value, *lengths, dropout_p, is_causal, scale)
    if out is not None:
        return out
    _check(query, key, value, dropout_p)
    _check_cu_seqlens("q", cu_seqlens_q, max_seqlen_q, "query", query)
    if cu_seqlens_k is not cu_seqlens_q or max_seqlen_k != max_seqlen_q or key.shape[0] != query.shape[0]:
        _check_cu_seqlens("k", cu_seqlens_k, max_seqlen_k, "key", key)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            check.shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape)
    backend = choose("varlen_attention", query, key, value)
    if backend == "native":
        return native(query, key, value, *lengths, dropout_p, is_causal, scale)
    query, key, value = lowered(query, key, value)
    if scale is None:
        scale = max(query.shape[-1], 1) ** -0.5
    rng = draw_rng(query) if dropout_p > 0.0 else None
    if wants_grad(query, key, value):
        inputs = (query, key, value, *lengths, rng, dropout_p, is_causal, scale, backend)
        return apply(VarlenAttentionFunction, "varlen_attention", *inputs)
    return call(varlen_attention_fwd, query, key, value, *lengths, rng, dropout_p, is_causal, scale, backend)[
        0
    ]


def _check(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> None:
    check.floating("query", query)
    check.dims("query", query, 3, "(total_q, query_heads, head_dim)")
    if not (check.fits(key, query, query.shape) and check.fits(value, query, query.shape)):
        _check_shapes(query, key, value)
    check.probability("dropout_p", dropout_p)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, t in (("key", key), ("value", value)):
        check.floating(name, t)
        check.dims(name, t, 3, "(total_k, key_heads, head_dim)")
        check.same_device("query", query, name, t)
        check.same_dtype("query", query, name, t)
    if key.shape[2] != query.shape[2]:
        raise RuntimeError(
            f"key: expected head_dim {query.shape[2]} as query has, got shape {tuple(key.shape)}"
        )
    if value.shape[:2] != key.shape[:2]:
        raise RuntimeError(
            f"value: expected shape (*{tuple(key.shape[:2])}, value_dim), got {tuple(value.shape)}"
        )
    if query.shape[1] != key.shape[1] and (key.shape[1] == 0 or query.shape[1] % key.shape[1]):
        expected = f"a number of heads that divides {query.shape[1]}"
        raise RuntimeError(f"key: expected {expected}, got shape {tuple(key.shape)}")


def _check_cu_seqlens(which: str, cu_seqlens: Tensor, max_seqlen: int, name: str, tokens: Tensor) -> None:
    argument = f"cu_seqlens_{which}"
    check.tensor(argument, cu_seqlens)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        found = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        raise RuntimeError(f"{argument}: expected torch.int32 of shape (batch + 1,), got {found}")
    check.same_device(name, tokens, argument, cu_seqlens)
    if not check.readable(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != tokens.shape[0]:
        expected = f"values from 0 to {tokens.shape[0]}, the tokens in {name}"
        raise ValueError(f"{argument}: expected {expected}, got {ends[0]} to {ends[-1]}")
    longest = 0
    for i in range(len(ends) - 1):
        if ends[i + 1] < ends[i]:
            raise ValueError(
                f"{argument}: expected values that never decrease, got {ends[i]} then {ends[i + 1]}"
            )
        longest = max(longest, ends[i + 1] - ends[i])
    if max_seqlen < longest:
        raise ValueError(
            f"max_seqlen_{which}: expected at least the longest length, {longest}, got {max_seqlen}"
        )


def _fwd_fake(
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    rng,
    dropout_p,
    is_causal,
    scale,
):
    total, heads, _ = query.shape
    return query.new_empty(total, heads, value.shape[2]), query.new_empty(
        heads, total, dtype=statistics_dtype(query)
    )


def _bwd_fake(
    dout,
    query,
    key,
    value,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    rng,
    dropout_p,
    is_causal,
    scale,
):
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


varlen_attention_fwd = define(
    "varlen_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? rng, float dropout_p, bool is_causal, float scale, str backend)"
    " -> (Tensor out, Tensor lse)",
    _fwd_fake,
)
varlen_attention_bwd = define(
    "varlen_attention_bwd(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
    " Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? rng,"
    " float dropout_p, bool is_causal, float scale, str backend) -> (Tensor dquery, Tensor dkey, Tensor dvalue)",
    _bwd_fake,
)


class VarlenAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        rng,
        dropout_p,
        is_causal,
        scale,
        backend,
    ):
        constants = (dropout_p, is_causal, scale, backend)
        out, lse = call(
            varlen_attention_fwd,
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            rng,
            *constants,
        )
        ctx.save_for_backward(query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, rng)
        ctx.max_seqlens, ctx.constants = (max_seqlen_q, max_seqlen_k), constants
        return out

    @staticmethod
    @first_order
    def backward(ctx, dout):
        *tensors, rng = ctx.saved_tensors
        gradients = call(varlen_attention_bwd, dout, *tensors, *ctx.max_seqlens, rng, *ctx.constants)
        return *gradients, *(None,) * 9
