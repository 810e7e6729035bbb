"""All that a rare run on a machine with a GPU has to bring home, in stages of at most nine minutes each.

    make gpu STAGE=test OUT=folder      or test, sanitize, tune, bench-ops, bench-bert, all
    make gpu DRY=1                      shows the plan, anywhere

Standard library alone. The interpreter that runs this file has torch with CUDA; the checkout is used as it lies, with
`_cuda` built in place. Every command has its log and its line in the table at the end; what the machine refuses, such
as compute-sanitizer, is a line too. Logs, records and pages are in one archive beside the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGE_SECONDS = 9 * 60
REFUSED = (
    "Device not supported",
    "not supported on this",
    "ERR_NVGPUCTRPERM",
)  # by the machine, no fault of ours


@dataclass(frozen=True)
class Step:
    """A command, for at most so many seconds."""

    name: str
    words: tuple[str, ...]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None  # a program on PATH
    after_failure_of: str = ""  # runs only if that step failed


def plan(stage: str, out: Path, device: str = "cuda") -> list[Step]:
    """The steps of a stage, that which builds first; `device` is another one in tests alone."""
    python = sys.executable
    build = Step(
        "build",
        (python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."),
        150,
        {"PYTORCH_EXT_CUDA": "1" if device == "cuda" else "0", "PIP_BREAK_SYSTEM_PACKAGES": "1"},
    )
    # Without `_cuda` there is still what Triton and the removal of padding do.
    rest = dataclasses.replace(
        build,
        name="build, no _cuda",
        environment={**build.environment, "PYTORCH_EXT_CUDA": "0"},
        after_failure_of="build",
    )
    test = (python, "-m", "pytest", "-q", "-m", "gpu and not interpreter")
    bench = (python, "-m", "pytorch_ext", "bench", "--device", device)
    stages = {
        "test": [Step("tests", (*test, "--maxfail=50"), 380)],
        "sanitize": [
            Step(
                f"sanitize {tool}",
                (
                    "compute-sanitizer",
                    f"--tool={tool}",
                    "--error-exitcode=9",
                    *test,
                    "-k",
                    "layer_norm or gelu",
                    "--maxfail=1",
                ),
                180,
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                needs="compute-sanitizer",
            )
            for tool in ("memcheck", "racecheck")
        ],
        "tune": [Step("tune", (python, "-m", "pytorch_ext", "tune"), 380)],
        "bench-ops": [
            Step(
                f"ops {dtype}",
                (
                    *bench,
                    "--suite",
                    "ops",
                    "--seconds",
                    "160",
                    "--dtype",
                    dtype,
                    "--out",
                    str(out / f"ops-{dtype}"),
                ),
                190,
            )
            for dtype in ("bf16", "fp32")
        ],
        "bench-bert": [
            Step(
                f"{suite} bf16",
                (
                    *bench,
                    "--suite",
                    suite,
                    "--seconds",
                    str(seconds - 40),
                    "--dtype",
                    "bf16",
                    "--out",
                    str(out / suite),
                ),
                seconds,
            )
            for suite, seconds in (("bert", 250), ("train", 130))
        ],
    }
    names = list(stages) if stage == "all" else [stage]
    return [build, rest, *(step for name in names for step in stages[name])]


def run(step: Step, logs: Path) -> tuple[str, float]:
    """What became of a step, and its seconds."""
    if step.needs and shutil.which(step.needs) is None:
        return f"left out: {step.needs} is not on PATH", 0.0
    log, start = logs / f"{step.name.replace(' ', '-').replace(',', '')}.log", time.monotonic()
    with log.open("wb") as file:
        try:
            environment = {**os.environ, **step.environment}
            done = subprocess.run(
                step.words,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=step.seconds,
            )
            status = "ok" if done.returncode == 0 else f"FAILED with status {done.returncode}"
        except subprocess.TimeoutExpired:
            status = f"STOPPED after {step.seconds} s"
        except OSError as error:
            status = f"FAILED: {error}"
    text = log.read_text(errors="replace")
    if status != "ok" and any(sentence in text for sentence in REFUSED):
        status = "refused by this machine"
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return f"{status}; {last.strip()[:100]}", time.monotonic() - start


def failed(name: str, rows: list[tuple[str, str, float]]) -> bool:
    return any(row == name and status.startswith(("FAILED", "STOPPED")) for row, status, _ in rows)


def main(argv: list[str] | None = None) -> int:
    """Run or show a stage; 1 when a step failed."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("test", "sanitize", "tune", "bench-ops", "bench-bert", "all"))
    parser.add_argument("--out", type=Path, default=Path("gpu-output"))
    parser.add_argument("--dry", action="store_true", help="show the plan")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    out = options.out.resolve()
    steps = plan(options.stage, out, options.device)
    if options.dry:
        for step in steps:
            given = " ".join(f"{name}={value}" for name, value in step.environment.items())
            print(
                f"{step.name} (at most {step.seconds} s): {given} {' '.join(step.words)}".replace("  ", " ")
            )
        return 0
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, str, float]] = []
    for step in steps:
        if step.after_failure_of and not failed(step.after_failure_of, rows):
            continue
        print(f"... {step.name}", file=sys.stderr, flush=True)
        rows.append((step.name, *run(step, logs)))
    table = "\n".join(f"{name:20} {seconds:6.0f} s  {status}" for name, status, seconds in rows)
    (out / f"{options.stage}.txt").write_text(table + "\n")
    with tarfile.open(out / f"{options.stage}.tar.gz", "w:gz") as archive:
        for file in sorted(out.rglob("*")):
            if file.is_file() and file.suffix != ".gz":
                archive.add(file, file.relative_to(out))
    print(table)
    return 1 if any(failed(name, rows) for name, _, _ in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
