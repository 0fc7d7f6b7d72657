"""The command ``fusion report``: one self-contained HTML page about what a folder holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fusion_plugins.errors import ConfigError, DataError

__all__ = ["KINDS", "report"]


def _merge(folder: Path) -> str:
    from fusion_plugins.report.merge import render_merge_report

    return render_merge_report(folder)


#: File that tells what a folder holds -> (what that is, function that makes its page).
KINDS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "fusion_merge.json": ("a merged model", _merge),
}


def report(
    folder: Annotated[Path, typer.Argument(help="Folder to report on, such as a merged model.")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; fusion_report.html in the folder.")] = None,
) -> None:
    """Write one self-contained HTML page about what a folder holds."""
    target = out or folder / "fusion_report.html"
    target.write_text(render(folder), encoding="utf-8")
    typer.echo(str(target))


def render(folder: Path) -> str:
    """Return the page for a folder.

    Raises:
        ConfigError: a package that the page needs is not installed.
        DataError: nothing in the folder is known.
    """
    for name, (_, page) in KINDS.items():
        if (folder / name).exists():
            try:
                return page(folder)
            except ModuleNotFoundError as error:
                raise ConfigError(
                    f"fusion report needs {error.name}, which is not installed: pip install 'fusion-plugins[report]'"
                ) from error
    known = ", ".join(f"{name} ({what})" for name, (what, _) in KINDS.items())
    raise DataError(f"{folder}: nothing to report on; expected one of: {known}")
