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


@pytest.mark.full
def test_every_op_under_address_and_undefined_behaviour_sanitizer(root, run_python, tmp_path):
    if cpu.library() is None:
        pytest.skip(backends.why_not("cpu", "gelu")[0])
    build = ["setup.py", "-q", "build_ext", "--sanitize", "--build-lib", str(tmp_path)]
    done = run_python(root, *build)
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = tmp_path.glob("pytorch_ext/_cpu.*.so")

    # Both have to be there before Python is, and the runtime of C++ too, whose exceptions the sanitizer watches.
    preload = ":".join(runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so"))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(library)],
        env={
            **os.environ,
            "LD_PRELOAD": preload,
            "ASAN_OPTIONS": "detect_leaks=0",  # Python does not free everything at its end
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    # The sanitizer's report stands behind the last thing that ran.
    assert done.returncode == 0, done.stderr.rpartition("running ")[2][:8000]
    for op in backends._registry.ops():
        assert backends.why_not("cpu", op) or f"'{op}'" in done.stdout, done.stdout
