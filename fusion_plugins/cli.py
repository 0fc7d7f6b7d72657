"""The command line ``fusion``: one command per step of the way of the data.

The functions live beside what they drive (``sources/commands.py``, ...) and import what is heavy only when they run.
Every error that a user can cause ends the process with status 1 and one message.
"""

import sys
from importlib import import_module
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fusion_plugins
from fusion_plugins.errors import FusionError

__all__ = ["app", "main"]

#: command -> module that defines a function of that name (dashes become underscores)
COMMANDS = {
    "cut": "fusion_plugins.sources.commands",
    "capture": "fusion_plugins.sources.commands",
    "sample": "fusion_plugins.sources.commands",
    "score": "fusion_plugins.scoring.commands",
    "doctor": "fusion_plugins.doctor.commands",
    "report": "fusion_plugins.mergekit.commands",
    "merge-check": "fusion_plugins.mergekit.commands",
}
STORE_COMMANDS = ("info", "verify", "merge", "compact", "export")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="LLM fusion inside axolotl and mergekit.")
store_app = typer.Typer(no_args_is_help=True, help="Look after stores of log-probabilities and responses.")


def _version(value: bool) -> None:
    if value:
        typer.echo(fusion_plugins.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """LLM fusion inside axolotl and mergekit."""


@app.command()
def plugins() -> None:
    """List everything that is registered: fusion rules, aligners, losses, scorers and pair rules."""
    from fusion_plugins.plugins import KINDS, get_registry

    table = Table("kind", "name", "from")
    for kind in KINDS:
        for name, obj in sorted(get_registry(kind).items()):
            table.add_row(kind, name, getattr(obj, "__module__", type(obj).__module__))
    Console().print(table)


for _name, _module in COMMANDS.items():
    app.command(_name)(getattr(import_module(_module), _name.replace("-", "_")))
for _name in STORE_COMMANDS:
    store_app.command(_name)(getattr(import_module("fusion_plugins.store.commands"), _name))
app.add_typer(store_app, name="store")


def main() -> None:
    """Run the command line; turn a :class:`FusionError` into one message and status 1."""
    try:
        app()
    except FusionError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
