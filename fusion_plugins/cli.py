"""The command line ``fusion``: one command per step of the data flow.

The command functions live beside the code that they run (``sources/commands.py``, ...) and import heavy packages only
when they are called. Every error that a user can cause ends the process with status 1 and one message.
"""

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fusion_plugins
from fusion_plugins.doctor.commands import doctor
from fusion_plugins.errors import FusionError
from fusion_plugins.mergekit.commands import merge_check, report
from fusion_plugins.scoring.commands import score
from fusion_plugins.sources.commands import capture, cut, sample
from fusion_plugins.store.commands import compact, export, info, merge, verify

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="LLM fusion inside axolotl and mergekit.")
store_app = typer.Typer(no_args_is_help=True, help="Inspect, verify, merge, compact and export stores.")


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


for _command in (cut, capture, sample, score, doctor, report, merge_check):
    app.command()(_command)
for _store_command in (info, verify, merge, compact, export):
    store_app.command()(_store_command)
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
