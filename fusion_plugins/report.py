"""The command ``fusion report``: one self-contained page about a whole run, or about one folder of it.

What a folder is, :mod:`fusion_plugins.reports.kinds` decides; the parts of the page are in the other modules of
:mod:`fusion_plugins.reports`.
"""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from fusion_plugins.command_options import Assignments, ConfigFile
from fusion_plugins.config import Settings, load_config
from fusion_plugins.install import missing_package_error
from fusion_plugins.page import PAGE_NAME
from fusion_plugins.terminal import say


class ReportConfig(Settings):
    """Keys of the YAML file of ``fusion report``."""

    folder: Path = Field(
        description="folder of a run (or its YAML file), a store, responses, scored responses, a trained or merged "
        "model, or the output of `fusion doctor`"
    )
    out: Path | None = Field(None, description="HTML file to write; default: fusion_report.html in the folder")
    examples: int = Field(
        4,
        ge=0,
        le=8,
        description="example texts of each training; of a run at most 12 in all, but one of each training",
    )
    losses: bool | None = Field(
        None,
        description="run the model before and after each training on the example texts; default: where both are in "
        "folders of up to 2 GiB",
    )
    verdicts: int | None = Field(
        None, ge=0, description="verdicts of scored responses to show in full; default: 50, and 6 on the page of a run"
    )
    seed: int = Field(0, description="decides which verdicts are shown")


def report(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of a run (with fusion.yml), or of a store, responses, a trained or a merged model.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write.", show_default="fusion_report.html in the folder")
    ] = None,
    losses: Annotated[
        bool | None,
        typer.Option(
            help="Run the models before and after each training on the example texts.",
            show_default="only models of up to 2 GiB",
        ),
    ] = None,
    config: ConfigFile = None,
    assign: Assignments = None,
) -> None:
    """Write one self-contained HTML page about a whole run, or about one folder of it.

    For example: `fusion report .` in the folder of a run that is finished or not, `fusion report rounds --losses`,
    `fusion report stores/llama`, `fusion report data/scored --set verdicts=100`, `fusion report merged --out
    merged.html`.
    """
    from fusion_plugins.store.files import write_atomic

    settings = load_config(ReportConfig, config, {"folder": folder, "out": out, "losses": losses}, assign)
    try:
        page = _page(settings)
    except ModuleNotFoundError as error:
        raise missing_package_error(error, "fusion report") from error
    file = settings.out or (settings.folder if settings.folder.is_dir() else settings.folder.parent) / PAGE_NAME
    write_atomic(file, page)
    say(str(file))


def _page(settings: ReportConfig) -> str:
    from fusion_plugins.reports.build import page_of
    from fusion_plugins.reports.chain import Options

    options = Options(settings.examples, settings.losses, settings.verdicts, settings.seed)
    return page_of(settings.folder, options)
