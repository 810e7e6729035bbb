"""The command line: see ``commands``."""

import typer

from . import commands

app = typer.Typer(
    help="Transformer encoders made faster by one call.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, also in a log
)
for name, command in commands.found().items():
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name)(command)
