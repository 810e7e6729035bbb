"""``pytorch-ext view``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import BAD_INPUT


def view(
    model: Annotated[
        str,
        typer.Argument(
            help='An .onnx file, the folder of a Hugging Face encoder, or "bert": a small one made here.'
        ),
    ],
    compare: Annotated[bool, typer.Option(help="Before and after optimize, beside each other.")] = False,
    optimize: Annotated[bool, typer.Option(help="Show a checkpoint optimised.")] = True,
    browser: Annotated[bool, typer.Option(help="Open it in the browser.")] = True,
    port: Annotated[int, typer.Option(help="Of the page [default: any that is free].")] = 0,
) -> None:
    """Show a model's graph in Netron, on this machine alone, until Ctrl-C."""
    import pytorch_ext

    from ..export import ExportError
    from ..export import view as show
    from ..export.checkpoint import loaded, small_bert

    try:
        if model.endswith(".onnx"):
            shown = show(model, compare=compare, port=port, browse=browser)
        else:
            encoder, example = small_bert() if model == "bert" else loaded(Path(model))
            if optimize and not compare:
                pytorch_ext.optimize(encoder)
            shown = show(encoder, kwargs=example, compare=compare, port=port, browse=browser)
    except (ExportError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(BAD_INPUT)
    for nodes in shown.nodes:
        typer.echo(f"{nodes.total()} nodes: " + ", ".join(f"{n} {kind}" for kind, n in nodes.most_common()))
    typer.echo(f"serving at {shown.url} (Ctrl-C ends it)")
    shown.wait()
