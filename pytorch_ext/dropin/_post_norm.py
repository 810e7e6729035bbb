"""Layers that normalise after each residual sum, as BERT's do, whoever's classes they are made of.

Attention, linear, residual and LayerNorm; linear, activation, linear, residual and LayerNorm (Devlin et al. 2018, arXiv
1810.04805). What the fused layer would bypass is looked at in each call; where something is in the way (a hook, an
adapter, a parametrization), that block is called module by module.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..nn._whole import PostNorm, as_before, as_one
from . import _bypass as bypass
from ._attention import attend
from ._blocks import linear_activation, query_key_value, residual_norm
from ._by_tokens import Shared, fits, layer_by_tokens
from ._encoder import undisturbed
from ._padding import Packed, attention_mask
from ._swap import scope


class Sublayer(NamedTuple):
    """What ends each half of a layer: ``norm(dropout(dense(x)) + residual)``."""

    dense: nn.Module
    dropout: nn.Module
    norm: nn.Module


class PostNormParts(NamedTuple):
    """The modules of one layer: those that compute, and those that its own ``forward`` calls around them.

    Attributes:
        containers: the blocks whose own ``forward`` is not called.
        attention_dropout: a module whose rate the attention takes for its weights.
    """

    containers: tuple[nn.Module, ...]
    query: nn.Module
    key: nn.Module
    value: nn.Module
    head_dim: int
    attention_dropout: nn.Module
    attention_output: Sublayer
    up: nn.Module
    activation: Callable[[Tensor], Tensor]
    output: Sublayer


def _unhindered(parts: PostNormParts, containers: tuple[type[nn.Module], ...]) -> bool:
    """Whether the modules are all that there is to the layer, and can be computed with as they are."""
    first, second = parts.attention_output, parts.output
    return undisturbed(
        parts.containers,
        containers,
        (parts.attention_dropout, first.dropout, second.dropout),
        (
            *(parts.query, parts.key, parts.value, first.dense, first.norm),
            *(parts.up, parts.activation, second.dense, second.norm),
        ),
    )


def fused_layer(
    layer: nn.Module,
    parts_of: Callable[[nn.Module], PostNormParts],
    x: Tensor,
    mask: Tensor | None,
    packed: Packed | None,
    bias: Tensor | None = None,
) -> Tensor | None:
    """One layer on tokens ``(total_tokens, hidden)``, or on a padded batch ``(batch, seqlen, hidden)``.

    None where its own ``forward`` has to run, because something stands between its modules.
    """
    padded = packed is not None and x.dim() == 3
    with scope(layer):
        out = _on_tokens(layer, parts_of, packed.unpad(x) if padded else x, mask, packed, bias)
    return packed.pad(out) if padded and out is not None else out


def _on_tokens(
    layer: nn.Module,
    parts_of: Callable[[nn.Module], PostNormParts],
    x: Tensor,
    mask: Tensor | None,
    packed: Packed | None,
    bias: Tensor | None,
) -> Tensor | None:
    shared = isinstance(packed, Shared)
    plain = bias is None and not shared and (packed is not None or mask is None)
    whole = as_before(layer, x, packed) if plain else None
    if whole is not None:
        return whole
    parts = parts_of(layer)
    if not _unhindered(parts, layer.containers):
        return None
    if shared and bias is None and fits(parts):
        return layer_by_tokens(parts, x, packed)
    if shared:
        return packed.part(_on_tokens(layer, parts_of, packed.whole(x), None, packed.unshared, bias))
    whole = _as_one(layer, parts, x, packed) if plain else None
    if whole is not None:
        return whole
    rate = parts.attention_dropout
    context = attend(
        *query_key_value(layer, (parts.query, parts.key, parts.value), parts.head_dim, x),
        None if packed is not None else attention_mask(mask),
        packed,
        bypass.dropout_rate(rate) if rate.training else 0.0,
        bias=bias,
    )
    x = residual_norm(*parts.attention_output, context, x)
    hidden = linear_activation(parts.up, parts.activation, x)
    return residual_norm(*parts.output, hidden, x)


def _as_one(layer: nn.Module, parts: PostNormParts, x: Tensor, packed: Packed | None) -> Tensor | None:
    """The layer as one op, where a backend has it and nothing is in its way."""

    def of_three() -> PostNorm | None:
        three = (parts.query, parts.key, parts.value)
        first, second = parts.attention_output, parts.output
        if not all(map(bypass.plain_linear, (*three, first.dense))):
            return None
        return PostNorm(
            in_weights=[m.weight for m in three],
            in_biases=[m.bias for m in three],
            out=first.dense,
            norm1=first.norm,
            up=parts.up,
            activation=parts.activation,
            down=second.dense,
            norm2=second.norm,
            dropouts=(parts.attention_dropout, first.dropout, second.dropout),
        )

    return as_one(layer, x, packed, of_three, parts.head_dim)


def bert_parts(layer: nn.Module) -> PostNormParts:
    """Of a layer whose modules have BERT's names."""
    attention, intermediate, output = layer.attention, layer.intermediate, layer.output
    inner, self_output = attention.self, attention.output
    return PostNormParts(
        containers=(attention, inner, self_output, intermediate, output),
        query=inner.query,
        key=inner.key,
        value=inner.value,
        head_dim=inner.attention_head_size,
        attention_dropout=inner.dropout,
        attention_output=Sublayer(self_output.dense, self_output.dropout, self_output.LayerNorm),
        up=intermediate.dense,
        activation=intermediate.intermediate_act_fn,
        output=Sublayer(output.dense, output.dropout, output.LayerNorm),
    )
