"""What is here: versions, processor, GPUs, what is built, and which backend can run which op, or why it cannot.

For a bug report, and for the question why a model did not become faster::

    from pytorch_ext.info import report

    print(report())
"""

import contextlib
import dataclasses
import importlib.util
import os
import platform
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from . import backends
from ._version import __version__
from .backends._choice import ENVIRONMENT
from .backends._registry import ops
from .backends.cpu import CAP
from .backends.cpu import isa as isa_of_kernels
from .backends.cuda import architectures

PACKAGES = (
    *("triton", "transformers", "tokenizers", "safetensors", "accelerate", "peft"),
    *("onnx", "onnxruntime", "onnxscript", "netron", "numpy"),
)
LIBRARIES = ("_cpu", "_cuda")
# What the kernels make use of, in the names that torch.cpu.get_capabilities() has for it.
INSTRUCTION_SETS = ("avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_fp16")


@dataclass(frozen=True)
class Info:
    """The report: ``str()`` of it is for people, ``as_dict()`` for machines."""

    version: str
    commit: str | None
    location: str
    python: str
    torch: dict[str, str | None]
    packages: dict[str, str | None]
    system: dict[str, str | int | list[str] | None]
    gpus: list[dict[str, str | float]]
    libraries: dict[str, str | None]
    cuda_kernels_for: str | None
    asked_for: dict[str, str | None]
    # op -> backend -> the device types on which it can run; and op -> device type -> what auto takes there
    can_run: dict[str, dict[str, list[str]]]
    auto: dict[str, dict[str, str]]
    why_not: dict[str, list[str]]

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return "\n".join([*self._heading(), "", *self._machine(), "", *self._table(), "", *self._reasons()])

    def _heading(self) -> list[str]:
        commit = f", commit {self.commit}" if self.commit else ""
        cuda = f"CUDA {self.torch['cuda']}" if self.torch["cuda"] else "CPU build"
        there = [f"{name} {version}" for name, version in self.packages.items() if version]
        missing = [name for name, version in self.packages.items() if not version]
        return [
            f"pytorch-ext {self.version}{commit}",
            *_entry("installed in", self.location),
            *_entry("python", self.python),
            *_entry("torch", f"{self.torch['version']}, {cuda}"),
            *_entry("packages", ", ".join(there) or "none of those that are optional"),
            *_entry("not installed", ", ".join(missing) or "nothing that is optional"),
        ]

    def _machine(self) -> list[str]:
        system = self.system
        cores = f", {system['cores']} cores" if system["cores"] else ""
        gpus = [f"{g['name']}, {g['capability']}, {g['memory_gib']} GiB" for g in self.gpus]
        built = [f"{name}: {path or 'not built'}" for name, path in self.libraries.items()]
        asked = self.asked_for
        cap = _setting(CAP, system["kernels_cap"])
        unknown = "" if asked["name"] in ("auto", *backends.names()) else ", which is no backend: ops raise"
        return [
            *_entry("os", str(system["os"])),
            *_entry("processor", f"{system['processor']}{cores}"),
            *_entry(
                "instruction sets", ", ".join(system["instruction_sets"]) or "none that the kernels look for"
            ),
            *_entry("cpu kernels use", f"{system['kernels_use'] or 'none'} ({cap})"),
            *_entry("torch uses", f"{system['torch_uses']}, {system['threads']} threads"),
            *_entry("GPUs", *(gpus or ["none that PyTorch can use"])),
            *_entry("compiled", *built),
            *_entry("cuda kernels for", self.cuda_kernels_for or "none"),
            *_entry("backend", f"{asked['name']}{unknown} ({_setting(ENVIRONMENT, asked['environment'])})"),
        ]

    def _table(self) -> list[str]:
        names = list(self.why_not)
        rows = [["what can run here", *names, "auto takes"]]
        for op, cells in self.can_run.items():
            rows.append([op, *("+".join(cells[name]) or "-" for name in names), _in_words(self.auto[op])])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]

    def _reasons(self) -> list[str]:
        lines = [line for name, reasons in self.why_not.items() for line in _entry(name, *reasons) if reasons]
        return ["why not", *(lines or ["  every backend can run everything"])]


