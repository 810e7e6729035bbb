import functools

from torch import Tensor, nn

from ._adopt import adopt
from ._attendance import Attendance, check_masks
from ._blocks import add_norm, layer_norm, linear_activation, linear_product
from ._layer import attendance_of, attention_block, calls_its_modules, feed_forward
from ._whole import PostNorm, as_before, as_one
from .multihead_attention import inputs_fit, plain_attention


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """As :class:`torch.nn.TransformerEncoderLayer`, over :mod:`pytorch_ext.ops`.

    Self-attention and a feed-forward block, each with dropout, a residual connection and LayerNorm (Vaswani et al.
    2017, arXiv 1706.03762; ``norm_first``: Xiong et al. 2020, arXiv 2002.04745). Q, K and V are one product, linear and
    activation one op, and so are bias, dropout, residual and the LayerNorm behind them. In every mode the results are
    those of PyTorch's path for training. For nested tensors PyTorch's own ``forward`` runs.
    """

    @functools.wraps(nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        adopt((self.self_attn, self.norm1, self.norm2))

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Src ``(N, S, E)``, or ``(S, N, E)`` without ``batch_first``, or ``(S, E)``; masks as PyTorch takes them.

        Raises:
            AssertionError, RuntimeError: shapes, dtypes and hints that do not fit, as PyTorch's raises them.
        """
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        where = src_key_padding_mask
        if not isinstance(where, Attendance):
            check_masks(src_mask, src_key_padding_mask, is_causal, ("src_mask", "src_key_padding_mask"))
            where = attendance_of(self.self_attn, src, src, src_mask, src_key_padding_mask, is_causal)
        if calls_its_modules(self, nn.TransformerEncoderLayer, ("_sa_block", "_ff_block")):
            return where.taken(_call_modules(self, where.shown(src), *where.for_modules(src.dtype)))
        if self.norm_first:
            return _norm_first(self, src, where)
        return _norm_last(self, src, where)


def _norm_last(layer: nn.TransformerEncoderLayer, x: Tensor, where: Attendance) -> Tensor:
    as_rows = where.fits and where.mask is None and x.dim() == 3 and not where.seq_first
    whole = _as_one(layer, x, where) if where.packed is not None or as_rows else None
    if whole is not None:
        return whole
    ends = layer.dropout1, layer.norm1
    y, bias = attention_block(layer.self_attn, x, x, where, x, *ends)
    x = add_norm(y, bias, x, *ends)
    ends = layer.dropout2, layer.norm2
    y, bias = linear_product(feed_forward(layer, x), layer.linear2, x, *ends)
    return add_norm(y, bias, x, *ends)


def _as_one(layer: nn.TransformerEncoderLayer, x: Tensor, where: Attendance) -> Tensor | None:
    """The layer as one op, where a backend has it and nothing is in its way."""
    whole = as_before(layer, x, where.packed, where.causal)
    if whole is not None:
        return whole
    attention = layer.self_attn

    def of_one() -> PostNorm | None:
        fits = plain_attention(attention) and inputs_fit(attention, x, x, x)
        drops = attention.training and attention.dropout > 0.0
        if not fits or drops or attention.in_proj_weight is None:
            return None
        return PostNorm(
            in_weights=[attention.in_proj_weight],
            in_biases=[attention.in_proj_bias],
            out=attention.out_proj,
            norm1=layer.norm1,
            up=layer.linear1,
            activation=layer.activation,
            down=layer.linear2,
            norm2=layer.norm2,
            dropouts=(layer.dropout, layer.dropout1, layer.dropout2),
        )

    return as_one(layer, x, where.packed, of_one, getattr(attention, "head_dim", 0), where.causal)


def _norm_first(layer: nn.TransformerEncoderLayer, x: Tensor, where: Attendance) -> Tensor:
    y, ends = layer_norm(layer.norm1, x), (layer.dropout1, layer.norm2)
    y, bias = attention_block(layer.self_attn, y, y, where, x, *ends)
    y, x = add_norm(y, bias, x, *ends, prenorm=True)
    return x + layer.dropout2(linear_activation(layer.linear2, None, feed_forward(layer, y)))


def _call_modules(
    layer, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool
):
    masks = (attn_mask, key_padding_mask, is_causal)
    if layer.norm_first:
        x = x + layer._sa_block(layer.norm1(x), *masks)
        return x + layer._ff_block(layer.norm2(x))
    x = layer.norm1(x + layer._sa_block(x, *masks))
    return layer.norm2(x + layer._ff_block(x))
