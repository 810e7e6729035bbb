"""What ``pytorch-ext tune`` is asked for, and what it shows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import tune
from ..backends import triton as backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Request:
    ops: list[str] = field(default_factory=list)
    hidden: int = 768
    intermediate: int = 3072
    heads: int = 12
    batch_sizes: list[int] = field(default_factory=lambda: [16])
    seqlens: list[int] = field(default_factory=lambda: [256])
    dtypes: list[str] = field(default_factory=lambda: ["bf16"])
    dropout_p: float = 0.0

    def sizes(self) -> list[Any]:
        """Every combination, as the kernel files take them."""
        self._check()
        make = backend.module("sizes").Sizes
        return [
            make(
                batch=batch,
                seqlen=seqlen,
                hidden=self.hidden,
                heads=self.heads,
                intermediate=self.intermediate,
                dtype=DTYPES[dtype],
                dropout_p=self.dropout_p,
            )
            for dtype, batch, seqlen in itertools.product(self.dtypes, self.batch_sizes, self.seqlens)
        ]

    def _check(self) -> None:
        for name, values in (
            ("hidden", [self.hidden]),
            ("intermediate", [self.intermediate]),
            ("heads", [self.heads]),
            ("batch-size", self.batch_sizes),
            ("seqlen", self.seqlens),
        ):
            if min(values) < 1:
                raise tune.TuneError(f"{name}: expected at least 1, got {min(values)}")
        if self.hidden % self.heads:
            raise tune.TuneError(f"heads: expected a divisor of hidden, {self.hidden}, got {self.heads}")
        unknown = [name for name in self.dtypes if name not in DTYPES]
        if unknown:
            raise tune.TuneError(f"dtype: expected some of {', '.join(DTYPES)}, got {', '.join(unknown)}")
        if not 0.0 <= self.dropout_p < 1.0:
            raise tune.TuneError(f"dropout: expected a number from 0 to below 1, got {self.dropout_p}")


def measure(request: Request, console: Console | None = None) -> list[tune.Result]:
    """Tunes on the current GPU. What was measured is kept even if it is interrupted."""
    tune.check()
    return measure_with(
        request,
        tune.device_timer,
        tune.filled("cuda"),
        torch.cuda.get_device_name(),
        console or Console(),
    )


def measure_with(
    request: Request, timer: tune.Timer, empty: Any, device_name: str, console: Console
) -> list[tune.Result]:
    found = tune.jobs(tune.stems(request.ops), request.sizes(), empty)
    results: list[tune.Result] = []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(f"measuring on {device_name}", total=len(found))
            for result in tune.run(found, timer):
                results.append(result)
                progress.update(task, advance=1, description=result.job.name)
    finally:
        file = tune.save(results, device_name)
        if results:
            console.print(table(results))
        console.print(f"written to {file}" if file else "the tables' configurations stay: nothing is faster")
    return results


def table(results: list[tune.Result]) -> Table:
    made = Table("kernel", "table, ms", "best, ms", "configuration", "tried", "left out", "first call, s")
    for result in results:
        constants = result.constants
        made.add_row(
            result.job.name,
            f"{1e3 * result.before:.4f}",
            f"{1e3 * result.best:.4f}",
            " ".join(f"{k}={v}" for k, v in constants.items()) if constants else "the table's",
            str(result.tried),
            str(result.refused + result.wrong),
            f"{result.first_call:.2f}",
        )
    return made
