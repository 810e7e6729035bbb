"""All that a rare run on a machine with a GPU has to bring home, in stages of at most nine minutes each.

    make gpu STAGE=test OUT=folder      or test, sanitize, tune, bench-ops, bench-bert, all
    make gpu DRY=1                      shows the plan, anywhere
    make gpu STAGE=all DEVICE=cpu       runs each stage's commands without a GPU, on shapes of no interest

Standard library alone. The interpreter that runs this file has torch with CUDA; the checkout is used as it lies, with
`_cuda` built in place. What this interpreter lacks is done without. Every command has its line in the table at the
end; what the machine refuses, such as compute-sanitizer, is a line too. After each command the table and one archive of
logs, records and pages are brought up to date: whoever is stopped has all that was done until then.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("test", "sanitize", "tune", "bench-ops", "bench-bert")
STAGE_SECONDS = 9 * 60
LEAST_SECONDS = 10  # a command with less time than this is left out
SHOWN = 25  # lines of each log, before the table
REFUSED = (
    "Device not supported",
    "not supported on this",
    "ERR_NVGPUCTRPERM",
)  # by the machine, no fault of ours
PACKAGES = (
    *("torch", "triton", "transformers", "pytest", "hypothesis", "pytest-xdist", "pytest-benchmark", "typer"),
    *("rich", "matplotlib", "ninja", "setuptools", "wheel"),
)


@dataclass(frozen=True)
class Step:
    """A command, for at most so many seconds."""

    name: str
    words: tuple[str, ...]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # programs on PATH, and modules of this interpreter
    after_failure_of: str = ""  # runs only if that step failed
    needs_gpu: bool = False

    def lacks(self) -> str:
        """What is not here of what it needs, in one sentence; empty if nothing."""
        for name in self.needs:
            if shutil.which(name) is None and importlib.util.find_spec(name.replace("-", "_")) is None:
                return f"{name} is neither on PATH nor a module here"
        return ""


def plan(stage: str, out: Path, device: str = "cuda") -> list[Step]:
    """The steps of a stage, that which builds first; without a GPU the same commands on shapes of no interest."""
    stages = {
        "test": lambda: _test(device),
        "sanitize": lambda: _sanitize(device),
        "tune": _tune,
        "bench-ops": lambda: _bench(
            (("ops", "bf16", 270), ("overhead", "fp32", 30), ("ops", "fp32", 80)), out, device
        ),
        "bench-bert": lambda: _bench(
            (("bert", "bf16", 190), ("train", "bf16", 100), ("memory", "bf16", 90)), out, device
        ),
    }
    return [*_build(device), *stages[stage]()]


def _build(device: str) -> list[Step]:
    """With both libraries; if that fails, with less and less: Triton and the removal of padding need none."""
    if device != "cuda":  # the installation of whoever runs this stays as it is
        return [Step("plan of the build", (sys.executable, "setup.py", "-q", "plan"), 60)]
    words = (sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index")
    steps: list[Step] = []
    for name, cuda, cpu in (("build", "1", "1"), ("build, no _cpu", "1", "0"), ("build, no _cuda", "0", "0")):
        environment = {"PYTORCH_EXT_CUDA": cuda, "PYTORCH_EXT_CPU": cpu, **_architecture()}
        environment["PIP_BREAK_SYSTEM_PACKAGES"] = "1"
        after = steps[-1].name if steps else ""
        steps.append(Step(name, (*words, "-e", "."), 150, environment, after_failure_of=after))
    return steps


def _architecture() -> dict[str, str]:
    """That of the first GPU alone, as compiling for others takes as long again; nothing where it is not known."""
    try:
        words = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.split()[
            0
        ]
        return {"TORCH_CUDA_ARCH_LIST": found + ("a" if float(found) >= 9.0 else "")}
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return {}


def _pytest(device: str) -> tuple[str, ...]:
    marks = (
        ("-m", "gpu and not interpreter") if device == "cuda" else ("tests/benchmarks/test_gpu_timing.py",)
    )
    return (sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *marks)


def _test(device: str) -> list[Step]:
    # Triton compiles on the CPU, so several processes share the GPU here.
    many = ("-n", "6") if device == "cuda" and importlib.util.find_spec("xdist") else ()
    words = (*_pytest(device), *many, "--maxfail=50", "--continue-on-collection-errors")
    return [Step("tests", words, 380, needs=("pytest", "hypothesis"))]


def _sanitize(device: str) -> list[Step]:
    few = "cuda_host and (dense or varlen) or (layer_norm or gelu) and (cuda or triton)"
    chosen = ("-k", few, "--maxfail=1", "tests/cuda_host", "tests/ops")
    return [
        Step(
            f"sanitize {tool}",
            ("compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", *_pytest(device), *chosen),
            190,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            needs=("compute-sanitizer", "pytest", "hypothesis"),
            needs_gpu=True,
        )
        for tool in ("memcheck", "racecheck")
    ]


def _tune() -> list[Step]:
    words = (sys.executable, "-m", "pytorch_ext", "tune")
    return [Step("tune", words, 380, needs=("typer", "rich"), needs_gpu=True)]


def _bench(suites: tuple[tuple[str, str, int], ...], out: Path, device: str) -> list[Step]:
    """Each suite with the time in which it leaves out what would not fit, and a little more to write it down."""
    steps = []
    for suite, dtype, seconds in suites if device == "cuda" else suites[:1]:
        words = (sys.executable, "-m", "pytorch_ext.benchmarks", "--device", device, "--suite", suite)
        words += ("--dtype", dtype, "--seconds", str(seconds - 20), "--out", str(out / f"{suite}-{dtype}"))
        if device != "cuda":
            words += ("--tiny", "--filter", "bias_gelu" if suite == "ops" else "27 %")
        steps.append(Step(f"{suite} {dtype}", words, seconds))
    return steps


def run(step: Step, log: Path, seconds: float) -> str:
    """What became of a step."""
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                step.words,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            )
            status = "ok" if done.returncode == 0 else f"FAILED with status {done.returncode}"
        except subprocess.TimeoutExpired:
            status = f"STOPPED after {seconds:.0f} s"
        except OSError as error:
            status = f"FAILED: {error}"
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if status != "ok" and any(sentence in line for line in lines for sentence in REFUSED):
        status = "refused by this machine"
    print(f"--- {step.name}", *lines[-SHOWN:], sep="\n", flush=True)
    # What pytest found, behind which a library may still talk as it is unloaded; else the last line.
    counts = [line for line in lines if re.search(r"\d+ (passed|failed|error)", line)]
    return f"{status}; {(counts or lines)[-1].strip()[:300]}" if lines else status


def failed(name: str, rows: list[tuple[str, str, float]]) -> bool:
    return any(row == name and status.startswith(("FAILED", "STOPPED")) for row, status, _ in rows)


def run_stage(stage: str, work: Path, device: str, rows: list[tuple[str, str, float]]) -> Iterator[None]:
    """Adds a row for each step; the stage ends in its time, whatever its steps would like."""
    end = time.monotonic() + STAGE_SECONDS
    for step in plan(stage, work, device):
        if step.after_failure_of and not failed(step.after_failure_of, rows):
            continue
        start = time.monotonic()
        seconds = min(step.seconds, end - start)
        if step.needs_gpu and device != "cuda":
            status = f"left out: it needs a GPU, and the device is {device}"
        elif missing := step.lacks():
            status = f"left out: {missing}"
        elif seconds < LEAST_SECONDS:
            status = "left out: no time left"
        else:
            print(f"... {step.name}", file=sys.stderr, flush=True)
            log = f"{stage}-{step.name.replace(' ', '-').replace(',', '')}.log"
            status = run(step, work / "logs" / log, seconds)
        rows.append((step.name, status, time.monotonic() - start))
        yield


def here() -> str:
    """What this interpreter has, and what it lacks."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    there = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    missing = ", ".join(name for name, version in found.items() if not version)
    programs = [name for name in ("nvcc", "compute-sanitizer", "ncu", "g++") if shutil.which(name)]
    return f"python {platform.python_version()}, {there}; {', '.join(programs)}; not here: {missing or 'nothing'}"


