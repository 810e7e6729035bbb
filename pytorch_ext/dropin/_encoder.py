"""Running an encoder's layers without padding, and a layer that cannot run so on the padded batch it expects."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..nn._graphs import replayed
from . import _bypass as bypass
from ._attention import biased
from ._by_tokens import shared
from ._padding import Packed, attention_mask, flattened, note, pack
from ._recompute import layer_call
from ._swap import options_of, scope, swapped

ENCODER_OPS = ("unpad_input", "pad_input")
LAYER_OPS = ("linear", "varlen_attention", "scaled_dot_product_attention", "dropout_add_layer_norm")


def layers_fit(target: str) -> Callable[[nn.Module], str | None]:
    """For a rule: an encoder's layers must all be of the class ``target``, or stand in for it."""

    return lambda encoder: layers_are(target, encoder.layer)


def layers_are(target: str, layers: Iterable[nn.Module]) -> str | None:
    for i, layer in enumerate(layers):
        done = swapped(layer)
        cls = done.original if done else type(layer)
        if f"{cls.__module__}.{cls.__qualname__}" != target:
            return f"its layer {i} is a {cls.__qualname__}"
    return None


def has_foreign_layers(layers: Iterable[nn.Module]) -> bool:
    """Whether a layer was put in since ``optimize``; it may want what the encoder's own ``forward`` hands down."""
    return not all(hasattr(layer, "containers") for layer in layers)


def undisturbed(
    containers: Iterable[nn.Module],
    classes: Iterable[type[nn.Module]],
    dropouts: Iterable[nn.Module],
    leaves: Iterable[object],
) -> bool:
    """Whether nothing stands between a layer's modules that only its own ``forward`` would honour.

    Args:
        containers, classes: the blocks whose ``forward`` a fused layer does not call, and what they have to be.
        dropouts: modules whose rate alone it takes.
        leaves: the modules that compute; where one is watched, a hook expects to see the padded batch.
    """
    if any(type(m) is not c or bypass.hooked(m) for m, c in zip(containers, classes, strict=True)):
        return False
    if bypass.hooked_everywhere() or not all(map(bypass.plain_dropout, dropouts)):
        return False
    return not any(isinstance(m, nn.Module) and bypass.watched(m) for m in leaves)


def run_layers(
    encoder: nn.Module,
    layers: Iterable[nn.Module],
    x: Tensor,
    mask: Tensor | None,
    all_hidden_states: list[Tensor] | None = None,
    *,
    padded_layers: bool = False,
    handed_down: dict | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Runs the layers on ``x`` (batch, seqlen, hidden), without its padding where there is some.

    Args:
        mask: 2-D ``(batch, seqlen)``, or as attention takes it.
        all_hidden_states: gets every layer's padded output, if given.
        padded_layers: call the layers with padded tensors, because hooks look at them; inside they still unpad.
        handed_down: what every layer gets by name, and may say where sequences lie in a flattened batch.
        bias: ``(1, heads, seqlen, seqlen)`` to add to the scores; every layer gets it as ``position_bias``.
    """
    padded_layers = padded_layers or bypass.hooked_everywhere()
    handed_down = handed_down or {}
    packed, dense_mask = flattened(x, mask, handed_down), None
    if packed is None:
        x, packed, dense_mask = pack(encoder, x, mask, options_of(encoder))
    else:
        note(encoder, "without padding: the batch came without it")
        x = packed.unpad(x)
    if bias is not None:
        if dense_mask is not None:
            bias, dense_mask = biased(bias, dense_mask), None  # once for all layers
        handed_down = {**handed_down, "position_bias": bias}
    layers = list(layers)
    if dense_mask is None and not padded_layers and all_hidden_states is None:

        def run(tokens: Tensor, where: Packed) -> Tensor:
            for layer in layers:
                tokens = _hidden(layer(tokens, packed=where, **handed_down))
            return tokens

        found = replayed(encoder, options_of(encoder).recorder, run, x, packed, handed_down)
        if found is not None:
            return found
    x, packed = shared(encoder, x, packed, dense_mask)
    call = layer_call(encoder)
    for layer in layers:
        if packed is None:
            x = _hidden(call(layer, x, dense_mask, **handed_down))
        elif padded_layers or bypass.watched(layer):
            padded = call(layer, packed.pad(x), attention_mask(packed.mask), packed=packed, **handed_down)
            x = packed.unpad(_hidden(padded))
        else:
            x = _hidden(call(layer, x, packed=packed, **handed_down))
        if all_hidden_states is not None:
            all_hidden_states.append(x if packed is None else packed.pad(x))
    return x if packed is None else packed.pad(x)


def original_layer(
    layer: nn.Module,
    forward: Callable,
    x: Tensor,
    mask: Tensor | None,
    packed: Packed | None,
    *args,
    as_mask: Callable[[Tensor | None, Tensor], Tensor | None] = lambda mask, x: attention_mask(mask),
    **kwargs,
) -> Tensor | tuple:
    """The layer's own ``forward``, on a padded batch even where the encoder runs without padding.

    ``as_mask`` makes of a mask, 2-D or not, what that ``forward`` takes; its second argument tells the dtype.
    """
    unpadded = packed is not None and x.dim() == 2
    mask = mask if packed is None else packed.mask
    with scope(layer):
        result = forward(packed.pad(x) if unpadded else x, as_mask(mask, x), *args, **kwargs)
    if not unpadded:
        return result
    if isinstance(result, tuple):
        return packed.unpad(result[0]), *result[1:]
    return packed.unpad(result)


def added_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """For layers that add their mask to the scores: 0 where a key may be attended, the lowest number elsewhere."""
    mask = attention_mask(mask)
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(
        ~mask, torch.finfo(x.dtype).min
    )


def _hidden(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
