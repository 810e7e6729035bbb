"""``pytorch-ext bench``, and ``pytorch-ext bench compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from . import BAD_INPUT, INTERRUPTED

if TYPE_CHECKING:
    from ..benchmarks.runs import Run

bench = typer.Typer(invoke_without_command=True, help="Time ops and whole models, each compared first.")


@bench.callback()
def run(
    context: typer.Context,
    suite: Annotated[
        str, typer.Option(help="quick, ops, bert, train, overhead, first-call, memory or full.")
    ] = "quick",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    filter: Annotated[str, typer.Option(metavar="TEXT", help="Only parts whose label contains it.")] = "",
    seconds: Annotated[
        float | None, typer.Option(help="Leave out the parts that would not fit into this time.")
    ] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Shapes of no interest: does everything run?")] = False,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the files go.")] = Path("bench-output"),
) -> None:
    """Time ops and whole models against eager PyTorch, torch.compile and other engines.

    Everything is compared before it is timed: what disagrees gets a red line and no time, and the status is 1. The
    record (JSON of pytest-benchmark), the page and its pictures go into --out.
    """
    if context.invoked_subcommand is not None:
        return
    from ..benchmarks import suites

    options = suites.Options(suite, device, dtype, filter, seconds, tiny)
    if sentence := suites.wrong(options):
        _refuse(sentence)
    try:
        sys.exit(suites.command(options, out))
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(INTERRUPTED)


@bench.command()
def compare(
    old: Annotated[list[Path], typer.Argument(help="OLD NEW: two records, or two folders of repeated runs.")],
) -> None:
    """Say what became slower from OLD to NEW beyond its noise; the status is 1 if anything did.

    The noise is the spread of repeated runs where a folder holds several, else of the rounds of the one run.
    """
    from ..benchmarks import runs, suite_table

    if len(old) != 2:
        _refuse(f"compare takes two records or folders, OLD and NEW, not {len(old)}")
    sides = [_load(path) for path in old]
    _of_one_machine([run for side in sides for run in side])
    found = runs.changes(*sides)
    if not found:
        _refuse("the two sides have no series in common")
    typer.echo(suite_table.of_changes(found))
    sys.exit(1 if any(one.verdict == "slower" for one in found) else 0)


@bench.command()
def page(
    folder: Annotated[Path, typer.Argument(help="A record, or a folder of records of one machine.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the page goes.")] = Path("bench-output"),
) -> None:
    """Make the page and its pictures out of records."""
    from ..benchmarks import page, runs

    found = _load(folder)
    _of_one_machine(found)
    typer.echo(f"page: {page.write(runs.together(found), out)}")


def _load(path: Path) -> list[Run]:
    """A record or a folder of them; records of families have tables of their own."""
    from ..benchmarks import runs

    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    files = [file for file in files if not file.name.startswith("bench_families")]
    if not files:
        _refuse(f"{path} holds no record")
    try:
        return [runs.load(file) for file in files]
    except runs.RecordError as error:
        _refuse(str(error))


def _of_one_machine(found: list[Run]) -> None:
    machines = {f"{run.environment['device']}, {run.environment['threads']} threads" for run in found}
    if len(machines) > 1:
        _refuse(f"the records are of different machines: {'; '.join(sorted(machines))}")


def _refuse(sentence: str) -> NoReturn:
    typer.echo(f"error: {sentence}", err=True)
    sys.exit(BAD_INPUT)
