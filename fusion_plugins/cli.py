"""The command line ``fusion``: one command per step of the data flow.

The command functions live beside the code that they run (``sources/commands.py``, ...) and import heavy packages only
when they are called. :func:`main` ends every mistake with one message and status 1.
"""

import errno
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from rich.table import Table

import fusion_plugins
from fusion_plugins.chain.commands import rounds, run
from fusion_plugins.doctor.commands import doctor
from fusion_plugins.errors import FusionError
from fusion_plugins.init.commands import init
from fusion_plugins.install import missing_package
from fusion_plugins.keys import keys
from fusion_plugins.mergekit.commands import merge_check
from fusion_plugins.recipes import recipes
from fusion_plugins.report import report
from fusion_plugins.scoring.commands import clean, score
from fusion_plugins.sources.commands import capture, cut, sample
from fusion_plugins.store.commands import compact, export, import_, info, merge, pull, push, verify
from fusion_plugins.terminal import console, say

#: set it to see where an unexpected error comes from
TRACEBACK_VARIABLE = "FUSION_TRACEBACK"

# Typer raises what click has, or, since it needs click no longer, what its own copy of click has.
_exceptions: Any = sys.modules[typer.BadParameter.__module__]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="LLM fusion inside axolotl and mergekit.",
)
store_app = typer.Typer(
    no_args_is_help=True, help="Inspect, verify, merge, compact, push, pull, import and export stores."
)


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
    """List everything that is registered: fusion rules, aligners, losses, scorers and pair rules.

    For example: `fusion plugins`.
    """
    from fusion_plugins.plugins import KINDS, get_registry

    table = Table("kind", "name", "from")
    for kind in KINDS:
        try:
            for name, obj in sorted(get_registry(kind).items()):
                table.add_row(kind, name, getattr(obj, "__module__", type(obj).__module__))
        except ModuleNotFoundError as error:
            table.add_row(kind, "-", missing_package(error, "the list") or str(error))
    console().print(table)


for _command in (init, clean, cut, capture, sample, score, doctor, report, merge_check, rounds, run, recipes, keys):
    app.command()(_command)
for _store_command in (info, verify, merge, compact, push, pull, export):
    store_app.command()(_store_command)
store_app.command("import")(import_)
app.add_typer(store_app, name="store")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process.

    The status is 0 if everything was done, 130 after Ctrl-C, and 1 with one message on stderr for everything else: a
    wrong setting, flag or file as well as a fault of ours.
    """
    sys.exit(_status(arguments))


def _status(arguments: list[str] | None) -> int:
    try:
        return app(arguments, standalone_mode=False) or 0
    except _exceptions.NoArgsIsHelpError as error:
        typer.echo(error.format_message(), err=True)
    except _exceptions.UsageError as error:
        command = error.ctx.command_path if error.ctx else "fusion"
        say(f"UsageError: {error.format_message()} `{command} --help` lists what it takes.", stderr=True)
    except _exceptions.ClickException as error:
        say(f"UsageError: {error.format_message()}", stderr=True)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except FusionError as error:
        say(f"{type(error).__name__}: {error}", stderr=True)
    except OSError as error:
        if error.errno == errno.EPIPE:
            # The reader of the output has gone, as in `fusion plugins | head -1`.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            _report_file_error(error)
    # Everything that is left is a fault of ours, or a package that is missing.
    except Exception as error:
        _report_fault(error)
    return 1


def _report_file_error(error: OSError) -> None:
    if error.filename is None and error.strerror is None:
        return _report_fault(error)
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = f" {' and '.join(names)}" if names else ""
    say(
        f"{type(error).__name__}:{where}: {error.strerror}. Check that the path is right, that you may use it, and "
        "that the disk has room; then run the command again.",
        stderr=True,
    )
    _show_traceback()


def _report_fault(error: Exception) -> None:
    if isinstance(error, ModuleNotFoundError) and (message := missing_package(error, "this command")):
        say(f"ConfigError: {message}", stderr=True)
        return
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if os.sep + "fusion_plugins" + os.sep in frame.filename]
    where = f" ({os.path.relpath(ours[-1].filename, _PACKAGE)}, line {ours[-1].lineno})" if ours else ""
    text = " ".join(str(error).split())
    say(
        f"UnexpectedError: {type(error).__name__}: {text[:500]}{where}. fusion_plugins {fusion_plugins.__version__} "
        f"has no better explanation, so it may be a fault of its own. Run it again with {TRACEBACK_VARIABLE}=1 and "
        "report what it prints.",
        stderr=True,
    )
    _show_traceback()


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(fusion_plugins.__file__)))


def _show_traceback() -> None:
    if os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0"):
        say(traceback.format_exc(), stderr=True)
