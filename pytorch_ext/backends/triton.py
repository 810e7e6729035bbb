"""``triton``: kernels in Triton, for CUDA tensors; in its interpreter for CPU tensors too, which is for tests."""

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable
from importlib import metadata
from types import ModuleType

from torch import Tensor

from ._requirements import capability, collected, dtypes, fact, on_device

DESCRIPTION = "Triton for NVIDIA GPUs from sm_80 on"
PACKAGE = "pytorch_ext.kernels.triton"


def kernels() -> dict[str, Callable]:
    return collected(PACKAGE) if _installed() else {}


def why_not(op: str, *tensors: Tensor) -> list[str]:
    if _interpreted():
        return [*_missing(), *dtypes(tensors)]
    return [*_missing(), *on_device(tensors, "cuda"), *capability(tensors, (8, 0)), *dtypes(tensors)]


def kernel_files() -> dict[str, ModuleType]:
    """The files of kernels, by stem, that declare their ``calls``: what can be compiled ahead and tuned."""
    found = pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__)
    files = (importlib.import_module(f"{PACKAGE}.{info.name}") for info in found)
    return {file.__name__.rpartition(".")[2]: file for file in files if hasattr(file, "calls")}


def module(name: str) -> ModuleType:
    """What the kernels share: ``configs``, ``launch`` or ``sizes``."""
    return importlib.import_module(f"{PACKAGE}.{name}")


@fact
def _missing() -> tuple[str, ...]:
    if not _installed():
        return ("the package triton is not installed (a CUDA build of PyTorch for Linux brings it)",)
    if _interpreted() and _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        return ("the interpreter of Triton 3.6 cannot loop with numpy 2.4 or later",)
    return () if kernels() else ("this version has no Triton kernels",)


def _version(package: str) -> tuple[int, int]:
    try:
        major, minor = metadata.version(package).split(".")[:2]
    except metadata.PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


@fact
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
