"""What nvcc makes of `csrc/cuda`, without a GPU: no warnings, no spills, as many registers as planned, wide loads.

`make test` compiles one architecture, one dtype and one size of heads as one file, by the flags of the build. What was
compiled is kept in `build/cuda_gates`, under a name made from everything that went into it.
"""

import hashlib
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pytorch_ext import ops  # noqa: F401  (it defines the schemas)

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
KEPT = ROOT / "build" / "cuda_gates"
STEMS = sorted(path.stem for path in SOURCES.glob("*.cu"))
# These have nothing to do but to move memory; of the others it is not asked how they do it.
MEMORY_BOUND = (
    *("gelu", "bias_gelu", "layer_norm", "dropout_add_layer_norm", "embedding_layer_norm", "encoder_layer"),
)
# Of attention in `make test`: one size of heads, and of short sequences the shortest room.
SMALLEST = ("-DPYTORCH_EXT_ONLY_HEAD=64", "-DPYTORCH_EXT_SHORT_LENGTH=64")


class Kernel(NamedTuple):
    name: str
    instance: str  # with its template arguments
    registers: int
    stack: int
    spills: int
    sass: str


class Compiled(NamedTuple):
    kernels: list[Kernel]
    library: Path


def plan_of(architecture: str, monkeypatch: pytest.MonkeyPatch):
    """The plan of the build for one architecture, and the machine's tools."""
    monkeypatch.syspath_prepend(ROOT / "build_tools")
    monkeypatch.setenv("PYTORCH_EXT_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architecture)
    build_plan, toolchain = (importlib.import_module(name) for name in ("build_plan", "toolchain"))
    if toolchain.find_nvcc() is None:
        pytest.skip("nvcc is not here")
    library = build_plan.plan_cuda(toolchain.find_torch())
    if library.missing:
        pytest.skip(f"csrc/cuda cannot be compiled here: {'; '.join(library.missing)}")
    return library, toolchain.find_nvcc()


def tool(name: str, nvcc) -> str:
    """Of the CUDA toolkit, or of those that Triton brings along."""
    folders = [nvcc.home / "bin"]
    if found := importlib.util.find_spec("triton"):
        folders.append(Path(found.origin).parent / "backends" / "nvidia" / "bin")
    path = shutil.which(name, path=":".join(map(str, folders)))
    if path is None:
        pytest.skip(f"{name} is not here")
    return path


def run(*command: str | Path) -> str:
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def compiled_for(
    architecture: str, monkeypatch: pytest.MonkeyPatch, *more: str, stems: Iterable[str] = STEMS
) -> Compiled:
    library, nvcc = plan_of(architecture, monkeypatch)
    flags = next(made.flags for made in library.objects if made.rule == "nvcc")
    # The host's code is not looked at. Half the time goes to reading headers, so they are read once.
    flags = [flag for flag in flags if flag != "-O3"]
    flags += ["-O0", "-Werror=all-warnings", "-Xcompiler=-Wall,-Werror", "-Xptxas=-v"]
    every = stems is STEMS
    flags += ["-DPYTORCH_EXT_ONLY_BFLOAT16", *more] if every else more
    text = "".join(f'#include "{SOURCES / stem}.cu"\n' for stem in stems)
    digest = hashlib.sha256(" ".join([nvcc.release, torch.__version__, text, *flags]).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    name = architecture if every else f"rows-{architecture}"
    folder = KEPT / f"{name}-{digest.hexdigest()[:16]}"
    done = folder / "library.so"
    if not done.exists():
        for older in KEPT.glob(f"{name}-*"):
            shutil.rmtree(older)
        folder.mkdir(parents=True)
        (folder / "all.cu").write_text(text)
        log = run(nvcc.path, *flags, "-c", folder / "all.cu", "-o", folder / "all.o")
        (folder / "log.txt").write_text(log)
        run("g++", folder / "all.o", *library.link_flags, "-o", folder / "unfinished.so")
        (folder / "unfinished.so").rename(done)
    sass = run(tool("cuobjdump", nvcc), "-sass", folder / "all.o")
    return Compiled(kernels_of((folder / "log.txt").read_text(), sass), done)


def kernels_of(log: str, sass: str) -> list[Kernel]:
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", sass, re.DOTALL))
    found = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill"
        r" loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    # In mangled names each part stands behind its length.
    parts = {f"{len(name)}{name}": name for name in plans()}
    return [
        Kernel(
            next((name for part, name in parts.items() if part in mangled), mangled),
            mangled,
            int(registers),
            int(stack),
            int(stores) + int(loads),
            code[mangled],
        )
        for mangled, stack, stores, loads, registers in found
    ]


def plans() -> dict[str, tuple[int, bool]]:
    """Of each kernel the registers that it may take, and whether it may spill, as it says above each."""
    plan = re.compile(r"// Plan: at most (\d+) registers([^\n]*)\n(?:(?!\n\n).)*?\b(\w+_kernel)\(", re.DOTALL)
    texts = (path.read_text() for path in sorted(SOURCES.glob("*.cu*")))
    return {name: (int(most), "spills" in rest) for text in texts for most, rest, name in plan.findall(text)}


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return compiled_for("8.0", monkeypatch, *SMALLEST)


def check_registers(kernels: list[Kernel]) -> None:
    assert {kernel.name for kernel in kernels} == plans().keys()
    check_each(kernels)


def check_each(kernels: list[Kernel]) -> None:
    planned = plans()
    wrong = [
        f"{k.instance}: {k.registers} registers, {k.stack} bytes of stack, {k.spills} of spills"
        for k in kernels
        if k.registers > planned[k.name][0] or ((k.spills or k.stack) and not planned[k.name][1])
    ]
    assert not wrong, "\n".join(wrong)
    forward = [k.name for k in kernels if "fwd" in k.name and planned[k.name][1]]
    assert not forward, "a forward kernel may not spill"


def check_instructions(kernels: list[Kernel]) -> None:
    for k in kernels:
        if k.name.removesuffix("_fwd_kernel").removesuffix("_bwd_kernel") in MEMORY_BOUND:
            loads, stores = (
                len(re.findall(rf"\b{way}\.E(?:\.\w+)*\.128\b", k.sass)) for way in ("LDG", "STG")
            )
            assert loads >= 1 and stores >= 1, f"{k.instance}: {loads} loads and {stores} stores of 128 bits"
        if k.name.startswith("attention"):
            products, copies, stores = (
                len(re.findall(pattern, k.sass))
                for pattern in (
                    r"\bHMMA\.16816\.F32\b",
                    r"\bLDGSTS\.E(?:\.\w+)*\.128\b",
                    r"\bSTG\.E(?:\.\w+)*\.128\b",
                )
            )
            found = f"{products} products on tensor cores, {copies} copies and {stores} stores of 128 bits"
            assert products >= 32 and copies >= 1 and stores >= 1, f"{k.instance}: {found}"


def test_registers_and_spills(compiled):
    check_registers(compiled.kernels)


def test_memory_is_moved_16_bytes_at_a_time(compiled):
    check_instructions(compiled.kernels)


def test_it_loads_beside_this_torch_and_registers_what_the_other_backends_have(compiled):
    code = (
        "import sys, torch, pytorch_ext.ops\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "from pytorch_ext.backends import cuda, native\n"
        "table = cuda.table(cuda.NAMESPACE)\n"
        "for name, op in table.items():\n"
        "    if name.startswith('linear'): continue\n"
        "    ours, plain = (str(getattr(getattr(torch.ops, space), name).default._schema).split('::')[1]\n"
        "                   for space in ('pytorch_ext', cuda.NAMESPACE))\n"
        "    assert ours.replace(', str backend', '') == plain, (ours, plain)\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'{cuda.NAMESPACE}::{name}', 'CUDA'), name\n"
        "print(*sorted({name.rpartition('_')[0] for name in table}))"
    )
    *_, names = run(sys.executable, "-c", code, compiled.library).splitlines()
    assert set(MEMORY_BOUND) | {"linear"} <= set(names.split())


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["9.0", "10.0"])
def test_on_other_architectures(architecture, monkeypatch):
    made = compiled_for(architecture, monkeypatch)
    check_registers(made.kernels)
    check_instructions(made.kernels)


@pytest.mark.long
def test_every_dtype_of_what_works_row_by_row(monkeypatch):
    made = compiled_for("8.0", monkeypatch, stems=MEMORY_BOUND)
    instances = " ".join(k.instance for k in made.kernels if k.name == "layer_norm_fwd_kernel")
    assert len(made.kernels) > len(MEMORY_BOUND) * 3 and "BFloat16" in instances and "Half" in instances
    check_each(made.kernels)
    check_instructions(made.kernels)


@pytest.mark.long
def test_attention_in_float16(monkeypatch):
    """The other gates compile it for bfloat16 alone."""
    made = compiled_for("9.0", monkeypatch, "-DPYTORCH_EXT_ONLY_HEAD=64", stems=("attention",))
    halves = [k for k in made.kernels if "Half" in k.instance]
    assert {k.name for k in halves} == {name for name in plans() if name.startswith("attention")}
    check_each(made.kernels)
    check_instructions(made.kernels)
    assert all("BF16" not in k.sass for k in halves), "products of float16 are products of float16"


def test_a_plan_that_is_exceeded_is_seen(compiled):
    greedy = [k._replace(registers=k.registers + 200) for k in compiled.kernels[:1]] + compiled.kernels[1:]
    with pytest.raises(AssertionError, match="registers"):
        check_registers(greedy)
    spilling = [k._replace(spills=8) if "fwd" in k.name else k for k in compiled.kernels]
    with pytest.raises(AssertionError, match="spills"):
        check_registers(spilling)
    narrow = [k._replace(sass=k.sass.replace(".128", ".64")) for k in compiled.kernels]
    with pytest.raises(AssertionError, match="128 bits"):
        check_instructions(narrow)
