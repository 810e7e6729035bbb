"""What the backend ``triton`` says of the machine; its kernels are tested in ``tests/ops`` and ``tests/kernels``."""

import pytest

from pytorch_ext.backends import triton as backend

pytest.importorskip("triton", reason="the package triton is not installed")


@pytest.fixture
def installed(monkeypatch):
    versions = {}

    def version(package):
        if package not in versions:
            raise backend.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(backend.metadata, "version", version)
    backend._missing.cache_clear()
    yield versions
    backend._missing.cache_clear()


CANNOT = ["the interpreter of Triton 3.6 cannot loop with numpy 2.4 or later"]


@pytest.mark.parametrize(
    ("triton", "numpy", "interpreted", "reasons"),
    [
        ("3.6.0", "2.4.6", True, CANNOT),
        ("3.6.0", "2.10.0", True, CANNOT),
        ("3.6.0", "2.3.5", True, []),
        ("3.7.1", "2.4.6", True, []),
        ("3.10.0+git1", "2.5.0", True, []),
        ("3.6.0", "2.4.6", False, []),
    ],
)
def test_an_interpreter_that_cannot_loop(installed, monkeypatch, triton, numpy, interpreted, reasons):
    installed |= {"triton": triton, "numpy": numpy}
    monkeypatch.setattr(backend, "_interpreted", lambda: interpreted)
    found = [reason for reason in backend.why_not("gelu") if "interpreter" in reason]
    assert found == reasons


def test_every_op_has_both_directions():
    names = set(backend.kernels())
    ops = {name.removesuffix("_fwd").removesuffix("_bwd") for name in names}
    assert names == {f"{op}_{direction}" for op in ops for direction in ("fwd", "bwd")}
    from pytorch_ext.backends._registry import ops as every_op

    assert ops == set(every_op())


def test_every_file_with_an_op_says_what_to_compile_and_tune():
    files = {name: vars(file) for name, file in backend.kernel_files().items()}
    assert {name for name in files if "AHEAD" in files[name]} == set(files)
    named = {function.__module__.rpartition(".")[2] for function in backend.kernels().values()}
    assert named == set(files)
