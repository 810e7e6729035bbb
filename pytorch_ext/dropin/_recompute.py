"""Activations that are computed once more in the backward pass, instead of being kept for it.

Chen et al. 2016 (arXiv 1604.06174) for whole layers; Korthikanti et al. 2022 (arXiv 2205.05198) for the choice of what
is cheap. It wraps the layers where an encoder calls them, on tokens without padding.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..backends import requested, use
from ..nn._blocks import activations_apart
from ._swap import options_of

KINDS = ("layers", "selective")

_OURS = ("linear_fwd", "varlen_attention_fwd", "scaled_dot_product_attention_fwd")
_ATEN = (
    *("mm", "addmm"),  # not bmm, which makes the scores of attention in parts: one for each pair of positions
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
)
_DEAR = {getattr(torch.ops.pytorch_ext, name).default for name in _OURS}
_DEAR |= {getattr(torch.ops.aten, name).default for name in _ATEN}
_DEAR.add(torch.ops.torch_attn._varlen_attn.default)

Contexts = tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]


def layer_call(encoder: nn.Module) -> Callable[..., Any]:
    """How ``encoder`` calls a layer: ``call(layer, *args, **kwargs)``."""
    kind = options_of(encoder).recompute
    if kind is None or not torch.is_grad_enabled():
        return _call
    if torch.compiler.is_compiling():
        return _tagging(kind)
    contexts = selective_contexts if kind == "selective" else _whole_contexts

    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(layer, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return call


def _tagging(kind: str) -> Callable[..., Any]:
    """For a compiler, which divides the graph of both passes as the tags of its nodes say."""
    told = {"context_fn": _tagging_contexts} if kind == "selective" else {}

    def call(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Dynamo takes nothing but tensors for arguments, and finds the rest in the closure.
        return checkpoint(lambda x: layer(x, *args, **kwargs), x, use_reentrant=False, **told)

    return call


def _tagging_contexts() -> Contexts:
    """As :func:`selective_contexts`; the backend is an argument of every op in the graph."""
    return create_selective_checkpoint_contexts(_policy)


def selective_contexts() -> Contexts:
    """A ``context_fn`` for :func:`torch.utils.checkpoint.checkpoint`: keeps products and attention, and no more.

    Norms, activations, dropout and sums are computed once more.
    """
    keeping, kept = create_selective_checkpoint_contexts(_policy)
    return _within(keeping), _within(kept, requested())


def _whole_contexts() -> Contexts:
    return contextlib.nullcontext(), use(requested())


@contextlib.contextmanager
def _within(mode: contextlib.AbstractContextManager, backend: str | None = None) -> Iterator[None]:
    """``mode``, and for the second time the ``backend`` of the first, whose ``backends.use`` may have been left."""
    with mode, activations_apart(), use(backend) if backend else contextlib.nullcontext():
        yield


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    dear = op in _DEAR and not _draws(op, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def _draws(op: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether ``op`` takes random numbers from PyTorch's generator, as ours do not: they are handed an ``rng``.

    If it were not run the second time, what draws after it would find the generator elsewhere, and drop other elements.
    """
    if op.namespace == "pytorch_ext":
        return False
    names = [argument.name for argument in op._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return given.get("dropout_p", 0.0) > 0.0


def _call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer(*args, **kwargs)
