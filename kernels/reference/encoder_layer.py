"""A layer of an encoder that normalises after residual sums (Devlin et al. 2018, arXiv 1810.04805), for inference."""

import torch
from torch import Tensor

from .dropout_add_layer_norm import dropout_add_layer_norm_fwd
from .linear import linear_fwd
from .varlen_attention import varlen_attention_fwd


def encoder_layer_fwd(
    input: Tensor,
    in_weights: list[Tensor],
    in_biases: list[Tensor],
    out_weight: Tensor,
    out_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    heads: int,
    activation: str,
    is_causal: bool,
    scale: float,
    eps1: float,
    eps2: float,
) -> Tensor:
    """Tokens ``(total_tokens, hidden)`` of sequences end to end, through attention and feed-forward block."""
    # Three weights of Q, K and V, or one that has all rows.
    products = [_linear(input, w, b) for w, b in zip(in_weights, in_biases, strict=True)]
    # (total_tokens, 3, heads, head_dim)
    q, k, v = torch.cat(products, -1).unflatten(-1, (3, heads, -1)).unbind(1)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    context, _ = varlen_attention_fwd(q, k, v, *lengths, None, 0.0, is_causal, scale)
    y = _linear(context.flatten(1), out_weight, None)
    x = _add_norm(y, input, norm1_weight, norm1_bias, out_bias, eps1)
    y = _linear(_linear(x, up_weight, up_bias, activation), down_weight, None)
    return _add_norm(y, x, norm2_weight, norm2_bias, down_bias, eps2)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    return linear_fwd(x, weight, bias, activation, False, True)[0]


def _add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, x_bias: Tensor, eps: float
) -> Tensor:
    return dropout_add_layer_norm_fwd(x, residual, weight, bias, x_bias, None, 0.0, eps)[0]
