"""What a build compiles, what it leaves out and why, and what is missing. The environment: see setup.py."""

import os
import platform
import re
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from toolchain import (
    Nvcc,
    Torch,
    cuda_home,
    find_compiler,
    find_cudart,
    find_ninja,
    find_nvcc,
    find_torch,
    host_compiler_flags,
    is_gcc,
)

ROOT = Path(__file__).resolve().parent.parent
OLDEST_TORCH = (2, 11)

# Each file of csrc/cpu/isa is compiled once for each of these; what the processor has is asked when it runs.
INSTRUCTION_SETS = {
    "plain": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
# What is undefined or out of bounds ends the process with a report, and does so in every instruction set.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# With them the code around the units that multiply pairs runs on processors without them too.
SANITIZED = [*SANITIZERS, "-DPYTORCH_EXT_EMULATE_PAIRS"]


class Object(NamedTuple):
    name: str  # its file, below the folder of the library's objects
    source: Path
    rule: str  # of ninja: cxx or nvcc
    flags: list[str]
    isa: str = ""  # one of INSTRUCTION_SETS, of an object of csrc/cpu/isa
    header: str = ""  # the precompiled header that it includes, which is an object too


@dataclass
class Library:
    name: str
    sources: list[Path]
    tools: str = ""  # compiled with what, for what
    left_out: list[str] = field(default_factory=list)  # why it is not built
    missing: list[str] = field(default_factory=list)  # it was asked for: why it cannot be built
    objects: list[Object] = field(default_factory=list)
    link_flags: list[str] = field(default_factory=list)

    @property
    def is_built(self) -> bool:
        return not self.left_out


def plan(sanitize: bool = False) -> list[Library]:
    torch = find_torch()
    return [plan_cpu(torch, sanitize), plan_cuda(torch)]


def plan_cpu(torch: Torch | None, sanitize: bool = False) -> Library:
    library = Library("_cpu", sources_in("cpu", ".cpp"))
    vector_code = sources_in("cpu/isa", ".cpp")
    if switch("PYTORCH_EXT_CPU", "1", "0") == "0":
        library.left_out.append("PYTORCH_EXT_CPU=0 switches it off")
    if not sys.platform.startswith("linux"):
        library.left_out.append(f"it is built on Linux only, and this is {sys.platform}")
    if not library.sources:
        library.left_out.append("csrc/cpu holds no .cpp file")

    compiler = find_compiler()
    library.tools = f"{compiler[0] if compiler else 'g++ (not found)'}, against {torch_in_words(torch)}"
    if vector_code:
        library.tools += f"; those of csrc/cpu/isa once for each of {', '.join(instruction_sets())}"
    if not library.is_built:
        return library
    library.sources += vector_code
    library.missing = missing_for_cxx(torch)
    if compiler and not is_gcc(compiler):
        library.missing.append(f"g++ 11 or later, whose vector types csrc/cpu uses ({compiler[0]} is another)")
    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").exists():
        library.missing.append(f"Python's headers in {python} (Debian, Ubuntu: apt install python3-dev)")
    if torch and not library.missing:
        flags = [
            *common_flags(sanitize),
            *("-fopenmp", *torch.include_flags, "-isystem", python),
            # The library records the torch that it fits, and is not loaded under another.
            *("-DTORCH_EXTENSION_NAME=_cpu", f'-DPYTORCH_EXT_TORCH_VERSION="{torch.version}"'),
        ]
        library.objects = [
            *objects_with_torch(flags),
            *objects_by_instruction_set(vector_code, sanitize),
        ]
        library.link_flags = [
            *("-shared", "-fopenmp", *(SANITIZERS if sanitize else [])),
            *(f"-L{torch.folder / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
        ]
    return library


def common_flags(sanitize: bool) -> list[str]:
    """Of all of csrc/cpu. C++20 is what torch compiles extensions of its own with."""
    # -g1: the lines that a report names; where each variable lies is not needed, and costs time to find out.
    speed = ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZED] if sanitize else ["-O3"]
    only_plain = ["-DPYTORCH_EXT_ONLY_PLAIN"] if list(instruction_sets()) == ["plain"] else []
    own_headers = f"-I{ROOT / 'csrc/cpu'}"
    return ["-std=c++20", *speed, "-fPIC", "-fvisibility=hidden", "-Wall", own_headers, *only_plain]


def objects_with_torch(flags: list[str]) -> list[Object]:
    """Torch's headers take most of the time that each file takes, so the compiler reads them once."""
    headers, sources = [], sources_in("cpu", ".cpp")
    if (ROOT / "csrc/cpu/module.h").exists():
        headers = [Object("module.h.gch", ROOT / "csrc/cpu/module.h", "cxx", [*flags, "-x", "c++-header"])]
        flags = [*flags, "-include", "_cpu/module.h"]  # as ninja's folder has it
    header = headers[0].name if headers else ""
    return [*headers, *(Object(f"{s.name}.o", s, "cxx", flags, header=header) for s in sources)]


def instruction_sets() -> dict[str, list[str]]:
    """The names and the flags that this architecture has."""
    if platform.machine() in ("x86_64", "AMD64"):
        return INSTRUCTION_SETS
    return {"plain": []}


def objects_by_instruction_set(sources: list[Path], sanitize: bool) -> list[Object]:
    """Without the include paths of torch: a template of ATen or of the STL that were compiled here with AVX-512
    could become the one that the linker keeps for the whole library, and end it on an older processor."""
    flags = [
        *common_flags(sanitize),
        *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti"),
        "-Wno-maybe-uninitialized",  # which the headers of GCC 12 for AVX-512 bring upon themselves
    ]
    return [
        Object(f"isa/{source.name}.{isa}.o", source, "cxx", [*flags, *own, f"-DPYTORCH_EXT_ISA={isa}"], isa)
        for source in sources
        for isa, own in instruction_sets().items()
    ]


def plan_cuda(torch: Torch | None) -> Library:
    library = Library("_cuda", sources_in("cuda", ".cu", ".cpp"))
    asked = switch("PYTORCH_EXT_CUDA", "auto", "1", "0")
    nvcc = find_nvcc()
    home = cuda_home()
    no_nvcc = f"nvcc ({home}/bin has none)" if home else "nvcc (not on PATH, and CUDA_HOME is not set)"
    if asked == "0":
        library.left_out.append("PYTORCH_EXT_CUDA=0 switches it off")
    if asked == "auto" and nvcc is None:
        library.left_out.append(f"there is no {no_nvcc}")
    if asked == "auto" and (torch is None or torch.cuda is None):
        reason = f"{torch_in_words(torch)} is without CUDA" if torch else "torch is not here"
        library.left_out.append(f"{reason} (PYTORCH_EXT_CUDA=1 insists)")
    if not library.sources:
        library.left_out.append("csrc/cuda holds no .cu or .cpp file")
    if nvcc is None:
        library.tools = "nvcc (not found)"
        library.missing = [no_nvcc] if asked == "1" else []
        return library

    gencode, archs, refused = architectures(nvcc)
    library.tools = f"{nvcc.path} {nvcc.release} for {archs}, against {torch_in_words(torch)}"
    if not library.is_built:
        return library
    library.missing = refused + missing_for_cxx(torch)
    cudart = find_cudart(nvcc)
    if cudart is None:
        library.missing.append(f"libcudart_static.a under {nvcc.home} (the CUDA runtime's development files)")
    if torch and not library.missing:
        common = [
            *("-std=c++17", "-O3", f"-I{ROOT / 'csrc/cuda'}", *torch.include_flags),
            # Nothing newer than torch 2.11 and Python 3.11, so that one binary serves all later ones.
            *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030b0000"),
            *("-isystem", sysconfig.get_path("include")),
        ]
        hidden = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        cuda_headers = ["-isystem", str(nvcc.home / "include")]
        flags = {
            "nvcc": [*common, *hidden, *host_compiler_flags(), *gencode],
            "cxx": [*common, "-fPIC", "-fvisibility=hidden", *cuda_headers],
        }
        recorded = [f'-DPYTORCH_EXT_CUDA_ARCHITECTURES="{archs}"']
        for source in library.sources:
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            own = recorded if source.name == "module.cpp" else []
            library.objects.append(Object(f"{source.name}.o", source, rule, [*flags[rule], *own]))
        library.link_flags = [
            *("-shared", f"-L{torch.folder / 'lib'}", "-ltorch_cpu"),
            *(f"-L{cudart}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"),
        ]
    return library


def switch(name: str, default: str, *others: str) -> str:
    value = os.environ.get(name) or default
    if value not in (default, *others):
        raise SystemExit(f"error: {name}={value}: it takes {', '.join((default, *others))}.")
    return value


def sources_in(folder: str, *suffixes: str) -> list[Path]:
    return sorted(path for path in (ROOT / "csrc" / folder).glob("*") if path.suffix in suffixes)


def missing_for_cxx(torch: Torch | None) -> list[str]:
    """What every compiled library needs, and what of it is not here."""
    missing = []
    if torch is None:
        missing.append("torch, where this build runs (by default pip builds in an environment without it)")
    elif tuple(int(part) for part in torch.version.split(".")[:2]) < OLDEST_TORCH:
        missing.append(f"torch {'.'.join(map(str, OLDEST_TORCH))} or later (installed: {torch.version})")
    if find_compiler() is None:
        asked = os.environ.get("CXX")
        reason = f"CXX={asked} is no program" if asked else "neither g++ nor c++ is on PATH"
        missing.append(f"a C++ compiler ({reason}; Debian, Ubuntu: apt install g++)")
    if find_ninja() is None:
        missing.append("ninja")
    return missing


def architectures(nvcc: Nvcc) -> tuple[list[str], str, list[str]]:
    """The -gencode flags, the same in words, and what is wrong with TORCH_CUDA_ARCH_LIST."""
    wanted = re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if not wanted:
        wanted = ["8.0", "9.0", "10.0+PTX"] if "100" in nvcc.archs else ["8.0", "9.0+PTX"]
    flags, words, refused = [], [], []
    for arch in wanted:
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if parts is None:
            refused.append(f'in TORCH_CUDA_ARCH_LIST, 9.0, 9.0a, 9.0+PTX or the like in place of "{arch}"')
            continue
        number = parts.group(1) + parts.group(2)
        if nvcc.archs and number not in nvcc.archs:
            refused.append(f"an nvcc that knows compute capability {arch} ({nvcc.path} is {nvcc.release})")
        name = number + parts.group(3)
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        words.append(f"sm_{name}")
        if parts.group(4):
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
            words.append(f"PTX of {name}")
    return flags, ", ".join(words), refused


def torch_in_words(torch: Torch | None) -> str:
    return f"torch {torch.version}" if torch else "torch (not here)"


def in_words(libraries: list[Library]) -> str:
    lines = []
    for library in libraries:
        name = f"pytorch_ext.{library.name}"
        if library.is_built:
            lines.append(f"{name}: {len(library.sources)} source files, compiled by {library.tools}.")
        else:
            lines.append(f"{name}: not built, because {'; '.join(library.left_out)}.")
            lines.append(f"    It would be compiled by {library.tools}.")
        lines += [f"    Missing: {reason}." for reason in library.missing]
    return "\n".join(lines)


def refuse_what_cannot_be_built(libraries: list[Library]) -> None:
    """One error with all that is missing and the way out. A SystemExit, which pip shows without traceback."""
    lacking = [library for library in libraries if library.missing]
    if not lacking:
        return
    missing = dict.fromkeys(reason for library in lacking for reason in library.missing)
    names = " and ".join(f"pytorch_ext.{library.name}" for library in lacking)
    off = " ".join(f"PYTORCH_EXT{library.name.upper()}=0" for library in lacking)
    pin = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    torch = pin.group() if pin else "torch"
    raise SystemExit(
        f"error: {names} cannot be built. Missing:\n"
        + "".join(f"  - {reason}\n" for reason in missing)
        + "With everything there:\n"
        + f"  pip install {torch} setuptools wheel ninja && pip install . --no-build-isolation\n"
        + "Without this library:\n"
        + f"  {off} pip install ."
    )
