"""How a kernel is launched, and cheaply.

``kernel[grid](...)`` costs about 11 us on the host each time, most of it to find out which compiled version fits the
arguments. ``launch`` finds that out by a key of its own, from what Triton specialises a kernel on (dtypes, which
pointers and integers are multiples of 16, which integers are 1, the constants), and then calls the compiled kernel
itself. The first launch of each key goes the plain way, and so does every launch where anything is not as expected:
under a Triton that this was not written for, with Triton's hooks set by a profiler, in the interpreter.

Rules for a kernel: the pointers and numbers come first in its signature, then the constants (``tl.constexpr``), which
the call gives by name; ``do_not_specialize`` for what changes from call to call.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import Parameter

from .precision import INTERPRETED

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class Launch(NamedTuple):
    """One call of ``launch``, as ``recorded`` hands it over instead of running it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constants: dict[str, Any]


def _knows_triton() -> bool:
    """``CompiledKernel.run`` takes the same arguments from 3.6 to 3.9."""
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return (3, 6) <= (major, minor) <= (3, 9)


# The one switch: without it every launch is Triton's own. The environment variable is for finding a fault.
DIRECT = not INTERPRETED and _knows_triton() and os.environ.get("PYTORCH_EXT_TRITON_LAUNCH") != "plain"

# (identity of the kernel, device, dtypes and divisibilities, constants) -> what runs it
_compiled: dict[tuple, Callable] = {}
_recorder: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Runs ``kernel`` on ``grid``: ``args`` are tensors, numbers or None, in the order of its signature; ``constants``
    its ``tl.constexpr`` parameters and Triton's options (``num_warps`` and so on).

    The first argument that is a tensor tells the device. Tensors are plain ones (or parameters), as all that reaches a
    kernel is.
    """
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, args, constants))
        return
    if not DIRECT:
        with _on_device_of(args):
            kernel[grid](*args, **constants)
        return
    key = [id(kernel), *constants, *constants.values()]
    values = []
    device, unaligned = None, 0
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is Parameter:
            a_ptr = a.data_ptr()
            if device is None:
                device = a.get_device()
            if a_ptr & 15:
                unaligned |= 1 << len(values)
            key.append(a.dtype)
            values.append(a_ptr)
            continue
        if kind is int:
            # Triton's own classes: 1 is a constant, multiples of 16 are known as such, and int32 or int64 by value.
            key.append(a if a == 1 else 0 if a & 15 else 16)
            if not -(2**31) <= a < 2**31:
                key.append(64)
        else:
            key.append(kind)
        values.append(a)
    key.append(device)
    key.append(unaligned)
    key = tuple(key)
    run = _compiled.get(key)
    if run is None:
        with _on_device_of(args):
            compiled = kernel[grid](*args, **constants)
        _compiled[key] = _runner(kernel, compiled, constants, device)
        return
    run(grid, values, args, constants)


def _runner(kernel: Any, compiled: Any, constants: dict[str, Any], device: int) -> Callable:
    """What launches ``compiled`` on ``device``, with the constants in their places behind the arguments."""
    names = kernel.arg_names
    behind = tuple(constants[name] for name in names if name in constants)
    count = len(names) - len(behind)
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    hooks = triton.knobs.runtime
    stream_of, current = torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice

    def launched(grid: tuple[int, ...], values: list, args: tuple, constants: dict[str, Any]) -> None:
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        if current() != device or _is_set(enter) or _is_set(leave) or len(values) != count:
            with _on_device_of(args):
                kernel[grid](*args, **constants)
            return
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, stream_of(device), function, metadata, None, None, None, *values, *behind)

    return launched


def _is_set(hook: Any) -> bool:
    """A chain of hooks that is empty runs nothing."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _on_device_of(args: tuple) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    for a in args:
        if isinstance(a, Tensor):
            return torch.cuda.device(a.device) if a.is_cuda else contextlib.nullcontext()
    return contextlib.nullcontext()


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, launches are noted down instead of run; tensors may be on the device ``meta``."""
    global _recorder
    outer, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = outer
