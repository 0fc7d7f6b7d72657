"""The commands ``fusion merge-check`` and ``fusion report``."""

from pathlib import Path
from typing import Annotated

import typer

from fusion_plugins.config import as_defaults
from fusion_plugins.errors import ConfigError
from fusion_plugins.mergekit.report import render_merge_report

__all__ = ["merge_check", "report"]

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
    """Report what is wrong with a merge before it starts, and what it will take; status 1 if it cannot work."""
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
    console.print("no problems found" if not result.findings else "no errors found", markup=False)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a model that was merged with varm or fusechat_sce.")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; fusion_report.html in the folder.")] = None,
    config: Config = None,
) -> None:
    """Write one self-contained HTML page about a merged model."""
    try:
        page = render_merge_report(folder)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"fusion report needs {error.name}, which is not installed: pip install 'fusion-plugins[report]'"
        ) from error
    file = out or folder / "fusion_report.html"
    file.write_text(page, encoding="utf-8")
    typer.echo(str(file))
