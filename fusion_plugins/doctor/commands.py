"""The command ``fusion doctor``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusion_plugins.command_options import Assignments, ConfigFile
from fusion_plugins.install import missing_package
from fusion_plugins.terminal import console, say

if TYPE_CHECKING:
    from fusion_plugins.doctor.examine import DoctorConfig

#: the report, the function that prints it, and file name -> the function that makes it
_Examined = tuple[Any, Callable[..., None], Mapping[str, Callable[[Any], str | bytes]]]


def doctor(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Stores of the sources, or their tokenizers; or one folder of scored responses."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Store of the target, or its tokenizer; with scored responses, the source that is the target.",
            show_default="the last of the stores; the source marked with is_target",
        ),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            help="JSONL or Parquet texts, or a folder of responses: needed where a tokenizer takes the place of a "
            "store, and for figures by domain."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer of the target's store, if its model's folder no longer exists.")
    ] = None,
    vocabulary_map: Annotated[
        str | None, typer.Option(help="first_token, min_edit or exact.", show_default="first_token")
    ] = None,
    chain: Annotated[
        bool | None,
        typer.Option(
            help="Chain correction: where tokens split differently, give the next token the product of the source's "
            "probabilities of its pieces.",
            show_default="chain",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Texts of the sample.", show_default="200")] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder for doctor.json, doctor.html and doctor.png.", show_default="doctor")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
    config: ConfigFile = None,
    assign: Assignments = None,
) -> None:
    """Measure, before any training, what the sources can give the target, and advise on the settings.

    For example: `fusion doctor stores/mpt --target stores/llama2`, or `fusion doctor data/scored --target llama2`.
    `fusion keys doctor` lists the keys of the file.
    """
    from fusion_plugins.config import load_config
    from fusion_plugins.doctor.examine import DoctorConfig
    from fusion_plugins.store.files import make_folder, write_atomic

    flags = {
        "sources": sources or None,
        "target": target,
        "texts": texts,
        "tokenizer": tokenizer,
        "vocabulary_map": vocabulary_map,
        "chain": chain,
        "limit": limit,
        "out": out,
    }
    settings = load_config(DoctorConfig, config, flags, assign)
    run = _responses if settings.of_responses() else _stores
    report, show, pages = run(settings)
    if as_json:
        typer.echo(report.to_json())
    else:
        show(report, console())
    folder = Path(settings.out)
    make_folder(folder)
    write_atomic(folder / "doctor.json", report.to_json())
    try:
        for name, make in pages.items():
            write_atomic(folder / name, make(report))
    except ModuleNotFoundError as error:
        # The examination is done and its figures are written: a page less is no failure.
        say(f"no page was written: {missing_package(error, 'it') or error}", stderr=True)
    say(f"written to {folder}", stderr=as_json)


def _stores(settings: "DoctorConfig") -> _Examined:
    from fusion_plugins.core.fusion.project import ProjectionOptions
    from fusion_plugins.doctor.examine import examine
    from fusion_plugins.doctor.page import picture_png, render_doctor_page, show
    from fusion_plugins.doctor.sides import open_side, open_target
    from fusion_plugins.inputs import Selection, open_texts

    target_path, source_paths = settings.sides()
    if settings.target is None:
        say(f"target: {target_path}", stderr=True)
    chosen = Selection(names=settings.columns)
    contents = None if settings.texts is None else open_texts(settings.texts, selection=chosen)
    report = examine(
        open_target(target_path, contents, settings.tokenizer),
        [open_side(path, contents) for path in source_paths],
        vocabulary_map=settings.vocabulary_map,
        options=ProjectionOptions(chain=settings.chain),
        limit=settings.limit,
        texts=contents,
    )
    return report, show, {"doctor.html": render_doctor_page, "doctor.png": picture_png}


def _responses(settings: "DoctorConfig") -> _Examined:
    from fusion_plugins.doctor.responses import examine_responses
    from fusion_plugins.doctor.responses_page import render_responses_page, responses_png, show

    report = examine_responses(settings.sources[0], settings.target)
    return report, show, {"doctor.html": render_responses_page, "doctor.png": responses_png}
