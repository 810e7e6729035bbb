"""``attn_implementation="pytorch_ext"``: attention over our ops, and a mask function that leaves the 2-D mask as it is.

Imported with every stand-in, so that a model that comes out of a pickle finds it registered. Without the mask function
the padding mask would be dropped in silence.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.utils import output_capturing

from ... import ops
from .._attention import biased, limited
from .._huggingface import NAME
from .._padding import attention_mask as four_dimensional
from .._padding import same_sequence

# Their attention modules say by themselves, in each call, that they are causal or how wide their window is.
_CAUSAL = {"gpt2"}
_WINDOWED = {"modernbert"}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Query, key and value ``(batch, heads, length, head_dim)`` -> output ``(batch, q_len, heads, head_dim)``.

    Args:
        attention_mask: what :func:`mask` made: None, 2-D ``(batch, k_len)``, or 4-D, bool or added.
        kwargs: ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k`` say where the sequences of a
            flattened batch lie; ``softcap``, ``position_bias`` and ``sliding_window`` as the models pass them. Where
            there is a 4-D mask it holds the window already.

    Returns:
        The output, and the weights if ``output_attentions`` asks for them, else None.

    Raises:
        ValueError: ``s_aux``, a logit that every query attends beside its keys.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"s_aux: expected None with attn_implementation={NAME!r}, got a tensor")
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    causal = causal and query.shape[2] > 1 and (attention_mask is None or attention_mask.dim() == 2)
    softcap, weights_too = kwargs.get("softcap"), bool(kwargs.get("output_attentions")) or weights_recorded()
    window = _window(query, key, attention_mask, kwargs)
    composed = weights_too or softcap is not None
    limited_by_lengths_alone = (
        attention_mask is None and window is None and kwargs.get("position_bias") is None
    )
    if _is_flattened(query, kwargs) and limited_by_lengths_alone and not composed:
        return _varlen(query, key, value, dropout, causal, scaling, kwargs), None
    mask = _limits(query, key, attention_mask, causal, window, kwargs)
    causal = causal and mask is None
    if kwargs.get("position_bias") is not None:
        if causal:
            mask, causal = _before(query, key), False
        mask = biased(kwargs["position_bias"], mask)
    if composed:
        weights = _weights(query, key, mask, scaling, causal, softcap)
        weights = nn.functional.dropout(weights, dropout)
        groups = query.shape[1] // value.shape[1]
        out = (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous()
        return out, weights if weights_too else None
    gqa = query.shape[1] != key.shape[1]
    out = ops.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scaling, gqa)
    return out.transpose(1, 2).contiguous(), None


def mask(*args, mask_function, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """The 2-D mask itself where it is all that there is to say, else the 4-D one that SDPA takes."""
    if mask_function is masking_utils.bidirectional_mask_function:
        return attention_mask
    family = getattr(kwargs.get("config"), "model_type", None)
    usual = not kwargs.get("use_vmap", False)  # else the caller has put functions of its own over it
    if family in _WINDOWED and usual and kwargs.get("local_size") is not None:
        return attention_mask
    causal = family in _CAUSAL and usual and mask_function is masking_utils.causal_mask_function
    seen = causal and attention_mask is not None and _covers(attention_mask, kwargs)
    # Without padding SDPA's mask function says None, which attention takes for causal.
    if seen and (torch.compiler.is_compiling() or not attention_mask.all()):
        return attention_mask
    return masking_utils.sdpa_mask(
        *args, mask_function=mask_function, attention_mask=attention_mask, **kwargs
    )


def weights_recorded() -> bool:
    """Whether a call asked for attention weights, for models that do not hand the question down."""
    if torch.compiler.is_compiling():
        return False
    recorded = output_capturing._active_collector.get()
    return recorded is not None and "attentions" in recorded


def _covers(attention_mask: Tensor, kwargs: dict) -> bool:
    """Whether the queries are the keys: no cache holds others."""
    length = kwargs.get("q_length")
    first = isinstance(kwargs.get("q_offset", 0), int) and kwargs.get("q_offset", 0) == 0
    return (
        first and attention_mask.dim() == 2 and length == kwargs.get("kv_length") == attention_mask.shape[1]
    )


def _is_flattened(query: Tensor, kwargs: dict) -> bool:
    return kwargs.get("cu_seq_lens_q") is not None and query.shape[0] == 1


def _window(query: Tensor, key: Tensor, attention_mask: Tensor | None, kwargs: dict) -> int | None:
    """How far a query sees, if it is less than to every key and no mask says so."""
    window = kwargs.get("sliding_window")
    unsaid = attention_mask is None or attention_mask.dim() == 2
    if window is None or not unsaid or query.shape[2] != key.shape[2] or key.shape[2] <= window:
        return None
    return window


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    causal: bool,
    scaling: float | None,
    kwargs: dict,
) -> Tensor:
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    cu_seqlens_q, longest_q = _sequences(q, kwargs, "q")
    same = kwargs.get("cu_seq_lens_k") is None or kwargs["cu_seq_lens_k"] is kwargs["cu_seq_lens_q"]
    cu_seqlens_k, longest_k = (cu_seqlens_q, longest_q) if same else _sequences(k, kwargs, "k")
    out = ops.varlen_attention(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k),
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
    )
    return out[None]


def _sequences(tokens: Tensor, kwargs: dict, which: str) -> tuple[Tensor, int]:
    cu_seqlens, longest = kwargs[f"cu_seq_lens_{which}"].to(torch.int32), kwargs.get(f"max_length_{which}")
    return cu_seqlens, tokens.shape[0] if longest is None else int(longest)


def _limits(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    window: int | None,
    kwargs: dict,
) -> Tensor | None:
    """All that keeps a query from a key, as one mask; None if nothing does, or causality alone."""
    found = four_dimensional(attention_mask)
    limits = []
    if _is_flattened(query, kwargs):
        limits.append(same_sequence(kwargs["cu_seq_lens_q"], query.shape[2]))
    if window is not None:
        at = torch.arange(key.shape[2], device=query.device)
        limits.append((at[:, None] - at).abs() < window)
    if causal and (found is not None or limits):
        limits.append(_before(query, key))
    for limit in limits:
        found = limit if found is None else limited(found, limit)
    return found


def _before(query: Tensor, key: Tensor) -> Tensor:
    shape = query.shape[2], key.shape[2]
    return torch.ones(shape, dtype=torch.bool, device=query.device).tril()


def _weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    causal: bool,
    softcap: float | None,
) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = _before(query, key)
    wide = torch.promote_types(query.dtype, torch.float32)
    if mask is None:
        return scores.softmax(-1, dtype=wide).to(query.dtype)
    if mask.dtype != torch.bool:
        return (scores + mask).softmax(-1, dtype=wide).to(query.dtype)
    # A row with nothing to attend gives zeros; filled before the softmax too, or its gradient would be NaN.
    nothing = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~(mask | nothing), -torch.inf)
    return scores.softmax(-1, dtype=wide).to(query.dtype).masked_fill(nothing, 0.0)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
