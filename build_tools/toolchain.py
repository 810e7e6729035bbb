"""What this machine has to compile with: torch, the C++ compiler, nvcc, ninja. Nothing here imports torch."""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: str | None

    @property
    def include_flags(self) -> list[str]:
        include = self.folder / "include"
        return ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]


def find_torch() -> Torch | None:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    facts = runpy.run_path(str(folder / "version.py"))
    return Torch(folder, str(facts["__version__"]), facts["cuda"])


def find_compiler() -> list[str] | None:
    """The C++ compiler as a command, because `CXX` may be "ccache g++"."""
    asked = os.environ.get("CXX")
    for command in [shlex.split(asked)] if asked else [["g++"], ["c++"]]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    return None


def is_gcc(compiler: list[str]) -> bool:
    """Whether it is g++ 11 or later, whatever its name."""
    macros = subprocess.run(
        [*compiler, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=False
    ).stdout
    version = re.search(r"#define __GNUC__ (\d+)", macros)
    return "__clang__" not in macros and version is not None and int(version[1]) >= 11


def host_compiler_flags() -> list[str]:
    """nvcc takes the compiler that `CXX` names, and of a command like "ccache g++" the compiler alone."""
    if not os.environ.get("CXX"):
        return []
    words = [word for word in find_compiler() or [] if Path(word).name not in {"ccache", "sccache", "distcc"}]
    return ["-ccbin", words[0]] if words else []


class Nvcc(NamedTuple):
    path: str
    release: str
    home: Path
    archs: frozenset[str]  # {"80", "90", ...}


def cuda_home() -> str | None:
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")


def find_nvcc() -> Nvcc | None:
    home = cuda_home()
    path = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
    if path is None:
        return None
    release = re.search(r"release ([\d.]+)", output_of(path, "--version"))
    archs = re.findall(r"compute_(\d+)", output_of(path, "--list-gpu-arch"))
    # nvcc may be a script that starts the real one elsewhere: it is asked where it lives.
    top = re.search(r"TOP=(.+)", output_of(path, "--dryrun", "-x", "cu", "/dev/null"))
    return Nvcc(
        path,
        release.group(1) if release else "of an unknown release",
        Path(top.group(1).strip() if top else Path(path).parent.parent).resolve(),
        frozenset(archs),
    )


def find_cudart(nvcc: Nvcc) -> Path | None:
    """The folder of the static CUDA runtime; where it lies differs between the installers and the wheels."""
    for folder in ("lib64", "lib", "targets/*/lib"):
        for found in nvcc.home.glob(f"{folder}/libcudart_static.a"):
            return found.parent
    return None


def find_ninja() -> str | None:
    # Under `pip install --no-build-isolation` the environment's own bin folder need not be on PATH.
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    return shutil.which("ninja", path=os.pathsep.join(folders))


def output_of(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout
