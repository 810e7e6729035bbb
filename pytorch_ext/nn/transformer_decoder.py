import functools

from torch import Tensor, nn

from . import _bypass as bypass
from ._adopt import adopt
from ._attendance import attendance, check_masks, is_causal_mask
from ._blocks import layer_norm
from ._layer import is_ours, takes_attendance


class TransformerDecoder(nn.TransformerDecoder):
    """As :class:`torch.nn.TransformerDecoder`, with the masks worked out once for all layers.

    Padding stays. Layers of exactly PyTorch's class are made ours, in the copies that this class makes of
    ``decoder_layer``.
    """

    @functools.wraps(nn.TransformerDecoder.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        adopt(self.layers.modules())

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Tgt ``(N, L, E)`` and memory ``(N, S, E)``, or ``(L, N, E)`` and ``(S, N, E)``, or ``(L, E)`` and ``(S, E)``.

        Raises:
            AssertionError, RuntimeError: shapes, dtypes and hints that do not fit, as PyTorch's raises them.
        """
        masks = (tgt_mask, memory_mask)
        padding = (tgt_key_padding_mask, memory_key_padding_mask)
        return decode(self, tgt, memory, masks, padding, (tgt_is_causal, memory_is_causal))


def decode(
    decoder: nn.TransformerDecoder,
    tgt: Tensor,
    memory: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    padding: tuple[Tensor | None, Tensor | None],
    hints: tuple[bool | None, bool],
) -> Tensor:
    """The ``forward`` of a decoder; of each pair the first is for its own tokens, the second for the memory."""
    usual = tgt.dim() == memory.dim() and not (tgt.is_nested or memory.is_nested)
    if not usual or not all(map(is_ours, decoder.layers)) or bypass.hooked_everywhere():
        return nn.TransformerDecoder.forward(decoder, tgt, memory, *masks, *padding, *hints)
    attention = decoder.layers[0].self_attn
    turned = tgt.dim() == 3 and not attention.batch_first
    if hints[0] is None:
        length = tgt.shape[1 if tgt.dim() == 3 and not turned else 0]
        hints = is_causal_mask(masks[0], length), hints[1]
    own, cross = zip(masks, padding, hints, strict=True)
    check_masks(*own, ("tgt_mask", "tgt_key_padding_mask"))
    check_masks(*cross, ("memory_mask", "memory_key_padding_mask"))
    x, memory = (t.transpose(0, 1).contiguous() if turned else t for t in (tgt, memory))
    heads = getattr(attention, "num_heads", 1)
    own = attendance(x, x, heads, *own, batch_first=True)
    cross = attendance(x, memory, heads, *cross, batch_first=True)
    own.turned = cross.turned = turned
    for layer in decoder.layers:
        if takes_attendance(layer, own, cross):
            x = layer(x, memory, tgt_key_padding_mask=own, memory_key_padding_mask=cross)
        else:
            # Of each pair the first is for the tokens: masks, then padding, then hints.
            pairs = zip(own.for_modules(x.dtype), cross.for_modules(x.dtype), strict=True)
            x = own.taken(layer(own.shown(x), cross.shown(memory), *(t for pair in pairs for t in pair)))
    if decoder.norm is not None:
        plain = bypass.plain_norm(decoder.norm)
        x = layer_norm(decoder.norm, x) if plain else own.taken(decoder.norm(own.shown(x)))
    return own.shown(x).contiguous() if turned else x
