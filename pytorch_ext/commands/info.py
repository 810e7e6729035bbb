"""``pytorch-ext info``."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """Say which backends this machine can run, and why not the others."""
    from ..info import report

    found = report()
    typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else str(found))
