import functools

import torch
from torch import Tensor, nn

from . import _bypass as bypass
from ._adopt import adopt
from ._attendance import Attendance, additive, attendance, check_masks, is_causal_mask
from ._blocks import layer_norm
from ._graphs import replayed
from ._layer import is_ours, takes_attendance
from ._padding import Packed, note, pack
from ._recorder import Recorder

NAMES = ("mask", "src_key_padding_mask")
_TOKEN_BY_TOKEN = (nn.LayerNorm, nn.RMSNorm, nn.Identity)


class TransformerEncoder(nn.TransformerEncoder):
    """As :class:`torch.nn.TransformerEncoder`, and without the padding that ``src_key_padding_mask`` shows.

    Tokens are gathered once before the first layer and put back once after the last, in training too. Outputs at real
    positions are those of PyTorch's path for training, and zero at padding. The batch runs with its padding where
    ``mask`` is no causal one, position 0 of a sequence is padding, the padding mask is not bool, or a layer or the
    last norm is of a class that this library does not know. There are no nested tensors inside; a ``src`` that is one
    goes to PyTorch's own ``forward``.

    Layers of exactly PyTorch's class are made ours, in the copies that this class makes of ``encoder_layer``.
    """

    @functools.wraps(nn.TransformerEncoder.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        adopt(self.layers.modules())

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Src ``(N, S, E)``, or ``(S, N, E)`` without ``batch_first``, or ``(S, E)``; masks as PyTorch takes them.

        Raises:
            AssertionError, RuntimeError: shapes, dtypes and hints that do not fit, as PyTorch's raises them.
        """
        return encode(self, src, mask, src_key_padding_mask, is_causal)


def encode(
    encoder: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool | None,
    remove_padding: bool | str = "auto",
    kept_because: str = "",
    recorder: type[Recorder] | None = None,
) -> Tensor:
    """The ``forward`` of an encoder, with the padding removed and graphs captured as ``optimize`` was told."""
    if src.is_nested:
        return nn.TransformerEncoder.forward(encoder, src, mask, padding, is_causal)
    check_masks(mask, padding, is_causal, NAMES)
    turned = src.dim() == 3 and not encoder.layers[0].self_attn.batch_first
    # Asked only where the answer counts: the device has to be waited for.
    asks = is_causal is None or padding is not None
    causal = asks and is_causal_mask(mask, src.shape[1 if src.dim() == 3 and not turned else 0])
    hint = causal if is_causal is None else is_causal
    if not all(map(is_ours, encoder.layers)) or bypass.hooked_everywhere():
        note(encoder, f"dense: {_foreign_reason(encoder)}")
        return _call_layers(encoder, src, mask, padding, hint)
    x = src.transpose(0, 1).contiguous() if turned else src
    reason = _kept_reason(encoder, x, mask, padding, causal)
    if reason is not None and remove_padding is not False:
        remove_padding, kept_because = False, reason
    real = None if padding is None or reason is not None else ~padding
    x, packed, dense_mask = pack(encoder, x, real, remove_padding, kept_because)
    if packed is None and real is not None and dense_mask is None:
        padding = None  # it shows none
    where = _attendance(encoder, x, mask, padding, hint, packed, turned)
    if packed is not None or (x.dim() == 3 and padding is None and (mask is None or where.causal)):

        def run(tokens: Tensor, at: Packed) -> Tensor:
            of_tokens = Attendance(None, None, False, True, None, where.causal, False, packed=at)
            return _through(encoder, tokens, of_tokens)

        found = replayed(encoder, recorder, run, x, packed, {"causal": where.causal})
        if found is not None:
            return found.transpose(0, 1).contiguous() if turned else found
    x = _through(encoder, x, where)
    return where.shown(x).contiguous() if turned else where.shown(x)


def _through(encoder: nn.TransformerEncoder, x: Tensor, where: Attendance) -> Tensor:
    """All layers and the norm behind them, on activations as ``where`` says."""
    for layer in encoder.layers:
        if takes_attendance(layer, where):
            x = layer(x, src_key_padding_mask=where)
        else:
            attn_mask, key_padding_mask, hint = where.for_modules(x.dtype)
            masks = {"src_mask": attn_mask, "src_key_padding_mask": key_padding_mask, "is_causal": hint}
            x = where.taken(layer(where.shown(x), **masks))
    if encoder.norm is not None:
        plain = bypass.plain_norm(encoder.norm)
        x = layer_norm(encoder.norm, x) if plain else where.taken(encoder.norm(where.shown(x)))
    return x


def _attendance(
    encoder: nn.TransformerEncoder,
    x: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    hint: bool,
    packed: Packed | None,
    turned: bool,
) -> Attendance:
    if packed is not None:
        causal = mask is not None
        return Attendance(mask, padding, hint, True, None, causal, False, turned, packed)
    heads = getattr(encoder.layers[0].self_attn, "num_heads", 1)
    where = attendance(x, x, heads, mask, padding, hint, batch_first=True)
    where.turned = turned
    return where


def _kept_reason(
    encoder: nn.TransformerEncoder, x: Tensor, mask: Tensor | None, padding: Tensor | None, causal: bool
) -> str | None:
    """Why the padding, if there is some, has to stay, whatever ``optimize`` was told."""
    if padding is None:
        return None
    if x.dim() == 2:
        return "src has no batch dimension"
    if padding.dtype != torch.bool:
        return "the padding mask is additive, which says more than where padding is"
    if mask is not None and (not causal or mask.requires_grad):
        return "there is an attention mask beside it that is not causal, or learns"
    norm = encoder.norm
    if norm is not None and type(norm) not in bypass.NORMS and type(norm) not in _TOKEN_BY_TOKEN:
        return f"its norm is a {type(norm).__qualname__}"
    return None


def _foreign_reason(encoder: nn.TransformerEncoder) -> str:
    for i, layer in enumerate(encoder.layers):
        if not is_ours(layer):
            return f"its layer {i} is a {type(layer).__qualname__}"
    return "there is a hook on all modules"


def _call_layers(
    encoder: nn.TransformerEncoder, x: Tensor, mask: Tensor | None, padding: Tensor | None, hint: bool
) -> Tensor:
    mask, padding = additive(mask, x.dtype), additive(padding, x.dtype)
    for layer in encoder.layers:
        x = layer(x, src_mask=mask, is_causal=hint, src_key_padding_mask=padding)
    return x if encoder.norm is None else encoder.norm(x)