def as_text(rows: list[tuple[str, str, float]]) -> str:
    return "\n".join(f"{name:20} {seconds:6.0f} s  {status}" for name, status, seconds in rows)


def leave(work: Path, out: Path, stage: str, table: str) -> None:
    """The table, and the archive of all that lies in `work`."""
    (out / f"{stage}.txt").write_text(table + "\n")
    (work / f"{stage}.txt").write_text(table + "\n")
    with tarfile.open(out / f"{stage}.tar.gz.part", "w:gz") as archive:
        for file in sorted(work.rglob("*")):
            if file.is_file():
                archive.add(file, file.relative_to(work))
    os.replace(out / f"{stage}.tar.gz.part", out / f"{stage}.tar.gz")


def main(argv: list[str] | None = None) -> int:
    """Run or show a stage; 1 when a step failed."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--out", type=Path, default=Path("gpu-output"))
    parser.add_argument("--dry", action="store_true", help="show the plan")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the commands")
    options = parser.parse_args(argv)
    stages = STAGES if options.stage == "all" else (options.stage,)
    if options.dry:
        for stage in stages:
            print(f"{stage}, at most {STAGE_SECONDS} s:")
            for step in plan(stage, options.out.resolve(), options.device):
                given = "".join(f"{name}={value} " for name, value in step.environment.items())
                only = f", if {step.after_failure_of} fails" if step.after_failure_of else ""
                print(f"  {step.name} (at most {step.seconds} s{only}): {given}{' '.join(step.words)}")
        return 0
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] += (
        f"{os.pathsep}/usr/local/cuda/bin"  # where nvcc and compute-sanitizer may be, unnamed
    )
    rows: list[tuple[str, str, float]] = [("here", here(), 0.0)]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "logs").mkdir()
        for stage in stages:
            for _ in run_stage(stage, work, options.device, rows):
                leave(work, out, options.stage, as_text(rows))
    print(as_text(rows))
    return 1 if any(failed(name, rows) for name, _, _ in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
