"""The commands ``fusion merge-check`` and ``fusion report``."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from fusion_plugins.command_options import Assignments, ConfigFile
from fusion_plugins.config import Settings, load_config
from fusion_plugins.errors import ConfigError
from fusion_plugins.mergekit.report import render_merge_report


class ReportConfig(Settings):
    """Keys of the YAML file of ``fusion report``."""

    folder: Path = Field(description="folder of a merged model")
    out: Path | None = Field(None, description="HTML file to write; default: fusion_report.html in the folder")


def merge_check(
    config: Annotated[Path, typer.Argument(help="Merge configuration, as for mergekit-yaml or mergekit-multi.")],
    out: Annotated[Path | None, typer.Option(help="Where the merged model will be written.")] = None,
    lora_merge_cache: Annotated[str | None, typer.Option(help="As for mergekit-yaml.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="As for mergekit-yaml.")] = False,
) -> None:
    """Report what is wrong with a merge before it starts, and what it will take; status 1 if it cannot work.

    For example: `fusion merge-check mergekit_configs/varm.yml`.
    """
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
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of a model that was merged with varm or fusechat_sce.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write.", show_default="fusion_report.html in the folder")
    ] = None,
    config: ConfigFile = None,
    assign: Assignments = None,
) -> None:
    """Write one self-contained HTML page about a merged model.

    For example: `fusion report merged`.
    """
    from fusion_plugins.store.files import write_atomic

    settings = load_config(ReportConfig, config, {"folder": folder, "out": out}, assign)
    try:
        page = render_merge_report(settings.folder)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"fusion report needs {error.name}, which is not installed: pip install 'fusion-plugins[report]'"
        ) from error
    file = settings.out or settings.folder / "fusion_report.html"
    write_atomic(file, page)
    typer.echo(str(file))
