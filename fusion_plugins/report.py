"""The command ``fusion report``: one page about what a folder holds, a merged model or scored responses."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from fusion_plugins.command_options import Assignments, ConfigFile
from fusion_plugins.config import Settings, load_config
from fusion_plugins.errors import DataError
from fusion_plugins.install import missing_package_error
from fusion_plugins.terminal import say

PAGE_NAME = "fusion_report.html"


class ReportConfig(Settings):
    """Keys of the YAML file of ``fusion report``."""

    folder: Path = Field(description="folder of a merged model or of scored responses")
    out: Path | None = Field(None, description="HTML file to write; default: fusion_report.html in the folder")
    verdicts: int = Field(50, ge=0, description="verdicts of scored responses to show in full")
    seed: int = Field(0, description="decides which verdicts are shown")


def report(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Folder of a model that was merged with varm or fusechat_sce, or of scored responses."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write.", show_default="fusion_report.html in the folder")
    ] = None,
    config: ConfigFile = None,
    assign: Assignments = None,
) -> None:
    """Write one self-contained HTML page about a merged model or a folder of scored responses.

    For example: `fusion report merged`, or `fusion report data/scored`.
    """
    from fusion_plugins.store.files import write_atomic

    settings = load_config(ReportConfig, config, {"folder": folder, "out": out}, assign)
    try:
        page = _page(settings)
    except ModuleNotFoundError as error:
        raise missing_package_error(error, "fusion report") from error
    file = settings.out or settings.folder / PAGE_NAME
    write_atomic(file, page)
    say(str(file))


def _page(settings: ReportConfig) -> str:
    from fusion_plugins.mergekit.record import RECORD_NAME
    from fusion_plugins.store.manifest import MANIFEST_NAME

    if (settings.folder / RECORD_NAME).exists():
        from fusion_plugins.mergekit.report import render_merge_report

        return render_merge_report(settings.folder)
    if (settings.folder / MANIFEST_NAME).exists():
        from fusion_plugins.scoring.report import render_scored_report

        return render_scored_report(settings.folder, seed=settings.seed, verdicts=settings.verdicts)
    got = "no such file" if settings.folder.is_dir() else "no folder"
    raise DataError(
        f"{settings.folder}: expected a merged model with {RECORD_NAME}, or scored responses with {MANIFEST_NAME}, "
        f"got {got}. Give the folder of a merge with varm or fusechat_sce that has ended, or the one that `fusion "
        "score` wrote."
    )
