"""``pytorch-ext view``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import BAD_INPUT, INTERRUPTED


def view(
    model: Annotated[
        str,
        typer.Argument(
            help="A .onnx or .pt2 file, the folder of a Hugging Face encoder, minilm (the packaged one), or a small"
            " model made here: bert, vit, transformer, cnn."
        ),
    ],
    compare: Annotated[bool, typer.Option(help="Before and after optimize, beside each other.")] = False,
    weights: Annotated[
        bool, typer.Option("--weights", help="Sizes and histograms too, and the attention of an example.")
    ] = False,
    text: Annotated[str | None, typer.Option(help="Those, with the attention of this sentence.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the page of --weights or --text, and serve nothing."),
    ] = None,
    optimize: Annotated[bool, typer.Option(help="Show a model optimised.")] = True,
    browser: Annotated[bool, typer.Option(help="Open it in the browser.")] = True,
    port: Annotated[int, typer.Option(help="Of the page [default: any that is free].")] = 0,
) -> None:
    """Show a model's graph in Netron, on this machine alone, until Ctrl-C."""
    import pytorch_ext

    from ..export import ExportError, to_html
    from ..export import view as show

    asked = {"text": text, "weights": weights or text is not None}
    try:
        if out is not None and not asked["weights"]:
            raise ExportError("--out: expected --weights or --text beside it")
        if model.endswith((".onnx", ".pt2")):
            shown = show(model, compare=compare, port=port, browse=browser, **asked)
        else:
            encoder, args, kwargs, tokenizer = _found(model, text is not None)
            if optimize and not compare:
                pytorch_ext.optimize(encoder)
            if out is not None:
                example = {"kwargs": kwargs, "text": text, "tokenizer": tokenizer}
                typer.echo(f"wrote {to_html(encoder, args, out, **example)}")
                return
            example = {"kwargs": kwargs, "tokenizer": tokenizer, **asked}
            shown = show(encoder, args, compare=compare, port=port, browse=browser, **example)
        for nodes in shown.nodes:
            kinds = ", ".join(f"{count} {kind}" for kind, count in nodes.most_common())
            typer.echo(f"{nodes.total()} nodes: {kinds}")
        if shown.weights:
            typer.echo(f"weights and attention at {shown.weights}")
        typer.echo(f"serving at {shown.url} (Ctrl-C ends it)")
        shown.wait()
    except (ExportError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(INTERRUPTED)


def _found(name: str, with_text: bool) -> tuple[Any, tuple, dict[str, Any], Any]:
    """The model, example inputs, and for a text the tokenizer."""
    from ..demo.model import find
    from ..demo.options import DemoError
    from ..export import ExportError
    from ..export.checkpoint import loaded, tokenizer
    from ..export.samples import SAMPLES, Words

    if name in SAMPLES:
        model, args, kwargs = SAMPLES[name]()
        if with_text and "input_ids" not in kwargs:
            raise ExportError(f"--text: expected a model of tokens, got {name}")
        return model, args, kwargs, Words(model.config.vocab_size) if with_text else None
    try:
        folder = find(None).folder if name == "minilm" else Path(name)
    except DemoError as error:
        raise ExportError(str(error)) from error
    if not folder.is_dir():
        names = ", ".join(["minilm", *SAMPLES])
        raise ExportError(
            f"MODEL: expected a .onnx or .pt2 file, a folder, or one of {names}; there is no folder {name}"
        )
    model, kwargs = loaded(folder)
    if with_text and "input_ids" not in kwargs:
        raise ExportError(f"--text: expected a model of tokens, got {type(model).__name__}")
    return model, (), kwargs, tokenizer(folder) if with_text else None
