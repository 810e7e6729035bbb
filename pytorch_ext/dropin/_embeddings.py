"""Word, position and token-type embeddings, their sum, LayerNorm and dropout as one op."""

import torch
from torch import Tensor, nn

from .. import ops
from . import _bypass as bypass
from ._blocks import needs_grad
from ._swap import scope


def plain_embeddings(embeddings: nn.Module) -> bool:
    tables = [embeddings.word_embeddings, embeddings.position_embeddings]
    if hasattr(embeddings, "token_type_embeddings"):
        tables.append(embeddings.token_type_embeddings)
    plain = all(map(bypass.plain_embedding, tables)) and bypass.plain_norm(embeddings.LayerNorm)
    return plain and bypass.plain_dropout(embeddings.dropout) and not bypass.hooked_everywhere()


def fused_embeddings(
    embeddings: nn.Module, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor
) -> Tensor:
    """The embeddings of ``input_ids`` ``(batch, seqlen)``; without token types where there is no table for them."""
    types = getattr(embeddings, "token_type_embeddings", None)
    if types is None:
        token_type_ids = None
    elif token_type_ids is None:
        token_type_ids = torch.zeros_like(position_ids)
    norm, dropout = embeddings.LayerNorm, embeddings.dropout
    with scope(embeddings):
        return ops.embedding_layer_norm(
            input_ids,
            token_type_ids,
            position_ids,
            embeddings.word_embeddings.weight,
            _position_table(embeddings.position_embeddings),
            None if types is None else types.weight,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            padding_idx=embeddings.word_embeddings.padding_idx,
            dropout_p=bypass.dropout_rate(dropout),
            training=dropout.training,
        )


def positions_after_padding(input_ids: Tensor, padding_idx: int, before: int = 0) -> Tensor:
    """RoBERTa's position ids: real tokens count from ``padding_idx + 1`` on, padding stays at ``padding_idx``."""
    real = input_ids.ne(padding_idx).int()
    counted = (torch.cumsum(real, dim=1).type_as(real) + before) * real
    return counted.long() + padding_idx


def _position_table(positions: nn.Embedding) -> Tensor:
    """Its weight, of which the row ``padding_idx`` gets no gradient: the op knows of the word table's alone."""
    weight, row = positions.weight, positions.padding_idx
    if row is None or not needs_grad(weight):
        return weight
    return torch.cat((weight[:row], weight[row : row + 1].detach(), weight[row + 1 :]))
