"""Compiles every kernel for every architecture on a machine without a GPU, and says what came out.

    python -m pytorch_ext.kernels.triton.ahead           # brings docs/triton-kernels.md up to date
    python -m pytorch_ext.kernels.triton.ahead --all     # makes all of it anew

A kernel file that has ``calls`` and ``AHEAD`` is compiled for the launches that its calls make with those sizes: the
ops run on tensors without memory, and each launch is noted down instead of made. So what is compiled is what would run.
"""

import functools
import hashlib
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from .configs import ARCHITECTURES, Configs, for_architecture
from .launch import OPTIONS, Launch, recorded

# Bytes of shared memory that a program may have. sm_80 itself has 163 KiB, but its configurations serve sm_86, sm_89
# and sm_120 too.
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
REGISTERS = 65536  # of a multiprocessor
# What multiplies 16-bit matrices, the best first; the smaller tiles of an architecture use what came before it.
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Version:
    """One kernel as Triton specialises it: what a launch on aligned tensors compiles."""

    kernel: Any
    architecture: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def dtype(self) -> str:
        """Of the first pointer to floating-point numbers: what the call is about."""
        return next((t[1:] for _, t in self.signature if t in ("*fp32", "*bf16", "*fp16")), "-")

    def __str__(self) -> str:
        return f"{self.name} {self.architecture} {self.dtype} {self.described()}"

    def described(self) -> str:
        values = [
            f"{name}={value}" for name, value in self.constants if value is not None and name.isupper()
        ]
        return " ".join([*values, *(f"{name}={value}" for name, value in self.options)])


@dataclass(frozen=True)
class Compiled:
    registers: int
    spilled: int  # bytes of local memory of a thread
    shared: int
    matrix: tuple[str, ...]  # the matrix instructions in it
    dots: tuple[tuple[int, str], ...]  # rows and operand type of each product in the source


def modules() -> dict[str, ModuleType]:
    """The kernel files that declare what to compile, by their stem."""
    package = importlib.import_module(__package__)
    found = (importlib.import_module(f"{__package__}.{info.name}") for info in pkgutil.iter_modules(package.__path__))
    return {module.__name__.rpartition(".")[2]: module for module in found if hasattr(module, "AHEAD")}


def without_memory(*shape: int, dtype: torch.dtype, **options: Any) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def versions(module: ModuleType, architecture: str) -> list[Version]:
    """What the calls of ``module`` would compile, each once."""
    found: dict[Version, None] = {}
    with for_architecture(architecture), recorded() as launches:
        for sizes in module.AHEAD:
            for _, call in module.calls(sizes, without_memory):
                call()
    for launch in launches:
        found.setdefault(version_of(launch, architecture))
    return list(found)


def version_of(launch: Launch, architecture: str) -> Version:
    """By Triton's rules: an integer that is 1 is a constant, one that is a multiple of 16 is known to be one."""
    kernel = launch.kernel
    signature, constants, divisible = {}, {}, []
    for i, (param, value) in enumerate(zip(kernel.params, launch.args, strict=False)):
        kind = _type_of(value)
        special = isinstance(value, int) and value == 1 and not param.do_not_specialize
        if kind is None or special:
            kind, constants[param.name] = "constexpr", value
        elif kind.startswith("*") or (
            isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize
        ):
            divisible.append(i)
        signature[param.name] = kind
    options = {name: value for name, value in launch.constants.items() if name in OPTIONS}
    for param in kernel.params[len(launch.args) :]:
        signature[param.name] = "constexpr"
        constants[param.name] = launch.constants[param.name]
    return Version(
        kernel,
        architecture,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        tuple(options.items()),
    )


def _type_of(value: Any) -> str | None:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return None


def compiled(version: Version) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    index = {param.name: i for i, param in enumerate(version.kernel.params)}
    source = ASTSource(
        fn=version.kernel,
        signature=dict(version.signature),
        constexprs={(index[name],): value for name, value in version.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in version.divisible},
    )
    target = GPUTarget("cuda", int(version.architecture.removeprefix("sm_")), 32)
    # Triton's default of today, named because a later one is to change it.
    options = {**dict(version.options), "enable_fp_fusion": True}
    made = triton.compile(source, target=target, options=options)
    registers, spilled = _resources(made.asm["cubin"])
    ptx = made.asm["ptx"]
    return Compiled(
        registers=registers,
        spilled=spilled,
        shared=made.metadata.shared,
        matrix=tuple(name for name in MATRIX.values() if name in ptx),
        dots=_dots(made.asm["ttir"]),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), sum(
        int(re.search(rf"{kind}:(\d+)", text)[1]) for kind in ("STACK", "LOCAL")
    )


def _dots(ttir: str) -> tuple[tuple[int, str], ...]:
    found = re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(\w+)> \*", ttir)
    return tuple(sorted({(int(rows), kind) for rows, kind in found}))


