"""The C++ of the CPU reads and writes nothing that it should not, and does nothing undefined."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytorch_ext import backends
from pytorch_ext.backends import cpu

SCRIPT = Path(__file__).with_name("sanitized.py")


def runtime(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def library(root, tmp_path_factory) -> Path:
    """`_cpu`, built to end the process at what is wrong, with the units that multiply pairs emulated in plain loops."""
    if cpu.library() is None:
        pytest.skip(backends.why_not("cpu", "gelu")[0])
    folder = tmp_path_factory.mktemp("sanitized")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--sanitize", "--build-lib", str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("pytorch_ext/_cpu.*.so")
    return file


def watched(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Both have to be there before Python is, and the runtime of C++ too, whose exceptions the sanitizer watches.
    preload = ":".join(runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so"))
    return subprocess.run(
        [sys.executable, *command],
        env={
            **os.environ,
            "LD_PRELOAD": preload,
            "ASAN_OPTIONS": "detect_leaks=0",  # Python does not free everything at its end
            "UBSAN_OPTIONS": "print_stacktrace=1",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
def test_every_op_under_address_and_undefined_behaviour_sanitizer(library):
    done = watched(str(SCRIPT), str(library))
    # The sanitizer's report stands behind the last thing that ran.
    assert done.returncode == 0, done.stderr.rpartition("running ")[2][:8000]
    for op in backends._registry.ops():
        assert backends.why_not("cpu", op) or f"'{op}'" in done.stdout, done.stdout


@pytest.mark.long
@pytest.mark.parametrize("isa", ["avx512_bf16", "amx"])
def test_the_contract_holds_around_units_that_multiply_pairs(isa, root, library):
    """What lays matrices out for them, on a processor that need not have one. Only 16-bit elements go there."""
    done = watched(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
        *("-p", "tests.house.instead", "--library", str(library)),
        *("tests/ops/test_every_op_numerics.py", "tests/ops/test_attention_blocks.py"),
        *("tests/ops/test_linear.py", "-k", "cpu and (bfloat16 or float16 or blocks)"),
        PYTORCH_EXT_CPU_ISA=isa,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
