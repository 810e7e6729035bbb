"""A machine with another GPU than the one that is there."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pytorch_ext import backends
from pytorch_ext.backends import _auto, _registry, _requirements, cuda, triton

FACTS = (
    _requirements.cuda_capability,
    _registry._has_kernel,
    cuda._missing,
    cuda._not_built_for,
    triton._missing,
    triton._interpreted,
)


@pytest.fixture
def forget_facts():
    """What was asked of the machine before, and what is asked of the fake one, must not outlive it."""
    for fact in FACTS:
        fact.cache_clear()
    yield
    for fact in FACTS:
        fact.cache_clear()


@pytest.fixture
def gpu(monkeypatch, forget_facts):
    """``gpu("sm_90")``: CUDA with that GPU, and with kernels for every op in `triton` and `cuda`."""

    def pretend(architecture: str) -> None:
        capability = (int(architecture[3:-1]), int(architecture[-1]))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        kernels = {f"{op}_{way}": lambda *args: None for op in _registry.ops() for way in ("fwd", "bwd")}
        for backend in (triton, cuda):
            monkeypatch.setattr(backend, "kernels", lambda: kernels)
        monkeypatch.setattr(cuda, "architectures", lambda: None)
        monkeypatch.setattr(triton, "_installed", lambda: True)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        for fact in FACTS:
            fact.cache_clear()

    return pretend


@pytest.fixture
def cuda_tensor():
    """A tensor that says of itself that it is on a GPU; it has no memory."""

    def make(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with FakeTensorMode():
            return torch.empty(3, 5, dtype=dtype, device="cuda:0")

    return make


@pytest.fixture
def fastest(monkeypatch) -> dict:
    """The table of `auto`, empty, for a test to write in; what it holds counts for any size."""
    table: dict[tuple[str, str], str] = {}
    monkeypatch.setattr(_auto, "FASTEST", table)
    monkeypatch.setattr(_auto, "WORTHWHILE", {})
    return table


@pytest.fixture(autouse=True)
def nothing_is_asked_for(monkeypatch):
    """Whatever the environment of this run says, a test of the choice begins without."""
    monkeypatch.setattr(backends._choice, "_from_environment", "auto")
