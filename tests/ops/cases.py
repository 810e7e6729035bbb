"""One small call of each op, for `test_every_op_*`."""

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pytorch_ext import ops
from pytorch_ext.testing import cumulative, normal, padding_mask


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on small tensors: ``ours`` and, from PyTorch's own ops, ``eager``, both without dropout."""

    name: str
    op: str
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    eager: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[..., dict[str, Tensor]]  # from a generator and the scale and offset of a regime
    dtype: torch.dtype = torch.float32  # where a test has none of its own


def _norm_inputs(generator, **regime):
    return {
        "input": normal(generator, 6, 40, **regime),
        "weight": normal(generator, 40) + 1.0,
        "bias": normal(generator, 40),
    }


def _add_norm_inputs(generator, **regime):
    return {
        **_norm_inputs(generator, **regime),
        "residual": normal(generator, 6, 40, **regime),
        "input_bias": normal(generator, 40, **regime),
    }


def _add_norm(input, weight, bias, residual, input_bias, prenorm=False):
    return ops.dropout_add_layer_norm(input, residual, weight, bias, input_bias=input_bias, prenorm=prenorm)


def _eager_add_norm(input, weight, bias, residual, input_bias, prenorm=False):
    sum = residual + (input + input_bias)
    out = F.layer_norm(sum, sum.shape[-1:], weight, bias)
    return (out, sum) if prenorm else out


def _linear_inputs(generator, **regime):
    return {
        "input": normal(generator, 5, 3, 24, **regime),
        "weight": normal(generator, 17, 24, scale=0.2),
        "bias": normal(generator, 17),
    }


def _embedding_inputs(generator, **regime):
    return {
        "input_ids": torch.randint(11, (3, 7), generator=generator),
        "token_type_ids": torch.randint(2, (3, 7), generator=generator),
        "position_ids": torch.arange(7),
        "word": normal(generator, 11, 24, **regime),
        "position": normal(generator, 9, 24, **regime),
        "token_type": normal(generator, 2, 24, **regime),
        "weight": normal(generator, 24) + 1.0,
        "bias": normal(generator, 24),
    }


def _eager_embedding(
    input_ids, token_type_ids, position_ids, word, position, token_type, weight, bias
) -> Tensor:
    x = F.embedding(input_ids, word) + F.embedding(token_type_ids, token_type)
    x = x + F.embedding(position_ids, position)
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-12)


def _attention_inputs(generator, dim=20, **regime):
    # Sizes that eager PyTorch's flash attention takes: against it, not against slower paths, the error is held.
    return {
        "query": normal(generator, 3, 4, 9, dim, **regime),
        "key": normal(generator, 3, 2, 13, dim, **regime),
        "value": normal(generator, 3, 2, 13, dim, **regime),
        "attn_mask": padding_mask((13, 5, 1), 13)[:, None, None, :],
    }


def _causal_inputs(generator, **sizes):
    return {name: t for name, t in _attention_inputs(generator, **sizes).items() if name != "attn_mask"}


def _varlen_inputs(generator, dim=20, **regime):
    return {
        "query": normal(generator, 11, 4, dim, **regime),
        "key": normal(generator, 14, 2, dim, **regime),
        "value": normal(generator, 14, 2, dim, **regime),
        "cu_seqlens_q": cumulative((4, 0, 1, 6)),
        "cu_seqlens_k": cumulative((5, 2, 1, 6)),
    }


def _varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, **options):
    return ops.varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, 6, 6, **options)


def _eager_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, **options):
    outs = []
    for i in range(len(cu_seqlens_q) - 1):
        at_q, at_k = slice(*cu_seqlens_q[i : i + 2].tolist()), slice(*cu_seqlens_k[i : i + 2].tolist())
        one = [t.transpose(0, 1)[None] for t in (query[at_q], key[at_k], value[at_k])]
        outs.append(F.scaled_dot_product_attention(*one, enable_gqa=True, **options)[0].transpose(0, 1))
    return torch.cat(outs)


CASES = [
    Case(
        "layer_norm",
        "layer_norm",
        lambda input, **p: ops.layer_norm(input, input.shape[-1:], **p),
        lambda input, **p: F.layer_norm(input, input.shape[-1:], **p),
        _norm_inputs,
    ),
    Case("add_norm", "dropout_add_layer_norm", _add_norm, _eager_add_norm, _add_norm_inputs),
    Case(
        "prenorm",
        "dropout_add_layer_norm",
        functools.partial(_add_norm, prenorm=True),
        functools.partial(_eager_add_norm, prenorm=True),
        _add_norm_inputs,
    ),
    Case(
        "gelu",
        "gelu",
        lambda input: ops.gelu(input),
        lambda input: F.gelu(input),
        lambda generator, **regime: {"input": normal(generator, 6, 40, **regime)},
    ),
    Case(
        "bias_gelu",
        "bias_gelu",
        lambda input, bias: ops.bias_gelu(input, bias, "tanh"),
        lambda input, bias: F.gelu(input + bias, approximate="tanh"),
        lambda generator, **r: {"input": normal(generator, 6, 40, **r), "bias": normal(generator, 40, **r)},
    ),
    Case(
        "linear",
        "linear",
        lambda input, weight, bias: ops.linear(input, weight, bias),
        lambda input, weight, bias: F.linear(input, weight, bias),
        _linear_inputs,
    ),
    Case(
        "linear_gelu",
        "linear",
        lambda input, weight, bias: ops.linear(input, weight, bias, "gelu"),
        lambda input, weight, bias: F.gelu(F.linear(input, weight, bias)),
        _linear_inputs,
    ),
    Case(
        "embedding",
        "embedding_layer_norm",
        lambda **t: ops.embedding_layer_norm(**t, eps=1e-12),
        _eager_embedding,
        _embedding_inputs,
    ),
    Case(
        "attention",
        "scaled_dot_product_attention",
        lambda **t: ops.scaled_dot_product_attention(**t, enable_gqa=True),
        lambda **t: F.scaled_dot_product_attention(**t, enable_gqa=True),
        _attention_inputs,
    ),
    Case(
        "causal",
        "scaled_dot_product_attention",
        lambda **t: ops.scaled_dot_product_attention(**t, is_causal=True, enable_gqa=True),
        lambda **t: F.scaled_dot_product_attention(**t, is_causal=True, enable_gqa=True),
        _causal_inputs,
    ),
    Case("varlen", "varlen_attention", _varlen, _eager_varlen, _varlen_inputs),
    Case(
        "varlen_causal",
        "varlen_attention",
        functools.partial(_varlen, is_causal=True),
        functools.partial(_eager_varlen, is_causal=True),
        _varlen_inputs,
    ),
]
