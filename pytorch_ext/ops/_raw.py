"""What every op is made of: raw custom ops ``pytorch_ext::<op>_fwd`` and ``_bwd``, and the way to differentiate them.

A raw op takes the backend's name as its last argument, looks the kernel up and calls it, so that ``torch.compile``
sees one node whatever runs behind it. It has no autograd formula: one ``torch.autograd.Function`` per op does that
over the two raw ops, for every backend. ``native`` never comes here.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import kernel
from ..backends._registry import differentiable

NAMESPACE = "pytorch_ext"
# Arguments of these very types are nothing but what they seem: no subclass of Tensor stands for another.
PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), float, int, bool, str, list, tuple, torch.Size))
SECOND_ORDER = (
    b"pytorch_ext: the kernels have no second derivative; for one, run the forward pass under"
    b" pytorch_ext.backends.use('native')"
)


def define(schema: str, fake: Callable) -> Callable:
    """Defines the raw op of ``schema``, ``name(arguments) -> results``, and returns it.

    ``fake`` takes the arguments without the backend's name and returns empty results as a kernel allocates them.
    """
    name = schema.partition("(")[0]
    torch.library.define(
        f"{NAMESPACE}::{name}", schema.removeprefix(name), tags=(torch.Tag.pt2_compliant_tag,)
    )

    @functools.wraps(fake)
    def fake_without_backend(*args: Any) -> Any:
        return fake(*args[:-1])

    def run(*args: Any) -> Any:
        *inputs, backend = args
        device = next(a.device.type for a in inputs if isinstance(a, Tensor))
        # The wrapper has cast what autocast casts. Inside a kernel it would undo the fp32 accumulation.
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return kernel(backend, name)(*inputs)
        return kernel(backend, name)(*inputs)

    torch.library.register_fake(f"{NAMESPACE}::{name}", fake_without_backend)
    torch.library.impl(f"{NAMESPACE}::{name}", "CompositeExplicitAutograd", run)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    _names[op] = name
    return op


# Raw op -> the name of its kernel.
_names: dict[Callable, str] = {}


def call(op: Callable, *args: Any) -> Any:
    """``op(*args)``, and where nobody looks on, straight to the kernel: the dispatcher costs as much as a small one."""
    if torch.compiler.is_compiling():
        return op(*args)
    if not _plain(args):
        return op(*_sharded(args))
    if _watched() or torch._C._is_any_autocast_enabled():
        return op(*args)
    return kernel(args[-1], _names[op])(*args[:-1])


def _plain(args: tuple) -> bool:
    return PLAIN.issuperset(map(type, args)) and not any(map(_in_disguise, args))


def _in_disguise(value: Any) -> bool:
    """Whether a tensor's memory holds something else than its numbers: PyTorch knows how to make them real."""
    return isinstance(value, Tensor) and (value.is_neg() or value._is_zerotensor())


def _watched() -> bool:
    """Whether somebody looks on as ops run, or makes something else of them."""
    return (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def is_distributed(value: Any) -> bool:
    """Whether ``value`` is a DTensor."""
    distributed = sys.modules.get("torch.distributed.tensor")  # who made a DTensor has imported it
    return distributed is not None and isinstance(value, distributed.DTensor)


def _sharded(args: tuple) -> tuple | list:
    """``args``, and where they hold a DTensor all as DTensors, with which our ops then know what to do."""
    if not any(map(is_distributed, args)):
        return args
    from . import _sharding

    return _sharding.together(args)


def wants_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:  # a generator costs as much as the rest
            if t is not None and t.requires_grad:
                return True
    return False


def apply(function: type[torch.autograd.Function], op: str, *args: Any) -> Any:
    """``function.apply(*args)``, by a shorter way where nothing traces or transforms the call.

    The shortest is a node of the backend's own for ``op``, ``<op>_grad``, which takes and returns what ``function``
    does.
    """
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(args))
    node = differentiable(args[-1], op)
    if node is not None and _plain(args) and not _watched():
        return node(*args[:-1])
    return super(torch.autograd.Function, function).apply(*args)


def _distinct(args: tuple) -> list:
    """``args`` with a view in place of a tensor that came before, as in self-attention: Dynamo takes none twice."""
    found, tensors = [], []
    for value in args:
        if isinstance(value, Tensor):
            if any(value is other for other in tensors):
                value = value.view_as(value)
            tensors.append(value)
        found.append(value)
    return found


def first_order(backward: Callable) -> Callable:
    """Marks a backward whose result cannot be differentiated once more: who tries gets an error.

    torch's ``once_differentiable`` gives no error where the incoming gradient needs no gradient itself, as that of a
    plain ``sum()``, nor to ``torch.autograd.grad``, which visits only what leads to its inputs; the second derivative
    would then lack a part, in silence. So here the result hangs on every tensor that it was made from.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return results  # nobody asked for more; a compiled backward refuses by itself
        results = results if isinstance(results, tuple) else (results,)
        made_from = [t for t in (*ctx.saved_tensors, *gradients) if t is not None and t.requires_grad]
        refuse = torch._C._functions.DelayedError(SECOND_ORDER, len(results) + len(made_from))
        return refuse(*results, *made_from)[: len(results)]

    return checked


def draw_rng(like: Tensor) -> Tensor:
    """The (seed, offset) of one dropout mask: int64, on the device, so that a CUDA graph draws it anew each replay."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=like.device)


def statistics_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where an input is float64."""
    return (
        torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    )


def like_or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Fake gradient of an optional tensor: contiguous, or of no elements where there is none."""
    return like.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)


def none_if_absent(gradient: Tensor, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else gradient
