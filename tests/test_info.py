"""The report says what is here, and fails whatever is not."""

import json
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from pytorch_ext import backends, info
from pytorch_ext.backends import cpu
from pytorch_ext.info import Info, report


def test_for_people():
    text = str(report())
    lines = text.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    assert lines[0].startswith("pytorch-ext ")
    for name in (torch.__version__, *backends.names(), *backends._registry.ops(), "auto takes", "why not"):
        assert name in text


def test_for_machines():
    found = json.loads(json.dumps(report().as_dict()))
    assert set(found) == set(Info.__dataclass_fields__)
    assert found["torch"]["version"] == torch.__version__
    assert found["packages"]["numpy"] == metadata.version("numpy")
    assert found["system"]["threads"] == torch.get_num_threads()


def test_the_table_is_what_the_backends_say():
    found = report()
    x = torch.empty(0)
    for op, of_backend in found.can_run.items():
        for name, devices in of_backend.items():
            assert ("cpu" in devices) == (not backends.why_not(name, op, x))
        assert found.auto[op]["cpu"] == backends.choose(op, x)


def test_every_reason_stands_there_once():
    found = report()
    for name in backends.names():
        if name not in backends.available():
            assert found.why_not[name] == backends.why_not(name, "gelu")
    assert found.why_not["native"] == []


def test_a_reason_that_concerns_some_ops_names_them(monkeypatch):
    real = backends.why_not

    def without_two(name, op, *tensors):
        if name == "reference" and op in ("gelu", "linear"):
            return [f"this version has no kernel for {op} in this backend"]
        return real(name, op, *tensors)

    monkeypatch.setattr(backends, "why_not", without_two)
    assert report().why_not["reference"] == [
        "this version has no kernel for it in this backend: gelu, linear"
    ]


def test_who_was_asked_for(monkeypatch):
    with backends.use("reference"):
        assert report().asked_for["name"] == "reference"
    monkeypatch.setenv("PYTORCH_EXT_BACKEND", "cuda")
    assert "PYTORCH_EXT_BACKEND=cuda" in str(report())


def test_which_instruction_set_the_kernels_use(monkeypatch):
    monkeypatch.setenv(cpu.CAP, "avx2")
    found = report()
    assert found.system["kernels_cap"] == "avx2"
    assert found.system["kernels_use"] == cpu.isa()
    assert f"{cpu.isa() or 'none'} (PYTORCH_EXT_CPU_ISA=avx2)" in str(found)
    monkeypatch.delenv(cpu.CAP)
    assert "(PYTORCH_EXT_CPU_ISA is not set)" in str(report())


def raises(error):
    def function(*args, **kwargs):
        raise error

    return function


def test_nothing_optional_is_here(monkeypatch):
    monkeypatch.setattr(metadata, "version", raises(metadata.PackageNotFoundError("all of them")))
    monkeypatch.setattr(subprocess, "run", raises(FileNotFoundError("git")))
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", raises(RuntimeError("unknown processor")), raising=False
    )
    monkeypatch.setattr(torch.cuda, "is_available", raises(RuntimeError("driver too old")))
    found = report()
    assert found.commit is None and found.gpus == []
    assert set(found.packages.values()) == {None}
    assert "none of those that are optional" in str(found)


def test_a_gpu_that_is_seen_and_cannot_be_used(monkeypatch):
    properties = type("Properties", (), {"name": "A GPU", "major": 9, "minor": 0, "total_memory": 80 * 2**30})
    monkeypatch.setattr(info.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(info.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(info.torch.cuda, "get_device_properties", lambda index: properties)
    original = torch.empty
    no_memory = raises(RuntimeError("CUDA error"))
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: no_memory() if k.get("device") == "cuda" else original(*a, **k)
    )
    found = report()
    assert found.gpus == [{"name": "A GPU", "capability": "sm_90", "memory_gib": 80.0}]
    assert "A GPU, sm_90, 80.0 GiB" in str(found)
    assert all(list(of_device) == ["cpu"] for of_device in found.auto.values())


def test_a_backend_that_breaks(monkeypatch):
    monkeypatch.setattr(backends._registry.backend("cpu"), "why_not", raises(ImportError("undefined symbol")))
    assert report().why_not["cpu"] == ["asking it failed with ImportError: undefined symbol"]


# Not triton: torch._dynamo imports it wherever it is installed.
@pytest.mark.parametrize("optional", ["transformers", "onnx", "onnxruntime", "netron"])
def test_nothing_optional_is_imported(optional):
    if "imported" not in CACHE:
        code = "import sys; from pytorch_ext.info import report; str(report()); print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        CACHE["imported"] = done.stdout.split()
    assert optional not in CACHE["imported"]


CACHE: dict[str, list[str]] = {}
