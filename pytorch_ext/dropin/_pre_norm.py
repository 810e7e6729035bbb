"""Layers that normalise before each half, as GPT-2's, ViT's and ModernBERT's do.

LayerNorm, attention, linear and residual; LayerNorm, feed-forward and residual (Xiong et al. 2020, arXiv 2002.04745).
The first sum and the LayerNorm after it are one op.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ._attention import attend
from ._blocks import layer_norm, residual_norm, residual_sum
from ._padding import Packed, flattened, note, pack_once
from ._swap import options_of

# Both halves of a layer as functions of what they are given: tokens to (query, key, value), and tokens to what the last
# linear of the feed-forward block takes.
Project = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
FeedForward = Callable[[Tensor], Tensor]


def pre_norm_layer(
    x: Tensor,
    project: Project,
    feed_forward: FeedForward,
    *,
    norm: nn.Module,
    out: tuple[nn.Module, nn.Module, nn.Module],
    down: tuple[nn.Module, nn.Module],
    mask: Tensor | None = None,
    packed: Packed | None = None,
    **attention,
) -> Tensor:
    """One layer on ``(batch, seqlen, hidden)``, inside without the padding where ``packed`` says where the tokens are.

    Args:
        norm: the first LayerNorm, or an identity.
        out: the linear after attention, its dropout, and the second LayerNorm.
        down: the last linear, and its dropout.
        mask: of dense attention.
        attention: as :func:`attend` takes it.
    """
    if packed is not None:
        x = packed.unpad(x)
    context = attend(*project(layer_norm(norm, x)), mask, packed, **attention)
    dense, dropout, second = out
    normed, x = residual_norm(dense, dropout, second, context, x, prenorm=True)
    x = residual_sum(*down, feed_forward(normed), x)
    return x if packed is None else packed.pad(x)


def where_tokens_are(
    layer: nn.Module, x: Tensor, mask: Tensor | None, kwargs: dict, *, first: bool
) -> tuple[Packed | None, Tensor | None]:
    """For a layer that removes padding for itself: see :func:`pack_once`; a batch may come without padding too."""
    packed = flattened(x, mask, kwargs)
    if packed is not None:
        if first:
            note(layer, "without padding: the batch came without it")
        return packed, None
    return pack_once(layer, x, mask, options_of(layer), first=first)


def at_tokens(table: Tensor, packed: Packed | None, x: Tensor) -> Tensor:
    """Rows of ``table`` ``(1 or batch, seqlen, *)`` for the tokens of ``x`` ``(batch, seqlen, hidden)``."""
    return table if packed is None else packed.unpad(table.expand(x.shape[0], *table.shape[1:]))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) in float32, half by half, as Hugging Face has them."""
    wide = x.float()
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
