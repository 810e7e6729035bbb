"""The command line. Each command imports what it needs when it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .demo.options import DEFAULT_QUERY, DEFAULT_SECONDS, DTYPES, DemoError, Options

app = typer.Typer(
    help="Transformer encoders made faster by one call.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, also in a log
)

INTERRUPTED = 130


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """Say which backends this machine can run, and why not the others."""
    from .info import report

    found = report()
    typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else str(found))


@app.command()
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
    from .demo import run

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
        code = 2
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        code = INTERRUPTED
    sys.exit(code)


@app.command()
def tune(
    op: Annotated[list[str] | None, typer.Option(help="An op to tune [default: all].")] = None,
    hidden: Annotated[int, typer.Option(help="The model's width.")] = 768,
    intermediate: Annotated[int, typer.Option(help="The width within its feed-forward blocks.")] = 3072,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 12,
    batch_size: Annotated[list[int] | None, typer.Option(help="Sequences in a batch [default: 16].")] = None,
    seqlen: Annotated[list[int] | None, typer.Option(help="Tokens of a sequence [default: 256].")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, bf16 or fp16 [default: bf16].")] = None,
    dropout: Annotated[float, typer.Option(help="The probability of dropout; 0 for inference.")] = 0.0,
) -> None:
    """Measure which configurations suit the Triton kernels on this GPU, and remember the best.

    --op, --batch-size, --seqlen and --dtype may be given several times.
    """
    from .tune import TuneError
    from .tune.console import Request, measure

    request = Request(
        ops=op or [],
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        batch_sizes=batch_size or [16],
        seqlens=seqlen or [256],
        dtypes=dtype or ["bf16"],
        dropout_p=dropout,
    )
    try:
        measure(request)
        code = 0
    except TuneError as error:
        typer.echo(f"error: {error}", err=True)
        code = 2
    except KeyboardInterrupt:
        typer.echo("stopped; what was measured until then is kept", err=True)
        code = INTERRUPTED
    sys.exit(code)
