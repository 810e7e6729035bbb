"""When the compiled library is used, when it is not, and with which instruction set."""

import importlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pytorch_ext.backends import cpu

WITHOUT = f"the compiled library {cpu.LIBRARY}"
needs_library = pytest.mark.skipif(
    importlib.util.find_spec(cpu.LIBRARY) is None, reason=f"{cpu.LIBRARY} is not built"
)


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture
def library_built_with(monkeypatch, tmp_path):
    """Stands in for the compiled library by a file that cannot be loaded."""

    def pretend(version: str | None) -> None:
        text = f"ELF\0pytorch_ext::_cpu was built with torch {version}\0" if version else "ELF\0"
        (tmp_path / "_cpu.so").write_text(text)
        spec = importlib.machinery.ModuleSpec(cpu.LIBRARY, None, origin=str(tmp_path / "_cpu.so"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr(importlib, "import_module", no_import)

    return pretend


def no_import(name: str):
    raise OSError(f"{name}.so: undefined symbol: _ZN2at4_ops")


def load():
    return cpu._loaded.__wrapped__()


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.13.0a0", None])
def test_one_that_was_built_with_another_torch_is_not_loaded(version, library_built_with):
    library_built_with(version)
    named = version or "of an unknown version"
    assert load() == (None, (f"{WITHOUT} was built with torch {named}, and this is {torch.__version__}",))


def test_one_that_cannot_be_loaded(library_built_with):
    library_built_with(str(torch.__version__))
    assert load() == (
        None,
        (f"{WITHOUT} cannot be loaded: pytorch_ext._cpu.so: undefined symbol: _ZN2at4_ops",),
    )


def test_a_cap_that_is_no_instruction_set(library_built_with, monkeypatch):
    library_built_with(str(torch.__version__))
    monkeypatch.setenv(cpu.CAP, "sse")
    assert load() == (
        None,
        ("PYTORCH_EXT_CPU_ISA: expected one of plain, avx2, avx512, avx512_bf16, amx, got 'sse'",),
    )


@needs_library
def test_the_library_records_its_torch():
    spec = importlib.util.find_spec(cpu.LIBRARY)
    built_with = cpu._torch_of(Path(spec.origin))
    assert built_with == importlib.import_module(cpu.LIBRARY).torch_version


@needs_library
def test_instruction_sets_of_this_processor():
    library = cpu.library()
    found = library.isas()
    assert found == list(cpu.ISAS[: len(found)])
    before = library.isa()
    try:
        for name in found:
            library.set_isa(name)
            assert cpu.isa() == name
    finally:
        library.set_isa(before)
    for name in ("sse", *cpu.ISAS[len(found) :]):
        with pytest.raises(ValueError, match="expected"):
            library.set_isa(name)


@needs_library
@pytest.mark.full
@pytest.mark.parametrize("cap", ["", "amx"])
def test_no_cap_that_bites(cap):
    code = "from pytorch_ext.backends import cpu; print(cpu.isa(), cpu.library().isas()[-1])"
    used, best = run("-c", code, PYTORCH_EXT_CPU_ISA=cap).split()
    assert used == best


@needs_library
def test_the_cap():
    report = run("-m", "pytorch_ext", "info", PYTORCH_EXT_CPU_ISA="plain")
    assert "  cpu kernels use   plain (PYTORCH_EXT_CPU_ISA=plain)\n" in report


def test_a_wrong_cap_is_one_sentence():
    code = """
import torch
from pytorch_ext import backends, ops
with backends.use("cpu"):
    try:
        ops.gelu(torch.ones(3))
    except backends.BackendError as error:
        print(error)
"""
    said = run("-c", code, PYTORCH_EXT_CPU_ISA="sse").splitlines()
    assert len(said) == 1
    if importlib.util.find_spec(cpu.LIBRARY):
        assert "PYTORCH_EXT_CPU_ISA: expected one of plain, avx2, avx512, avx512_bf16, amx, got 'sse'" in said[0]
