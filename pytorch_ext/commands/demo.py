"""``pytorch-ext demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..demo.options import DEFAULT_QUERY, DEFAULT_SECONDS, DTYPES, DemoError, Options
from . import BAD_INPUT, INTERRUPTED


def demo(
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A Hugging Face encoder [default: the packaged MiniLM]."),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='A text per line, or .jsonl with "text" [default: docstrings].'),
    ] = None,
    query: Annotated[str, typer.Option(help="What to look for in the texts.")] = DEFAULT_QUERY,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"auto, {', '.join(DTYPES)}.")] = "auto",
    backend: Annotated[str | None, typer.Option(help="A backend by name [default: the fastest].")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in a batch.")] = 32,
    max_length: Annotated[int, typer.Option(help="Longer texts are cut, in tokens.")] = 256,
    seconds: Annotated[float, typer.Option(help="Time for the measurements.")] = DEFAULT_SECONDS,
    threads: Annotated[int | None, typer.Option(help="CPU threads [default: PyTorch's].")] = None,
    compile: Annotated[bool, typer.Option(help="Time torch.compile too.")] = True,
    quick: Annotated[bool, typer.Option(help="A short run that only shows that it works.")] = False,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the files go.")] = Path("demo-output"),
) -> None:
    """Optimise a real encoder, check its outputs, time it on real texts, draw a picture."""
    from ..demo import run

    try:
        options = Options(
            model=model,
            texts=texts,
            query=query,
            device=device,
            dtype=dtype,
            backend=backend,
            batch_size=batch_size,
            max_length=max_length,
            seconds=seconds,
            threads=threads,
            compile=compile,
            quick=quick,
            out=out,
        )
        code = run(options)
    except DemoError as error:
        typer.echo(f"error: {error}", err=True)
        code = BAD_INPUT
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        code = INTERRUPTED
    sys.exit(code)
