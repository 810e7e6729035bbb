"""An encoder of BERT's shape, without padding and with fused blocks, whoever's classes it is made of.

Post-norm layers (Devlin et al. 2018, arXiv 1810.04805): attention, linear, residual and LayerNorm; linear, activation,
linear, residual and LayerNorm. What a fused block would bypass is looked at in each call; where something is in the way
(a hook, an adapter, a parametrization), that block is called module by module.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import choose
from . import _bypass as bypass
from ._layouts import can_lay_out, laid_out
from ._padding import Packed, attention_mask, pack
from ._swap import options_of, scope, swapped

ENCODER_OPS = ("unpad_input", "pad_input")
LAYER_OPS = ("linear", "varlen_attention", "scaled_dot_product_attention", "dropout_add_layer_norm")


class BertContainers(NamedTuple):
    """The exact classes of the blocks of a layer, whose own ``forward`` a fused layer does not call."""

    attention: type[nn.Module]
    self_attention: type[nn.Module]
    self_output: type[nn.Module]
    intermediate: type[nn.Module]
    output: type[nn.Module]


class BertLayerParts(NamedTuple):
    """The modules of one layer that compute."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    head_dim: int
    attention_dropout: float  # 0 unless training
    self_output: nn.Module  # dense, dropout, LayerNorm
    up: nn.Module
    activation: Callable[[Tensor], Tensor]
    output: nn.Module  # dense, dropout, LayerNorm


def layers_fit(target: str) -> Callable[[nn.Module], str | None]:
    """For a rule: an encoder's layers must all be of the class ``target``, or stand in for it."""

    def unfit(encoder: nn.Module) -> str | None:
        for i, layer in enumerate(encoder.layer):
            done = swapped(layer)
            cls = done.original if done else type(layer)
            if f"{cls.__module__}.{cls.__qualname__}" != target:
                return f"its layer {i} is a {cls.__qualname__}"
        return None

    return unfit


def has_foreign_layers(encoder: nn.Module) -> bool:
    """Whether a layer was put in since ``optimize``; it may want what the encoder's own ``forward`` hands down."""
    return not all(hasattr(layer, "containers") for layer in encoder.layer)


def run_layers(
    encoder: nn.Module,
    layers: Iterable[nn.Module],
    x: Tensor,
    mask: Tensor | None,
    all_hidden_states: list[Tensor] | None = None,
    *,
    padded_layers: bool = False,
) -> Tensor:
    """Runs the layers on ``x`` (batch, seqlen, hidden), without its padding where there is some.

    Args:
        mask: 2-D ``(batch, seqlen)``, or as attention takes it.
        all_hidden_states: gets every layer's padded output, if given.
        padded_layers: call the layers with padded tensors, because hooks look at them; inside they still unpad.
    """
    padded_layers = padded_layers or bypass.hooked_everywhere()
    x, packed, dense_mask = pack(encoder, x, mask, options_of(encoder))
    for layer in layers:
        if packed is None:
            x = _hidden(layer(x, dense_mask))
        elif padded_layers or bypass.watched(layer):
            padded = layer(packed.pad(x), attention_mask(packed.mask), packed=packed)
            x = packed.unpad(_hidden(padded))
        else:
            x = _hidden(layer(x, packed=packed))
        if all_hidden_states is not None:
            all_hidden_states.append(x if packed is None else packed.pad(x))
    return x if packed is None else packed.pad(x)


def fused_layer(
    layer: nn.Module, parts: BertLayerParts, x: Tensor, mask: Tensor | None, packed: Packed | None
) -> Tensor:
    """One layer on tokens ``(total_tokens, hidden)``, or on a padded batch ``(batch, seqlen, hidden)``."""
    padded = packed is not None and x.dim() == 3
    if padded:
        x = packed.unpad(x)
    with scope(layer):
        context = _attend(parts, *_query_key_value(layer, parts, x), attention_mask(mask), packed)
        x = _residual_norm(parts.self_output, context, x)
        hidden = _linear_activation(parts.up, parts.activation, x)
        x = _residual_norm(parts.output, hidden, x)
    return packed.pad(x) if padded else x


def original_layer(
    layer: nn.Module,
    forward: Callable,
    x: Tensor,
    mask: Tensor | None,
    packed: Packed | None,
    *args,
    **kwargs,
) -> Tensor | tuple:
    """The layer's own ``forward``, on a padded batch even where the encoder runs without padding."""
    unpadded = packed is not None and x.dim() == 2
    mask = mask if packed is None else packed.mask
    with scope(layer):
        result = forward(packed.pad(x) if unpadded else x, attention_mask(mask), *args, **kwargs)
    if not unpadded:
        return result
    if isinstance(result, tuple):
        return packed.unpad(result[0]), *result[1:]
    return packed.unpad(result)


