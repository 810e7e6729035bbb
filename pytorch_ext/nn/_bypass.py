"""What a fused path would bypass, looked at in each call: it may have been added since the module was made."""

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as nn_module

from .gelu import GELU
from .layer_norm import LayerNorm

# The classes that compute nothing else; those that stand in for them add themselves.
NORMS: set[type[nn.Module]] = {nn.LayerNorm, LayerNorm}
GELUS: set[type[nn.Module]] = {nn.GELU, GELU}

_HUGGING_FACE = {
    "FusedGELUActivation": "gelu",
    "FusedGELUTanh": "gelu_tanh",
    "FusedNewGELUActivation": "gelu_tanh",
}

# Hugging Face leaves its recorders on the modules for good; they do nothing unless a call asks for what they record.
_IDLE_HOOKS = "transformers.utils.output_capturing"
# These gather a layer's parameters and let go of them again; the shape of what passes is nothing to them.
_SHARDING_HOOKS = "torch.distributed.fsdp."
_TENSOR_PARALLEL_HOOKS = "torch.distributed.tensor."


def hooked(module: nn.Module) -> bool:
    """Whether something listens to calls of ``module`` or stands in for its ``forward``."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    if "forward" in module.__dict__:
        return True
    hooks = module._forward_hooks  # mostly none, and this is asked some thirty times per layer
    return bool(hooks) and any(hook.__module__ != _IDLE_HOOKS for hook in hooks.values())


def watched(layer: nn.Module) -> bool:
    """Whether something that listens to calls of ``layer`` may look at what passes, and expects a padded batch."""
    if not hooked(layer):
        return False
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return "forward" in layer.__dict__ or not all(
        (hook.__module__ or "").startswith((_IDLE_HOOKS, _SHARDING_HOOKS)) or _splits_features(hook)
        for registered in hooks
        for hook in registered.values()
    )


def _splits_features(hook: Callable) -> bool:
    """Whether it is of a tensor-parallel style that shares out features alone: then tokens may lie in any shape.

    Which placements a style has is told by what it bound (``distribute_module`` makes the hook from a ``partial``).
    Where that cannot be read, the hook is one that looks at shapes.
    """
    if not (hook.__module__ or "").startswith(_TENSOR_PARALLEL_HOOKS):
        return False
    bound = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()]
    layouts = [a for f in bound if isinstance(f, functools.partial) for a in f.args if isinstance(a, tuple)]
    return bool(layouts) and all(
        placement.is_replicate() or placement.is_shard(-1) for layout in layouts for placement in layout
    )


def hooked_everywhere() -> bool:
    """Whether a hook on all modules of the process is set."""
    return nn_module._has_any_global_hook()


def plain_linear(module: nn.Module) -> bool:
    """Whether calling ``module`` is ``F.linear`` of its weight and bias: no adapter, no parametrization, no hook."""
    return type(module) is nn.Linear and not hooked(module)


def plain_norm(module: nn.Module) -> bool:
    """Whether calling ``module`` is ``F.layer_norm`` over the last dimension, with a weight."""
    norm = type(module) in NORMS and len(module.normalized_shape) == 1
    return norm and module.weight is not None and not hooked(module)


def plain_dropout(module: nn.Module) -> bool:
    """Whether ``module`` drops single elements, or nothing; others may tell sequences apart."""
    return type(module) in (nn.Dropout, nn.Identity) and not hooked(module)


def dropout_rate(module: nn.Module) -> float:
    """The rate of a plain dropout."""
    return getattr(module, "p", 0.0)


def plain_embedding(module: nn.Module) -> bool:
    usual = type(module) is nn.Embedding and module.max_norm is None
    return usual and not (module.sparse or module.scale_grad_by_freq) and not hooked(module)


def activation_name(activation: object) -> str | None:
    """The name by which ``ops.linear`` knows ``activation``; None if it does not."""
    if isinstance(activation, nn.Module) and hooked(activation):
        return None
    kind = type(activation)
    if kind is nn.ReLU or activation is F.relu:
        return "relu"
    if kind in GELUS:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if activation is F.gelu:
        return "gelu"
    # Hugging Face's own, which optimize has swapped, or has left alone because they compute something else.
    return _HUGGING_FACE.get(kind.__qualname__)
