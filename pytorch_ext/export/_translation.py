"""What stands in an ONNX graph for our ops and for PyTorch's attention: standard ops alone, of any opset from 18 on.

Shapes: B batch, H heads, L queries, S keys, D head_dim, T tokens of all sequences laid end to end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

OLDEST, ATTENTION, GELU = 18, 23, 20  # the opsets of PyTorch's exporter, of Attention and of Gelu


def translation_table(opset: int = ATTENTION) -> dict[Callable, Callable]:
    """For ``torch.onnx.export(…, custom_translation_table=…)``, of graphs that hold ``pytorch_ext``'s raw ops.

    Attention is one ``Attention`` node from opset 23 on, and matrix products around a ``Softmax`` below it. Dropout has
    to be off, and statistics that only a backward pass needs are not there.

    Args:
        opset: 18 or later, the ``opset_version`` of the export.

    Raises:
        ValueError: an earlier ``opset``.
    """
    import onnxscript

    if opset < OLDEST:
        raise ValueError(f"opset: expected {OLDEST} or later, got {opset}")
    standard = Standard(onnxscript.values.Opset("", opset), opset)
    raw = torch.ops.pytorch_ext
    table: dict[Callable, Callable] = {
        getattr(raw, name).default: _function(getattr(standard, name))
        for name in dir(Standard)
        if name.endswith("_fwd")
    }
    table[torch.ops.aten.scaled_dot_product_attention.default] = _function(
        standard.scaled_dot_product_attention
    )
    return table


class Standard:
    """The ops of one opset; a method bears the name of the op that it stands for.

    Args:
        op: the opset as ``onnxscript`` writes it.
    """

    def __init__(self, op: Any, opset: int):
        self.op, self.opset = op, opset

    def scaled_dot_product_attention(
        self,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ):
        _without_dropout(dropout_p)
        scale = _static(query, -1) ** -0.5 if scale is None else scale
        return self._attention(query, key, value, attn_mask, is_causal, scale)

    def scaled_dot_product_attention_fwd(
        self, query, key, value, attn_mask, rng, dropout_p: float, is_causal: bool, scale: float, backend: str
    ):
        _without_dropout(dropout_p)
        out = self._attention(query, key, value, attn_mask, is_causal, scale)
        return out, self._nothing()

    def varlen_attention_fwd(
        self,
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        rng,
        dropout_p: float,
        is_causal: bool,
        scale: float,
        backend: str,
    ):
        """(T, H, D): dense attention over all tokens, in which nobody sees another sequence.

        Tokens behind the last sequence get zeros.
        """
        _without_dropout(dropout_p)
        op = self.op
        at_q, row_q = self._places(query, cu_seqlens_q)
        at_k, row_k = self._places(key, cu_seqlens_k)
        first, second = self._ints(1), self._ints(0)
        mask = op.Equal(op.Unsqueeze(row_q, first), op.Unsqueeze(row_k, second))  # (T_q, T_k)
        mask = op.And(mask, op.Unsqueeze(op.Less(row_k, op.Shape(cu_seqlens_k)), second))
        if is_causal:
            mask = op.And(mask, op.GreaterOrEqual(op.Unsqueeze(at_q, first), op.Unsqueeze(at_k, second)))
        q, k, v = (op.Unsqueeze(op.Transpose(t, perm=[1, 0, 2]), self._ints(0)) for t in (query, key, value))
        heads = _static(query, 1), _static(key, 1)
        out = self._attend(q, k, v, mask, False, scale, heads)
        return op.Transpose(op.Squeeze(out, self._ints(0)), perm=[1, 0, 2]), self._nothing()

    def layer_norm_fwd(self, input, normalized_shape: Sequence[int], weight, bias, eps: float, backend: str):
        return self._layer_norm(input, weight, bias, eps, len(normalized_shape))

    def dropout_add_layer_norm_fwd(
        self, input, residual, weight, bias, input_bias, rng, dropout_p: float, eps: float, backend: str
    ):
        _without_dropout(dropout_p)
        if input_bias is not None:
            input = self.op.Add(input, input_bias)
        sum = self.op.Add(residual, input)
        out, mean, rstd = self._layer_norm(sum, weight, bias, eps)
        return out, sum, mean, rstd

    def embedding_layer_norm_fwd(
        self,
        input_ids,
        token_type_ids,
        position_ids,
        word,
        position,
        token_type,
        weight,
        bias,
        rng,
        dropout_p: float,
        eps: float,
        backend: str,
    ):
        _without_dropout(dropout_p)
        x = self.op.Gather(word, input_ids)
        for table, ids in ((token_type, token_type_ids), (position, position_ids)):
            if table is not None:
                x = self.op.Add(x, self.op.Gather(table, ids))
        return self._layer_norm(x, weight, bias, eps)

    def gelu_fwd(self, input, approximate: str, backend: str):
        return self._gelu(input, approximate)

    def bias_gelu_fwd(self, input, bias, approximate: str, backend: str):
        return self._gelu(self.op.Add(input, bias), approximate)

    def linear_fwd(
        self, input, weight, bias, activation: str, keep_preactivation: bool, frozen: bool, backend: str
    ):
        out = before = self.op.MatMul(input, self.op.Transpose(weight, perm=[1, 0]))
        if bias is not None:
            out = before = self.op.Add(out, bias)
        if activation == "relu":
            out = self.op.Relu(before)
        elif activation != "none":
            out = self._gelu(before, "tanh" if activation == "gelu_tanh" else "none")
        return out, before if keep_preactivation else self._nothing()

    def _attention(self, query, key, value, attn_mask, is_causal: bool, scale: float):
        """(*, L, D) -> (*, L, D); with other than four dimensions as a batch of one, or of one head."""
        missing = 4 - len(query.shape)
        if missing < 0:
            raise ValueError(f"attention: expected at most 4 dimensions, got {len(query.shape)}")
        heads = (1, 1) if missing == 2 else (_static(query, -3), _static(key, -3))
        if missing == 0:
            return self._attend(query, key, value, attn_mask, is_causal, scale, heads)
        axes = self._ints(*range(missing))
        q, k, v = (self.op.Unsqueeze(t, axes) for t in (query, key, value))
        return self.op.Squeeze(self._attend(q, k, v, attn_mask, is_causal, scale, heads), axes)

    def _attend(self, query, key, value, mask, is_causal: bool, scale: float, heads: tuple[int, int]):
        """(B, H, L, D) and a mask that broadcasts to (B, H, L, S): bool, True where a query may attend, or added.

        ``heads``: those of queries and of keys; tensors that were made here do not know their shapes yet.
        """
        op = self.op
        if self.opset >= ATTENTION:
            if mask is not None:
                mask = self._by_query(mask, query, key)
            out, *_ = op.Attention(query, key, value, mask, is_causal=int(is_causal), scale=scale)
            return out
        if heads[0] != heads[1]:
            key, value = (self._repeated(t, *heads) for t in (key, value))
        if is_causal:
            mask = self._causal(query, key)
        half = self._like(math.sqrt(scale), query)
        scores = op.MatMul(op.Mul(query, half), op.Mul(op.Transpose(key, perm=[0, 1, 3, 2]), half))
        if mask is None:
            return op.MatMul(op.Softmax(scores, axis=-1), value)
        if not _is_bool(mask):
            scores = op.Add(scores, mask)
            mask = op.Greater(mask, self._like(-math.inf, query))
        else:
            scores = op.Where(mask, scores, self._like(-math.inf, query))
        # A query that may attend nothing gets zeros and not NaN.
        weights = op.Where(mask, op.Softmax(scores, axis=-1), self._like(0.0, query))
        return op.MatMul(weights, value)

    def _by_query(self, mask, query, key):
        """A mask that is the same for all queries, for each of them: ONNX Runtime does not repeat it by itself."""
        if mask.shape is None or (len(mask.shape) > 1 and mask.shape[-2] != 1):
            return mask
        # Of the mask where that says it too: then all layers share what is made here.
        same = _known(query, -2) is not None and _known(query, -2) == _known(key, -2)
        length = self.op.Shape(mask, start=-1) if same else self.op.Shape(query, start=2, end=3)
        return self.op.Expand(mask, self.op.Concat(length, self._ints(1), axis=0))

    def _causal(self, query, key):
        op = self.op
        shape = op.Concat(op.Shape(query, start=2, end=3), op.Shape(key, start=2, end=3), axis=0)
        ones = op.Expand(op.Constant(value_float=1.0), shape)
        return op.Cast(op.Trilu(ones, upper=0), to=9)  # bool

    def _repeated(self, x, heads: int, key_heads: int):
        """(B, key_heads, S, D) -> (B, heads, S, D), each head as often as it takes."""
        op = self.op
        wide = op.Expand(op.Unsqueeze(x, self._ints(2)), self._ints(1, 1, heads // key_heads, 1, 1))
        batch, rest = op.Shape(x, end=1), op.Shape(x, start=2)
        return op.Reshape(wide, op.Concat(batch, self._ints(heads), rest, axis=0))

    def _places(self, tokens, cu_seqlens):
        """Of each token its place in its sequence and the index of that, both (T,)."""
        op = self.op
        total = op.Squeeze(op.Shape(tokens, start=0, end=1), self._ints(0))
        at = op.Range(op.Constant(value_int=0), total, op.Constant(value_int=1))
        starts = op.Cast(cu_seqlens, to=7)  # int64 (B + 1,)
        begun = op.GreaterOrEqual(op.Unsqueeze(at, self._ints(1)), op.Unsqueeze(starts, self._ints(0)))
        sequence = op.ReduceSum(op.Cast(begun, to=7), self._ints(1), keepdims=0)  # from 1 on
        return op.Sub(at, op.Gather(starts, op.Sub(sequence, op.Constant(value_int=1)))), sequence

    def _layer_norm(self, input, weight, bias, eps: float, dims: int = 1):
        if weight is None:
            last = [_static(input, i) for i in range(-dims, 0)]
            weight = self.op.Expand(self._like(1.0, input), self._ints(*last))
        return self.op.LayerNormalization(input, weight, bias, axis=-dims, epsilon=eps)

    def _gelu(self, x, approximate: str):
        if self.opset >= GELU:
            return self.op.Gelu(x, approximate=approximate)
        op = self.op
        if approximate == "none":
            inner = op.Erf(op.Mul(x, self._like(math.sqrt(0.5), x)))
        else:
            cube = op.Mul(op.Mul(x, x), op.Mul(x, self._like(0.044715, x)))
            inner = op.Tanh(op.Mul(op.Add(x, cube), self._like(math.sqrt(2 / math.pi), x)))
        return op.Mul(op.Mul(x, self._like(0.5, x)), op.Add(inner, self._like(1.0, x)))

    def _like(self, value: float, x):
        return self.op.CastLike(self.op.Constant(value_float=value), x)

    def _ints(self, *values: int):
        return self.op.Constant(value_ints=list(values))

    def _nothing(self):
        """In place of statistics that only a backward pass reads."""
        return self.op.Constant(value_floats=[])


def _function(method: Callable) -> Callable:
    """PyTorch's exporter notes on each function what it found of its signature, which a bound method does not take."""

    @functools.wraps(method)
    def function(*args, **kwargs):
        return method(*args, **kwargs)

    return function


def _without_dropout(dropout_p: float) -> None:
    if dropout_p > 0.0:
        raise ValueError(
            f"dropout_p: expected 0 in an exported graph, got {dropout_p}: call model.eval() first"
        )


def _is_bool(mask) -> bool:
    return mask.dtype is None or mask.dtype.name == "BOOL"  # those that are made here have no dtype yet


def _known(value, dim: int) -> int | str | None:
    """The size of a dimension, or the name of a free one; None if there is neither."""
    if value.shape is None:
        return None
    size = value.shape[dim]
    return size if isinstance(size, int) else size.value


def _static(value, dim: int) -> int:
    size = value.shape[dim]
    if not isinstance(size, int):
        raise ValueError(
            f"dimension {dim} of {value.name}: expected a fixed size in an exported graph, got {size}"
        )
    return size
