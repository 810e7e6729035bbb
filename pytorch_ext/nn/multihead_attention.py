import math

import torch
from torch import Tensor, nn

from .. import ops
from . import _bypass as bypass
from ._attendance import Attendance, additive, attendance, check_masks
from ._rows import rows

NAMES = ("attn_mask", "key_padding_mask")

# The classes that compute nothing else; those that stand in for them add themselves.
ATTENTIONS: set[type[nn.Module]] = {nn.MultiheadAttention}


class MultiheadAttention(nn.MultiheadAttention):
    """As :class:`torch.nn.MultiheadAttention`, over :mod:`pytorch_ext.ops` (Vaswani et al. 2017, arXiv 1706.03762).

    Same constructor, parameters and masks, and the results of PyTorch's path for training in every mode: a query that
    may attend nothing gets zeros, or NaN where the weights are asked for, and ``is_causal`` without ``attn_mask`` is an
    error. With ``add_bias_kv`` or ``add_zero_attn``, and for nested tensors, PyTorch's own ``forward`` runs.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Query ``(N, L, E)``, or ``(L, N, E)`` without ``batch_first``, or ``(L, E)``; key and value likewise with S.

        Returns:
            The output in the shape of ``query``, and the weights ``(N, L, S)``, per head ``(N, H, L, S)``, or None.

        Raises:
            AssertionError, RuntimeError: shapes, dtypes and hints that do not fit, as PyTorch's raises them.
        """
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "is_causal": is_causal}
        weights = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
        if query.is_nested or key.is_nested or value.is_nested or why_original(self):
            return super().forward(query, key, value, **masks, **weights)
        check_masks(attn_mask, key_padding_mask, is_causal, NAMES)
        where = attendance(
            *(query, key, self.num_heads, attn_mask, key_padding_mask, is_causal),
            batch_first=self.batch_first,
            need_weights=need_weights,
        )
        if not where.fits or not inputs_fit(self, query, key, value):
            # PyTorch's path for inference would look less closely than the one for training.
            if query.dim() and query.shape[-1] != self.embed_dim:
                expected = f"embedding dimension {self.embed_dim}"
                raise AssertionError(f"query: expected {expected}, got shape {tuple(query.shape)}")
            return super().forward(query, key, value, **masks, **weights)
        if not need_weights:
            return project_out(self, attend(self, query, key, value, where)), None
        out, weights = _attend_with_weights(self, query, key, value, where)
        if average_attn_weights:
            weights = weights.mean(-3)
        return project_out(self, out), weights


ATTENTIONS.add(MultiheadAttention)


def why_original(attention: nn.MultiheadAttention) -> str | None:
    """Why PyTorch's own ``forward`` has to compute this attention; None if ours can."""
    if attention.bias_k is not None or attention.bias_v is not None:
        return "it adds a learned key and value (add_bias_kv)"
    if attention.add_zero_attn:
        return "it adds a key and value of zeros (add_zero_attn)"
    return None


def plain_attention(attention: nn.Module) -> bool:
    """Whether calling ``attention`` is what :func:`attend` and :func:`project_out` compute from its weights."""
    return type(attention) in ATTENTIONS and not bypass.hooked(attention) and why_original(attention) is None


def inputs_fit(attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the projections take these inputs; if not, PyTorch's own module has to say so."""
    if key.dim() != query.dim() or key.shape[:-1] != value.shape[:-1]:
        return False
    sizes = query.shape[-1], key.shape[-1], value.shape[-1]
    return sizes == (attention.embed_dim, attention.kdim, attention.vdim)


def attend(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, where: Attendance
) -> Tensor:
    """All of the attention but its last projection: (*, E)."""
    dropout = attention.dropout if attention.training else 0.0
    return where.attend(*_project(attention, query, key, value), dropout)


def project_out(attention: nn.MultiheadAttention, context: Tensor) -> Tensor:
    # As PyTorch does, which never calls out_proj as a module.
    return ops.linear(context, attention.out_proj.weight, attention.out_proj.bias)


def _project(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each (*, H, D): one product where the three, or two of them, are one tensor."""
    heads, size, bias = attention.num_heads, attention.embed_dim, attention.in_proj_bias
    if not attention._qkv_same_embed_dim:
        weights = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        inputs = zip((query, key, value), weights, biases, strict=True)
        return tuple(ops.linear(*three).unflatten(-1, (heads, -1)) for three in inputs)
    weight = attention.in_proj_weight
    if query is key and key is value:
        return ops.linear(query, weight, bias).unflatten(-1, (3, heads, -1)).unbind(-3)
    parts = 2 if key is value else 3
    sizes = (size, 2 * size) if parts == 2 else (size,) * 3
    biases = (None,) * parts if bias is None else bias.split(sizes)
    products = zip((query, key, value), rows(attention, weight, sizes), biases, strict=False)
    q, *rest = (ops.linear(*three) for three in products)
    if parts == 2:
        return q.unflatten(-1, (heads, -1)), *rest[0].unflatten(-1, (2, heads, -1)).unbind(-3)
    return tuple(t.unflatten(-1, (heads, -1)) for t in (q, *rest))


def _attend_with_weights(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, where: Attendance
) -> tuple[Tensor, Tensor]:
    """The output (*, E) and the weights (N, H, L, S), after dropout as PyTorch's are."""
    q, k, v = map(where.by_head, _project(attention, query, key, value))
    scale = math.sqrt(1.0 / q.shape[-1])
    flat_q, flat_k, flat_v = (t.reshape(-1, *t.shape[-2:]) for t in (q * scale, k, v))  # (N · H, L, D)
    if where.mask is None:
        scores = torch.bmm(flat_q, flat_k.mT)
    else:
        mask = where.mask if where.mask.dtype != torch.bool else additive(~where.mask, q.dtype)
        mask = mask.expand(*q.shape[:-1], k.shape[-2]).reshape(-1, q.shape[-2], k.shape[-2])
        scores = torch.baddbmm(mask, flat_q, flat_k.mT)
    weights = scores.softmax(-1)
    if attention.training and attention.dropout > 0.0:
        weights = nn.functional.dropout(weights, attention.dropout)
    out = torch.bmm(weights, flat_v).view(*q.shape[:-1], v.shape[-1])
    return where.by_token(out), weights.view(*q.shape[:-1], k.shape[-2])
