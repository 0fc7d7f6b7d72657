"""The commands ``fusion merge-check`` and ``fusion report``."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fusion_plugins.config import as_defaults
from fusion_plugins.errors import ConfigError, DataError

__all__ = ["KINDS", "merge_check", "report"]

Config = Annotated[
    str | None,
    typer.Option("--config", "-c", is_eager=True, callback=as_defaults, help="YAML file with the settings."),
]


def merge_check(
    config: Annotated[Path, typer.Argument(help="Merge configuration, as for mergekit-yaml or mergekit-multi.")],
    out: Annotated[Path | None, typer.Option(help="Where the merged model will be written.")] = None,
    lora_merge_cache: Annotated[str | None, typer.Option(help="As for mergekit-yaml.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="As for mergekit-yaml.")] = False,
) -> None:
    """Say what is wrong with a merge before it starts, and what it will take; status 1 if it cannot work."""
    from rich.console import Console

    try:
        from mergekit.options import MergeOptions

        from fusion_plugins.mergekit.check import check_merge
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"fusion merge-check needs {error.name}, which is not installed: pip install 'fusion-plugins[mergekit]'"
        ) from error
    options = MergeOptions(lora_merge_cache=lora_merge_cache, trust_remote_code=trust_remote_code)
    result = check_merge(config, out=out, options=options)
    console = Console(soft_wrap=True, highlight=False)
    for name, text in result.facts:
        console.print(f"{name}: {text}", markup=False)
    for finding in result.findings:
        console.print(f"{finding.level.upper()}: {finding.text}\n  -> {finding.cure}", markup=False)
    if not result.ok:
        raise typer.Exit(1)
    console.print("nothing stands in the way of this merge", markup=False)


def _merge(folder: Path) -> str:
    from fusion_plugins.mergekit.report import render_merge_report

    return render_merge_report(folder)


#: File that tells what a folder holds -> (what that is, function that makes its page).
KINDS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "fusion_merge.json": ("a merged model", _merge),
}


def report(
    folder: Annotated[Path, typer.Argument(help="Folder to report on, such as a merged model.")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; fusion_report.html in the folder.")] = None,
    config: Config = None,
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
