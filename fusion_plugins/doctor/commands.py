"""The command ``fusion doctor``."""

from pathlib import Path
from typing import Annotated

import typer

from fusion_plugins.config import as_defaults
from fusion_plugins.errors import ConfigError

__all__ = ["doctor"]

Config = Annotated[
    str | None,
    typer.Option("--config", "-c", is_eager=True, callback=as_defaults, help="YAML file with the settings."),
]


def doctor(
    sources: Annotated[list[str], typer.Argument(help="Stores of the sources, or their tokenizers.")],
    target: Annotated[
        str | None, typer.Option(help="Store of the target, or its tokenizer. Without it, the last of the stores.")
    ] = None,
    texts: Annotated[
        str | None, typer.Option(help="JSONL or Parquet texts, where tokenizers stand for stores.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer of the target's store, where its model's folder is gone.")
    ] = None,
    vocabulary: Annotated[str, typer.Option(help="exact, min_edit or first_token.")] = "first_token",
    chain: Annotated[bool, typer.Option(help="Use the text where the source splits it differently.")] = True,
    limit: Annotated[int, typer.Option(min=1, help="Texts of the sample.")] = 200,
    out: Annotated[Path, typer.Option(help="Folder for doctor.json, doctor.html and doctor.png.")] = Path("doctor"),
    config: Config = None,
) -> None:
    """Say, before any training, what fusing the sources into the target can give and what to set otherwise."""
    from rich.console import Console
    from rich.progress import track

    from fusion_plugins.core.fusion.project import ProjectionOptions
    from fusion_plugins.doctor.examine import examine, open_side, open_target
    from fusion_plugins.doctor.page import picture_png, render_doctor_page, show
    from fusion_plugins.inputs import read_texts

    if target is None:
        *sources, target = sources
        typer.echo(f"target: {target}", err=True)
    if not sources:
        raise ConfigError("fusion doctor expects a target and at least one source; came one store. Give both.")
    contents = {text.id: text.content for text in read_texts(texts)} if texts is not None else None
    sides = [open_target(target, contents, tokenizer), *(open_side(path, contents) for path in sources)]
    ticks = iter(track(range(limit * len(sources)), "examining", console=Console(stderr=True), transient=True))
    found = examine(
        sides[0],
        sides[1:],
        vocabulary=vocabulary,
        options=ProjectionOptions(chain=chain),
        limit=limit,
        advance=lambda: next(ticks, None),
    )
    show(found, Console(soft_wrap=True))
    out.mkdir(parents=True, exist_ok=True)
    (out / "doctor.json").write_text(found.to_json(), encoding="utf-8")
    try:
        picture = picture_png(found)
        (out / "doctor.png").write_bytes(picture)
        (out / "doctor.html").write_text(render_doctor_page(found, picture), encoding="utf-8")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{out / 'doctor.json'} is written; the page needs {error.name}, which is not installed: "
            "pip install 'fusion-plugins[report]'"
        ) from error
    typer.echo(f"written to {out}")