def report() -> Info:
    """Looks at this process and this machine. Nothing that is missing is an error; nothing optional is imported."""
    examples = _examples()
    can_run = {op: {name: _devices_of(name, op, examples) for name in backends.names()} for op in ops()}
    return Info(
        version=__version__,
        commit=_commit(),
        location=str(Path(__file__).parent),
        python=f"{platform.python_version()}, {sys.executable}",
        torch={"version": str(torch.__version__), "cuda": torch.version.cuda},
        packages={name: _version(name) for name in PACKAGES},
        system=_system(),
        gpus=_gpus(),
        libraries={name: _library(name) for name in LIBRARIES},
        cuda_kernels_for=architectures(),
        asked_for={"name": backends.requested(), "environment": os.environ.get(ENVIRONMENT)},
        can_run=can_run,
        auto={op: {device: _auto(op, t) for device, t in examples.items()} for op in ops()},
        why_not={name: _why_not(name, can_run) for name in backends.names()},
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of a checkout, if there is a git to ask; a wheel has none."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _system() -> dict:
    found = _capabilities()
    return {
        "os": platform.platform(),
        "processor": found.get("cpu_name") or platform.processor() or platform.machine(),
        "cores": found.get("num_physical_cores"),
        "instruction_sets": [name for name in INSTRUCTION_SETS if found.get(name)],
        "kernels_use": isa_of_kernels(),
        "kernels_cap": os.environ.get(CAP),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _capabilities() -> dict:
    try:
        return dict(torch.cpu.get_capabilities())
    except (AttributeError, RuntimeError):  # an older PyTorch, or a processor that it does not know
        return {}


def _gpus() -> list[dict]:
    try:
        if not torch.cuda.is_available():
            return []
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except (AssertionError, RuntimeError):  # a driver that is too old, or none
        return []
    return [
        {
            "name": gpu.name,
            "capability": f"sm_{gpu.major}{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
        }
        for gpu in found
    ]


def _library(name: str) -> str | None:
    spec = importlib.util.find_spec(f"{__package__}.{name}")
    return spec.origin if spec else None


def _asked(name: str, op: str, *tensors: torch.Tensor) -> list[str]:
    try:
        return backends.why_not(name, op, *tensors)
    except Exception as error:  # a report on what is broken must not break itself
        return [f"asking it failed with {type(error).__name__}: {error}"]


def _examples() -> dict[str, torch.Tensor]:
    """A tensor on each type of device that works here."""
    found = {"cpu": torch.empty(0)}
    if _gpus():
        with contextlib.suppress(AssertionError, RuntimeError):  # seen by the driver, and of no use
            found["cuda"] = torch.empty(0, device="cuda")
    return found


def _devices_of(name: str, op: str, examples: dict[str, torch.Tensor]) -> list[str]:
    return [device for device, example in examples.items() if not _asked(name, op, example)]


def _auto(op: str, example: torch.Tensor) -> str:
    with backends.use("auto"):
        try:
            return backends.choose(op, example)
        except Exception as error:  # as above
            return type(error).__name__


def _why_not(name: str, can_run: dict[str, dict[str, list[str]]]) -> list[str]:
    """Each reason once; one that concerns some ops alone names them."""
    ops_of: dict[str, list[str]] = {}
    for op, devices in can_run.items():
        if not devices[name]:
            for reason in _asked(name, op):
                ops_of.setdefault(reason.replace(f" {op} ", " it "), []).append(op)
    everywhere = len(can_run)
    return [r if len(of) == everywhere else f"{r}: {', '.join(of)}" for r, of in ops_of.items()]


def _in_words(of_device: dict[str, str]) -> str:
    if len(set(of_device.values())) == 1:
        return next(iter(of_device.values()))
    return ", ".join(f"{name} on {device}" for device, name in of_device.items())


def _setting(name: str, value: str | None) -> str:
    return f"{name}={value}" if value else f"{name} is not set"


def _entry(label: str, *texts: str, indent: int = 20, width: int = 98) -> list[str]:
    lines = [line for text in texts for line in textwrap.wrap(text, width - indent, break_long_words=False)]
    return [f"{'  ' + label if i == 0 else '':{indent}}{line}" for i, line in enumerate(lines)]
