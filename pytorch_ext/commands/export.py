"""``pytorch-ext export``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import BAD_INPUT


def export(
    model: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The checkpoint of a Hugging Face encoder.")
    ],
    path: Annotated[Path, typer.Argument(metavar="FILE", help="What to write: a .onnx or a .pt2.")],
    opset: Annotated[
        int, typer.Option(help="Of ONNX: Gelu is a node from 20 on, Attention from 23 on.")
    ] = 23,
    optimize: Annotated[bool, typer.Option(help="One node per attention, LayerNorm and GELU.")] = True,
    dynamic: Annotated[bool, typer.Option(help="Any batch size and length.")] = True,
) -> None:
    """Write an encoder in standard ops for others to run, after comparing its outputs with PyTorch's."""
    import pytorch_ext

    from ..export import ExportError, to_onnx, to_pt2
    from ..export.checkpoint import loaded

    try:
        if path.suffix not in (".onnx", ".pt2"):
            raise ExportError(f"FILE: expected a name that ends in .onnx or .pt2, got {path.name}")
        encoder, example = loaded(model)
        if optimize:
            pytorch_ext.optimize(encoder)
        if path.suffix == ".pt2":
            made = to_pt2(encoder, (), path, kwargs=example, dynamic=dynamic)
        else:
            made = to_onnx(encoder, (), path, kwargs=example, opset=opset, dynamic=dynamic)
        typer.echo(str(made))
    except (ExportError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(BAD_INPUT)
