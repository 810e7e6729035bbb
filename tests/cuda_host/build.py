"""Compiles sources of `csrc/cuda` for the CPU, where `cuda_host.h` gives them CUDA's execution model.

Each .cu file becomes a library of its own, which registers the same ops under the CPU key in the namespace NAMESPACE.
What was compiled is kept in `build/cuda_host`, under a name made from everything that went into it.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Another folder of sources, with planted faults say, keeps what it becomes to itself.
SOURCES = Path(os.environ.get("CUDA_HOST_SOURCES") or ROOT / "csrc" / "cuda")
KEPT = SOURCES if "CUDA_HOST_SOURCES" in os.environ else ROOT / "build" / "cuda_host"
NAMESPACE = "pytorch_ext_cuda_host"
# What kernels read and write is watched; the runtimes of the sanitizers have to be in the process before Python is.
SANITIZE = bool(os.environ.get("CUDA_HOST_SANITIZE"))

FLAGS = [
    *("-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-march=native"),
    # As nvcc does: sums of products are fused, and what lies at an address has no type.
    *("-ffp-contract=fast", "-fno-strict-aliasing"),
    *("-Wall", "-Werror", "-Wno-unknown-pragmas"),
    *("-DPYTORCH_EXT_CUDA_HOST", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
]
FAST = ["-O1", "-g1"]
SANITIZED = [
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]


def stems() -> list[str]:
    """The .cu files that there are."""
    return sorted(path.stem for path in SOURCES.glob("*.cu"))


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++")


def build(stem: str, sources: Path = SOURCES, *, sanitize: bool = SANITIZE) -> Path:
    """The library of one .cu file, compiled unless it is there already."""
    options = [*FLAGS, *(SANITIZED if sanitize else FAST)]
    name = f"{stem}-sanitized" if sanitize else stem
    library = KEPT / f"{name}-{_digest(sources / f'{stem}.cu', options)}.so"
    if library.exists():
        return library
    KEPT.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = [
        *(compiler(), *options, f"-I{sources}", f"-I{HERE}", f"-I{SOURCES}"),
        *(flag for path in include_paths() for flag in ("-isystem", path)),
        *("-x", "c++", str(sources / f"{stem}.cu"), str(HERE / "cuda_host.cpp")),
        *(flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")),
        *("-ltorch_cpu", "-lc10", "-ldl", "-o", str(unfinished)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{stem}.cu does not compile for the CPU:\n{done.stderr[-8000:]}")
    for older in KEPT.glob(f"{name}-{'[0-9a-f]' * 16}.so"):
        older.unlink(missing_ok=True)
    unfinished.rename(library)
    return library


def _digest(source: Path, options: list[str]) -> str:
    found = hashlib.sha256(" ".join([torch.__version__, *options]).encode())
    version = subprocess.run([compiler(), "--version"], capture_output=True, check=True)
    found.update(version.stdout)
    # What -march=native stands for.
    native = subprocess.run(
        [compiler(), "-march=native", "-Q", "--help=target"], capture_output=True, check=True
    )
    found.update(native.stdout)
    headers = [*SOURCES.glob("*.cuh"), *SOURCES.glob("*.h"), *HERE.glob("*.h"), *HERE.glob("*.cpp")]
    # Another folder's source may include these.
    included = SOURCES.glob("*.cu") if source.parent != SOURCES else ()
    for path in [source, *sorted(headers), *sorted(included)]:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
