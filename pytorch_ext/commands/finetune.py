"""``pytorch-ext finetune``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..finetune.options import FinetuneError, Options
from . import BAD_INPUT, INTERRUPTED


def finetune(
    data: Annotated[Path, typer.Argument(help="A .csv, .tsv or .jsonl file with a text and a label column.")],
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A Hugging Face encoder [default: the packaged MiniLM]."),
    ] = None,
    text: Annotated[str, typer.Option(help="The column with the texts.")] = "text",
    label: Annotated[str, typer.Option(help="The column with the classes.")] = "label",
    validation: Annotated[
        Path | None, typer.Option(help="Rows that say when to stop [default: a tenth of DATA].")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Rows for the report [default: a tenth of DATA].")] = None,
    tune: Annotated[str, typer.Option(help="What learns: full, last:N, lora or auto.")] = "full",
    epochs: Annotated[float, typer.Option(help="Times that every text is seen.")] = 3.0,
    max_steps: Annotated[int | None, typer.Option(help="Steps, in place of epochs.")] = None,
    tokens_per_batch: Annotated[int, typer.Option(help="Real tokens in a batch, about.")] = 4096,
    max_length: Annotated[int, typer.Option(help="Longer texts are cut, in tokens.")] = 256,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its highest [default: 5e-5; 1e-4 last and auto, 5e-4 lora].")
    ] = None,
    accumulate: Annotated[int, typer.Option(help="Batches whose gradients make one step.")] = 1,
    eval_steps: Annotated[
        int | None, typer.Option(help="Steps between evaluations, and checkpoints [default: a tenth].")
    ] = None,
    patience: Annotated[int, typer.Option(help="Evaluations without gain before it stops.")] = 3,
    precision: Annotated[
        str, typer.Option(help="auto (bf16 where the hardware has it), fp32, bf16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dropout: Annotated[float | None, typer.Option(help="In place of the model's own.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads [default: PyTorch's].")] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the order and the head.")] = 0,
    optimize: Annotated[bool, typer.Option(help="Kernels and removal of padding.")] = True,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where everything goes.")] = Path(
        "finetune-output"
    ),
) -> None:
    """Train a text classifier on DATA, and report on texts that it never saw.

    A run that was stopped or killed goes on where it was when the same command is given again.
    """
    from ..finetune import run

    try:
        options = Options(
            data=data,
            model=model,
            text=text,
            label=label,
            validation=validation,
            test=test,
            tune=tune,
            epochs=epochs,
            max_steps=max_steps,
            tokens_per_batch=tokens_per_batch,
            max_length=max_length,
            learning_rate=learning_rate,
            accumulate=accumulate,
            eval_steps=eval_steps,
            patience=patience,
            precision=precision,
            device=device,
            dropout=dropout,
            threads=threads,
            seed=seed,
            optimize=optimize,
            out=out,
        )
        run(options, typer.echo)
        code = 0
    except FinetuneError as error:
        typer.echo(f"error: {error}", err=True)
        code = BAD_INPUT
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from the last checkpoint", err=True)
        code = INTERRUPTED
    sys.exit(code)