def failures(version: Version, result: Compiled) -> list[str]:
    """What is not as it has to be, in sentences."""
    found = []
    threads = 32 * dict(version.options).get("num_warps", 4)
    if result.spilled and "bwd" not in version.name:
        found.append(f"{version}: {result.spilled} bytes of local memory in a forward kernel")
    if result.registers * threads > REGISTERS:
        found.append(f"{version}: {result.registers} registers for each of {threads} threads do not fit")
    if result.shared > SHARED[version.architecture]:
        found.append(f"{version}: {result.shared} bytes of shared memory do not fit")
    for rows, kind in result.dots:
        if kind in ("bf16", "f16"):
            # A warp group multiplies 64 rows and more; fewer are for the instruction of sm_80.
            wanted = MATRIX[version.architecture] if rows >= 64 else MATRIX["sm_80"]
            if wanted not in result.matrix:
                there = ", ".join(result.matrix) or "none"
                found.append(f"{version}: a product of {rows} rows wants {wanted}, and there is {there}")
    return found


def unreached(module: ModuleType) -> list[str]:
    """Rows of the tables that none of the module's calls takes, once ``versions`` has made them: a user would be the
    first to compile them.
    """
    with recorded():
        calls = [call for sizes in module.AHEAD for call in module.calls(sizes, without_memory)]
    of_module: dict[str, Configs] = {configs.name: configs for configs, _ in calls}
    found = []
    for configs in of_module.values():
        for architecture, rows in configs.table.items():
            missing = [i for i in range(len(rows)) if (architecture, i) not in configs.used]
            found += [f"{configs.name}: row {i} for {architecture}" for i in missing]
    return found


# --- The table in the documents ---------------------------------------------------------------------------------

HEAD = """\
# The Triton kernels, compiled

Made by `python -m pytorch_ext.kernels.triton.ahead`, which needs no GPU: every kernel with every configuration that is
shipped, as the compiler left it. What the columns are held to is said in [The Triton kernels](triton.md). Registers and
bytes of local memory (spills, or arrays) are those of a thread, shared memory that of a program.
"""


@functools.cache
def digest(stem: str) -> str:
    """Of a kernel file and those beside it that it imports, without comments."""
    folder = Path(__file__).parent
    wanted, texts = [stem], {}
    while wanted:
        name = wanted.pop()
        if name not in texts and (folder / f"{name}.py").exists():
            text = (folder / f"{name}.py").read_text()
            lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
            texts[name] = "\n".join(lines)
            wanted += re.findall(r"^from \.(\w+) import", text, re.MULTILINE)
    return hashlib.sha256("\n".join(texts[name] for name in sorted(texts)).encode()).hexdigest()[:16]


def sections(text: str) -> dict[str, tuple[str, str]]:
    """``stem -> (digest, section)`` of a document that this module wrote."""
    found = {}
    for part in re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]:
        mark = re.search(r"<!-- (\w+)\.py (\w+) -->", part)
        found[mark[1]] = (mark[2], part.rstrip() + "\n")
    return found


def section(stem: str, module: ModuleType) -> str:
    rows = []
    for architecture in ARCHITECTURES:
        for version in versions(module, architecture):
            result = compiled(version)
            problems = failures(version, result)
            if problems:
                raise SystemExit("\n".join(problems))
            rows.append(row(version, result))
    head = "| kernel | for | dtype | configuration | registers | local | shared | matrix instruction |"
    mark = f"<!-- {stem}.py {digest(stem)} -->"
    lines = [f"## {stem}", mark, "", f"With Triton {triton.__version__}:", "", head, "|---" * 8 + "|", *rows]
    return "\n".join(lines) + "\n"


def row(version: Version, result: Compiled) -> str:
    name = version.name.strip("_").removesuffix("_kernel")
    matrix = ", ".join(result.matrix) or "-"
    cells = [name, version.architecture, version.dtype, version.described()]
    return f"| {' | '.join([*cells, str(result.registers), str(result.spilled), str(result.shared), matrix])} |"


def outdated(text: str) -> list[str]:
    """The kernel files whose sections in the document are missing, or made from another source."""
    kept = sections(text)
    return [stem for stem in modules() if stem not in kept or kept[stem][0] != digest(stem)]


def main() -> None:
    file = Path(__file__).resolve().parents[2] / "docs" / "triton-kernels.md"
    text = file.read_text() if file.exists() else ""
    made = {stem: part for stem, (_, part) in sections(text).items()}
    for stem in list(modules()) if "--all" in sys.argv else outdated(text):
        made[stem] = section(stem, modules()[stem])
        # After each, so that what took its time is kept when it is interrupted.
        file.write_text("\n".join([HEAD, *(made[name] for name in modules() if name in made)]))
        print(f"{stem}: done", flush=True)


if __name__ == "__main__":
    main()
