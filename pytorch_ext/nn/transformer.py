import functools
import inspect

import torch
from torch import Tensor, nn

from ._adopt import adopt
from ._attendance import additive
from ._layer import is_ours
from ._padding import note

_signature = inspect.signature(nn.Transformer)


class Transformer(nn.Transformer):
    """As :class:`torch.nn.Transformer`, over :mod:`pytorch_ext.ops` (Vaswani et al. 2017, arXiv 1706.03762).

    Its encoder is a :class:`TransformerEncoder` and its decoder a :class:`TransformerDecoder`, unless others are given.
    The encoder removes padding where ``memory_key_padding_mask`` hides it from the decoder.
    """

    @functools.wraps(nn.Transformer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        given = _signature.bind(*args, **kwargs).arguments
        for name, stack in (("custom_encoder", self.encoder), ("custom_decoder", self.decoder)):
            if given.get(name) is None:
                adopt(stack.modules())

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Src ``(N, S, E)`` and tgt ``(N, L, E)``, or ``(S, N, E)`` and ``(L, N, E)``, or ``(S, E)`` and ``(L, E)``.

        Raises:
            AssertionError, RuntimeError: shapes, dtypes and hints that do not fit, as PyTorch's raises them.
        """
        masks = (src_mask, tgt_mask, memory_mask)
        padding = (src_key_padding_mask, tgt_key_padding_mask, memory_key_padding_mask)
        return transform(self, src, tgt, masks, padding, (src_is_causal, tgt_is_causal, memory_is_causal))


def transform(
    model: nn.Transformer,
    src: Tensor,
    tgt: Tensor,
    masks: tuple[Tensor | None, ...],
    padding: tuple[Tensor | None, ...],
    hints: tuple[bool | None, ...],
    remove_padding: bool | str = "auto",
) -> Tensor:
    """The ``forward`` of a Transformer, with the padding removed as ``optimize`` was told."""
    (src_mask, *other_masks), (src_padding, *other_padding) = masks, padding
    may_stay = remove_padding == "auto" and is_ours(model.encoder)
    if may_stay and src_padding is not None and not _hides(other_padding[1], src_padding):
        # The encoder keeps the padding under an additive mask.
        src_mask, src_padding = additive(src_mask, src.dtype), additive(src_padding, src.dtype)
        masks, padding = (src_mask, *other_masks), (src_padding, *other_padding)
        out = nn.Transformer.forward(model, src, tgt, *masks, *padding, *hints)
        note(model.encoder, "dense: memory_key_padding_mask lets the decoder attend its padding")
        return out
    return nn.Transformer.forward(model, src, tgt, *masks, *padding, *hints)


def _hides(memory_padding: Tensor | None, src_padding: Tensor) -> bool:
    """Whether the decoder sees no padding of the source. Of two tensors the values are compared, where they can be."""
    if memory_padding is src_padding or src_padding.dtype != torch.bool:
        return True  # an additive mask keeps the padding by itself
    if memory_padding is None or memory_padding.dtype != torch.bool:
        return False
    if memory_padding.shape != src_padding.shape or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active() and not bool((src_padding & ~memory_padding).any())
