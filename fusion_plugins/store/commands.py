"""The commands ``fusion store info | verify | merge | compact | export``."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["compact", "export", "info", "merge", "verify"]

Folder = Annotated[Path, typer.Argument(help="A store, or a folder of responses or scored responses.")]


def info(folder: Folder) -> None:
    """Say what a folder holds: how it was made, how much is in it, and what it costs per token."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fusion_plugins.store.manifest import load_manifest

    manifest = load_manifest(folder)
    table = Table("", str(folder), show_header=True)
    for name, value in manifest.identity().items():
        table.add_row(name, escape(str(value)))
    rows = {
        "made by": f"{manifest.made_by}, {manifest.created}",
        "complete": "yes" if manifest.complete else "no: run the command that made it again to go on",
        "rows": f"{manifest.rows:,} in {len(manifest.shards)} shards",
        "bytes": f"{manifest.bytes:,}",
    }
    if manifest.tokens:
        rows["tokens"] = f"{manifest.tokens:,}, {manifest.bytes / manifest.tokens:.1f} bytes each"
    rows |= {str(name): str(value) for name, value in manifest.provenance.items()}
    for name, text in rows.items():
        table.add_row(name, escape(text))
    Console().print(table)


def verify(
    folder: Folder,
    drop_damaged: Annotated[
        bool, typer.Option(help="Take damaged shards out, so that the command that made them makes their rows again.")
    ] = False,
) -> None:
    """Read a folder to the last byte, compare checksums and counts, and look for rows that stand twice."""
    from rich.console import Console

    from fusion_plugins.errors import StoreError
    from fusion_plugins.store.maintain import verify as run

    verdict = run(folder, drop_damaged=drop_damaged)
    if verdict.dropped:
        lost = sum(shard.rows for shard in verdict.damaged)
        Console(soft_wrap=True, markup=False).print(
            f"{len(verdict.damaged)} damaged shards with {lost} rows were taken out of {folder}; "
            f"{verdict.manifest.rows} rows are left. Run the command that made it again."
        )
        return
    if verdict.problems:
        raise StoreError(f"{folder}: {len(verdict.problems)} problem(s). " + " ".join(verdict.problems))
    count = len(verdict.manifest.shards)
    Console(soft_wrap=True, markup=False).print(
        f"{folder}: {verdict.manifest.rows:,} rows in {count} shards, all sound"
    )


def merge(
    parts: Annotated[list[Path], typer.Argument(help="Folders that were made with the same settings.")],
    out: Annotated[Path, typer.Option(help="Folder to write; an interrupted merge is continued.")],
) -> None:
    """Join the parts of one capture (or of one sampling run) into one folder."""
    from rich.console import Console

    from fusion_plugins.store.maintain import merge as run

    manifest = run(parts, out)
    Console(soft_wrap=True, markup=False).print(f"{out}: {manifest.rows:,} rows in {len(manifest.shards)} shards")


def compact(folder: Folder) -> None:
    """Join small shards, and rewrite those of an older version."""
    from rich.console import Console

    from fusion_plugins.store.maintain import compact as run
    from fusion_plugins.store.manifest import load_manifest

    before = load_manifest(folder)
    after = run(folder)
    Console(soft_wrap=True, markup=False).print(
        f"{folder}: {len(before.shards)} shards became {len(after.shards)}, {before.bytes:,} bytes {after.bytes:,}"
    )


def export(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="An empty folder to write Parquet files into.")],
    format: Annotated[str, typer.Option(help="datasets (plain lists) or axolotl-kd.")] = "datasets",
    temperature: Annotated[float, typer.Option(help="For axolotl-kd: the kd_temperature of the run.")] = 1.0,
) -> None:
    """Write a store as plain Parquet for Hugging Face datasets, or for axolotl's own knowledge distillation."""
    from rich.console import Console

    from fusion_plugins.store.export import export as run

    count = run(folder, out, format=format, temperature=temperature)
    Console(soft_wrap=True, markup=False).print(f"{out}: {count:,} records as {format}")
