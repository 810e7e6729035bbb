"""The sources of `csrc/cuda` on the CPU: `cuda_host("layer_norm")` makes the backend `cuda` run on CPU tensors."""

import importlib.util
import platform
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pytorch_ext.backends import _registry, cuda

ORDERS = ("ascending", "descending", "shuffled")


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cuda_host_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    """build.py, where there is what it needs."""
    module = _module("build")
    if platform.system() != "Linux" or module.compiler() is None:
        pytest.skip("a C++ compiler on Linux is needed to run CUDA's sources on the CPU")
    return module


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch) -> str:
    """In which order threads and blocks have their turns: what is missing between two of them shows in one order."""
    monkeypatch.setenv("CUDA_HOST_ORDER", request.param)
    return request.param


@pytest.fixture
def cuda_host(builder, monkeypatch) -> Callable[..., object]:
    """Called with stems of csrc/cuda: compiles and loads them, lets the backend ``cuda`` run their ops on CPU tensors,
    and returns the namespace of the raw ops.
    """
    caches = (cuda._missing, _registry._has_kernel, _registry.kernel)

    def use(*stems: str, sources: Path = builder.SOURCES, namespace: str = builder.NAMESPACE) -> object:
        for stem in stems:
            torch.ops.load_library(str(builder.build(stem, sources)))
        monkeypatch.setattr(cuda, "kernels", lambda: table(namespace))
        monkeypatch.setattr(cuda, "on_device", lambda *_: [])
        monkeypatch.setattr(cuda, "capability", lambda *_: [])
        for cached in caches:
            cached.cache_clear()
        return getattr(torch.ops, namespace)

    yield use
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def table(namespace: str) -> dict[str, Callable]:
    """The raw ops that are loaded, by name."""
    names = (full.partition("::") for full in torch._C._dispatch_get_all_op_names())
    loaded = getattr(torch.ops, namespace)
    return {name: getattr(loaded, name).default for space, _, name in names if space == namespace}
