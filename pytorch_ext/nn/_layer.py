"""What the layers of an encoder and of a decoder share.

A stack of layers hands an :class:`Attendance` down in place of the padding mask: then all masks are worked out once,
and activations may lie in another layout than the caller's.
"""

from torch import Tensor, nn

from . import _bypass as bypass
from ._attendance import Attendance, attendance
from ._blocks import linear_activation, product
from .multihead_attention import attend, inputs_fit, plain_attention

_CHECKPOINTED = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"


def is_ours(layer: nn.Module) -> bool:
    """Whether the ``forward`` of ``layer`` is ours; it may be wrapped for activation checkpointing."""
    if type(layer).__module__ == _CHECKPOINTED:
        layer = layer._checkpoint_wrapped_module
    return type(layer).forward.__module__.startswith("pytorch_ext.")  # FSDP's subclasses inherit it


def takes_attendance(layer: nn.Module, *wheres: Attendance) -> bool:
    """Whether a layer of ours may be handed ``wheres``: nothing else looks at what it is given."""
    if type(layer).__module__ == _CHECKPOINTED and any(where.needs_grad for where in wheres):
        return False  # reentrant checkpointing counts on a mask that learns to be an argument
    return not bypass.watched(layer)


def calls_its_modules(layer: nn.Module, base: type[nn.Module], blocks: tuple[str, ...]) -> bool:
    """Whether a hook or a method that is not PyTorch's has to see what passes: then nothing can be fused."""
    if bypass.hooked_everywhere() or any(map(bypass.hooked, layer.children())):
        return True
    return any(
        name in layer.__dict__ or getattr(type(layer), name) is not getattr(base, name) for name in blocks
    )


def attendance_of(
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> Attendance:
    """The masks of a layer that no stack has worked out, for the module that attends."""
    heads, batch_first = getattr(attention, "num_heads", 1), getattr(attention, "batch_first", False)
    return attendance(query, key, heads, attn_mask, key_padding_mask, is_causal, batch_first=batch_first)


def attention_block(
    attention: nn.Module,
    x: Tensor,
    memory: Tensor,
    where: Attendance,
    residual: Tensor,
    dropout: nn.Module,
    norm: nn.Module,
) -> tuple[Tensor, Tensor | None]:
    """What ``attention`` gives, and the bias of its last product if ``add_norm`` is still to add it."""
    if plain_attention(attention) and where.fits and inputs_fit(attention, x, memory, memory):
        context, last = attend(attention, x, memory, memory, where), attention.out_proj
        return product(context, last.weight, last.bias, residual, dropout, norm)
    return _called(attention, x, memory, where), None


def feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """All of the feed-forward block but its second product."""
    return layer.dropout(linear_activation(layer.linear1, layer.activation, x))


def _called(attention: nn.Module, x: Tensor, memory: Tensor, where: Attendance) -> Tensor:
    attn_mask, key_padding_mask, is_causal = where.for_modules(x.dtype)
    query = where.shown(x)
    key = query if memory is x else where.shown(memory)
    masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": is_causal}
    return where.taken(attention(query, key, key, need_weights=False, **masks)[0])
