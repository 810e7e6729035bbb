"""``pytorch-ext tune``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import BAD_INPUT, INTERRUPTED


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
    from ..tune import TuneError
    from ..tune.console import Request, measure

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
        code = BAD_INPUT
    except KeyboardInterrupt:
        typer.echo("stopped; what was measured until then is kept", err=True)
        code = INTERRUPTED
    sys.exit(code)
