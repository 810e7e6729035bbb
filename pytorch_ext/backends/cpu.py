"""``cpu``: C++ kernels for the processor, in the compiled library ``pytorch_ext._cpu``."""

import functools
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ._requirements import dtypes, fact, on_device

DESCRIPTION = "C++ for the CPU, chosen by what the processor has"
LIBRARY = "pytorch_ext._cpu"

# Keeps the library from the instruction sets above the one that it names; the library reads it when it is loaded.
CAP = "PYTORCH_EXT_CPU_ISA"
ISAS = ("plain", "avx2", "avx512", "avx512_bf16", "amx")  # each holds those before it


@functools.cache
def kernels() -> dict[str, Callable]:
    found = vars(library()) if library() else {}
    return {name: value for name, value in found.items() if name.endswith(("_fwd", "_bwd", "_grad"))}


def direct_function(op: str) -> Callable | None:
    return getattr(library(), f"{op}_direct", None)


def why_not(op: str, *tensors: Tensor) -> list[str]:
    return [*_missing(), *on_device(tensors, "cpu"), *dtypes(tensors)]


def drop_layouts(weights: list[Tensor]) -> None:
    """Forgets what inference laid out for these weights."""
    if library():
        library().drop_layouts(weights)


def layout_bytes(weights: list[Tensor]) -> int:
    """The size of what inference laid out for these weights, in bytes."""
    return library().layout_bytes(weights) if library() else 0


def isa() -> str | None:
    """The instruction set that the kernels use now, one of ``ISAS``; None where the library is not used."""
    found = library()
    return found.isa() if found else None


def library() -> ModuleType | None:
    """The compiled library; None where there is a reason not to use it."""
    return _loaded()[0]


@fact
def _missing() -> tuple[str, ...]:
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[ModuleType | None, tuple[str, ...]]:
    """The library, or in one sentence why it is not used."""
    spec = importlib.util.find_spec(LIBRARY)
    if spec is None:
        return None, (f"the compiled library {LIBRARY} is not in this installation",)
    cap = os.environ.get(CAP) or ISAS[-1]
    if cap not in ISAS:
        return None, (f"{CAP}: expected one of {', '.join(ISAS)}, got {cap!r}",)
    theirs, here = _torch_of(Path(spec.origin)), str(torch.__version__)
    if theirs != here:
        return None, (f"the compiled library {LIBRARY} was built with torch {theirs}, and this is {here}",)
    try:
        return importlib.import_module(LIBRARY), ()
    except (ImportError, OSError) as error:
        return None, (f"the compiled library {LIBRARY} cannot be loaded: {error}",)


def _torch_of(file: Path) -> str:
    """The torch that the library was built with. Read and not asked, because loading it under another may crash."""
    found = re.search(rb"pytorch_ext::_cpu was built with torch ([\w.+]+)\0", file.read_bytes())
    return found[1].decode() if found else "of an unknown version"
