import functools

from torch import Tensor, nn

from ._adopt import adopt
from ._attendance import Attendance, check_masks
from ._blocks import add_norm, layer_norm, linear_activation, linear_product
from ._layer import attendance_of, attention_block, calls_its_modules, feed_forward

Masks = tuple[Tensor | None, Tensor | None, bool]


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """As :class:`torch.nn.TransformerDecoderLayer`, over :mod:`pytorch_ext.ops`.

    Self-attention, attention to the memory and a feed-forward block, each with dropout, a residual connection and
    LayerNorm (Vaswani et al. 2017, arXiv 1706.03762), fused as in :class:`TransformerEncoderLayer`.
    """

    @functools.wraps(nn.TransformerDecoderLayer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        adopt((self.self_attn, self.multihead_attn, self.norm1, self.norm2, self.norm3))

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Tgt ``(N, L, E)`` and memory ``(N, S, E)``, or ``(L, N, E)`` and ``(S, N, E)``, or ``(L, E)`` and ``(S, E)``.

        Raises:
            AssertionError, RuntimeError: shapes, dtypes and hints that do not fit, as PyTorch's raises them.
        """
        if tgt.is_nested or memory.is_nested:
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            return super().forward(tgt, memory, *masks, tgt_is_causal, memory_is_causal)
        own, cross = tgt_key_padding_mask, memory_key_padding_mask
        if not isinstance(own, Attendance):
            masks = tgt_mask, tgt_key_padding_mask, tgt_is_causal
            check_masks(*masks, ("tgt_mask", "tgt_key_padding_mask"))
            own = attendance_of(self.self_attn, tgt, tgt, *masks)
        if not isinstance(cross, Attendance):
            masks = memory_mask, memory_key_padding_mask, memory_is_causal
            check_masks(*masks, ("memory_mask", "memory_key_padding_mask"))
            cross = attendance_of(self.multihead_attn, tgt, memory, *masks)
        if calls_its_modules(self, nn.TransformerDecoderLayer, ("_sa_block", "_mha_block", "_ff_block")):
            masks = own.for_modules(tgt.dtype), cross.for_modules(tgt.dtype)
            return own.taken(_call_modules(self, own.shown(tgt), cross.shown(memory), *masks))
        if self.norm_first:
            return _norm_first(self, tgt, memory, own, cross)
        return _norm_last(self, tgt, memory, own, cross)


def _norm_last(
    layer: nn.TransformerDecoderLayer, x: Tensor, memory: Tensor, own: Attendance, cross: Attendance
) -> Tensor:
    ends = layer.dropout1, layer.norm1
    y, bias = attention_block(layer.self_attn, x, x, own, x, *ends)
    x = add_norm(y, bias, x, *ends)
    ends = layer.dropout2, layer.norm2
    y, bias = attention_block(layer.multihead_attn, x, memory, cross, x, *ends)
    x = add_norm(y, bias, x, *ends)
    ends = layer.dropout3, layer.norm3
    y, bias = linear_product(feed_forward(layer, x), layer.linear2, x, *ends)
    return add_norm(y, bias, x, *ends)


def _norm_first(
    layer: nn.TransformerDecoderLayer, x: Tensor, memory: Tensor, own: Attendance, cross: Attendance
) -> Tensor:
    y, ends = layer_norm(layer.norm1, x), (layer.dropout1, layer.norm2)
    y, bias = attention_block(layer.self_attn, y, y, own, x, *ends)
    y, x = add_norm(y, bias, x, *ends, prenorm=True)
    ends = layer.dropout2, layer.norm3
    y, bias = attention_block(layer.multihead_attn, y, memory, cross, x, *ends)
    y, x = add_norm(y, bias, x, *ends, prenorm=True)
    return x + layer.dropout3(linear_activation(layer.linear2, None, feed_forward(layer, y)))


def _call_modules(
    layer: nn.TransformerDecoderLayer, x: Tensor, memory: Tensor, own: Masks, cross: Masks
) -> Tensor:
    if layer.norm_first:
        x = x + layer._sa_block(layer.norm1(x), *own)
        x = x + layer._mha_block(layer.norm2(x), memory, *cross)
        return x + layer._ff_block(layer.norm3(x))
    x = layer.norm1(x + layer._sa_block(x, *own))
    x = layer.norm2(x + layer._mha_block(x, memory, *cross))
    return layer.norm3(x + layer._ff_block(x))