def layer_parts(layer: nn.Module) -> BertLayerParts | None:
    """The layer's modules, or None if something stands between them that only its own ``forward`` would honour."""
    attention, intermediate, output = layer.attention, layer.intermediate, layer.output
    self_attention, self_output = attention.self, attention.output
    containers = (attention, self_attention, self_output, intermediate, output)
    if any(type(m) is not c or bypass.hooked(m) for m, c in zip(containers, layer.containers, strict=True)):
        return None
    dropouts = (self_attention.dropout, self_output.dropout, output.dropout)
    if bypass.hooked_everywhere() or not all(map(bypass.plain_dropout, dropouts)):
        return None
    activation = intermediate.intermediate_act_fn
    leaves = (
        *(self_attention.query, self_attention.key, self_attention.value, intermediate.dense),
        *(self_output.dense, self_output.LayerNorm, output.dense, output.LayerNorm),
        *([activation] if isinstance(activation, nn.Module) else []),
    )
    if any(bypass.hooked(m) for m in leaves):
        return None  # a hook expects to see the padded batch
    return BertLayerParts(
        query=self_attention.query,
        key=self_attention.key,
        value=self_attention.value,
        head_dim=self_attention.attention_head_size,
        attention_dropout=self_attention.dropout.p if self_attention.training else 0.0,
        self_output=self_output,
        up=intermediate.dense,
        activation=activation,
        output=output,
    )


def plain_embeddings(embeddings: nn.Module) -> bool:
    tables = (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings)
    plain = all(map(bypass.plain_embedding, tables)) and bypass.plain_norm(embeddings.LayerNorm)
    return plain and bypass.plain_dropout(embeddings.dropout) and not bypass.hooked_everywhere()


def fused_embeddings(
    embeddings: nn.Module, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor
) -> Tensor:
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(position_ids)
    norm, dropout = embeddings.LayerNorm, embeddings.dropout
    with scope(embeddings):
        return ops.embedding_layer_norm(
            input_ids,
            token_type_ids,
            position_ids,
            embeddings.word_embeddings.weight,
            embeddings.position_embeddings.weight,
            embeddings.token_type_embeddings.weight,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            padding_idx=embeddings.word_embeddings.padding_idx,
            dropout_p=bypass.dropout_rate(dropout),
            training=dropout.training,
        )


def fused_head_transform(transform: nn.Module, hidden_states: Tensor) -> Tensor:
    dense, activation = transform.dense, transform.transform_act_fn
    with scope(transform):
        if bypass.hooked_everywhere():
            return transform.LayerNorm(activation(dense(hidden_states)))
        return transform.LayerNorm(_linear_activation(dense, activation, hidden_states))


def _hidden(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _query_key_value(layer: nn.Module, parts: BertLayerParts, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each ``(*, heads, head_dim)``, from one product where that can be had without a gradient."""
    three = (parts.query, parts.key, parts.value)
    # Where PyTorch multiplies: kernels of ours lay each weight out by themselves.
    together = choose("linear", x) == "native"
    if together and all(map(bypass.plain_linear, three)) and all(m.bias is not None for m in three):
        tensors = (*(m.weight for m in three), *(m.bias for m in three))
        if not _needs_grad(x, *tensors) and not torch.compiler.is_compiling() and can_lay_out(*tensors):
            weight, bias = laid_out(layer, "qkv", tensors, _concatenated)
            fused = ops.linear(x, weight, bias)
            return fused.unflatten(-1, (3, -1, parts.head_dim)).unbind(-3)
    return tuple(_linear_activation(m, None, x).unflatten(-1, (-1, parts.head_dim)) for m in three)


def _concatenated(
    wq: Tensor, wk: Tensor, wv: Tensor, bq: Tensor, bk: Tensor, bv: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.cat((wq, wk, wv)), torch.cat((bq, bk, bv))


def _attend(
    parts: BertLayerParts, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, packed: Packed | None
) -> Tensor:
    if packed is not None:
        cu_seqlens, longest = packed.cu_seqlens, packed.max_seqlen
        context = ops.varlen_attention(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, dropout_p=parts.attention_dropout
        )
        return context.flatten(-2)
    q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
    context = ops.scaled_dot_product_attention(q, k, v, mask, parts.attention_dropout)
    return context.transpose(-2, -3).flatten(-2)


def _linear_activation(linear: nn.Module, activation: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    name = None if activation is None else bypass.activation_name(activation)
    if bypass.plain_linear(linear) and (name is not None or activation is None):
        return ops.linear(x, linear.weight, linear.bias, name)
    x = linear(x)
    return x if activation is None else activation(x)


def _residual_norm(block: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """``LayerNorm(dropout(dense(x)) + residual)`` of a block that holds the three."""
    dense, dropout, norm = block.dense, block.dropout, block.LayerNorm
    if not bypass.plain_norm(norm):
        return norm(dropout(dense(x)) + residual)
    bias = None
    # PyTorch adds the bias within the product; a kernel of ours takes it on the way to the sum.
    if bypass.plain_linear(dense) and choose("dropout_add_layer_norm", x) != "native":
        x, bias = ops.linear(x, dense.weight), dense.bias
    else:
        x = _linear_activation(dense, None, x)
    return ops.dropout_add_layer_norm(
        x,
        residual,
        norm.weight,
        norm.bias,
        input_bias=bias,
        dropout_p=bypass.dropout_rate(dropout),
        training=dropout.training,
        eps=norm.eps,
    )


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
