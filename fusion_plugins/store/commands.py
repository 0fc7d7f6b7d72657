"""The commands ``fusion store info | verify | merge | compact | export``."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fusion_plugins.errors import StoreError
from fusion_plugins.terminal import console
from fusion_plugins.terminal import say as _say

# pyarrow, numpy and pydantic are imported inside the commands, so that `fusion --help` stays fast.

Folder = Annotated[Path, typer.Argument(help="A store, or a folder of responses or scored responses.")]


def info(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> None:
    """Show what a folder holds: how it was made, how much is in it, and what it costs per token.

    For example: `fusion store info stores/mpt`.
    """
    from fusion_plugins.store.manifest import load_manifest

    manifest = load_manifest(folder)
    unfinished = "no: run the command that made it again to continue"
    counts = {
        "made by": f"{manifest.made_by}, {manifest.created}",
        "complete": "yes" if manifest.complete else unfinished,
        manifest.NOUN: f"{manifest.rows:,} in {len(manifest.shards)} shards",
        "bytes": f"{manifest.bytes:,}",
    }
    if manifest.tokens:
        counts["tokens"] = f"{manifest.tokens:,}, {manifest.bytes / manifest.tokens:.1f} bytes each"
    if as_json:
        numbers = {"rows": manifest.rows, "shards": len(manifest.shards), "bytes": manifest.bytes}
        figures = {"complete": manifest.complete, "tokens": manifest.tokens, "made_by": manifest.made_by} | numbers
        parts = {"identity": manifest.identity(), **figures, "provenance": manifest.provenance}
        typer.echo(json.dumps(parts, indent=2, default=str))
        return
    table = Table("")
    # A fingerprint that is cut cannot be compared.
    table.add_column(str(folder), overflow="fold")
    for lines in (manifest.identity(), counts, manifest.provenance):
        for name, value in lines.items():
            table.add_row(name, str(value))
    console().print(table)


def verify(
    folder: Folder,
    drop_damaged: Annotated[
        bool, typer.Option(help="Remove damaged shards, so that the command that made them makes their content again.")
    ] = False,
) -> None:
    """Read a folder to the last byte, compare checksums and counts, and look for ids or keys that appear twice.

    For example: `fusion store verify stores/mpt`.
    """
    from fusion_plugins.store.maintain import verify as run

    verdict = run(folder, drop_damaged=drop_damaged)
    manifest = verdict.manifest
    if verdict.dropped:
        lost = sum(shard.rows for shard in verdict.damaged)
        _say(
            f"{len(verdict.damaged)} damaged shards with {lost} {manifest.NOUN} were removed from {folder}; "
            f"{manifest.rows} {manifest.NOUN} are left. Run the command that made it again."
        )
        return
    if verdict.problems:
        raise StoreError(f"{folder}: {len(verdict.problems)} problem(s). " + " ".join(verdict.problems))
    _say(f"{folder}: {manifest.rows:,} {manifest.NOUN} in {len(manifest.shards)} shards, no problems found")


def merge(
    parts: Annotated[list[Path], typer.Argument(help="Folders that were made with the same settings.")],
    out: Annotated[Path, typer.Option(help="Folder to write; an interrupted merge is continued.")],
) -> None:
    """Join the parts of one capture (or of one sampling run) into one folder.

    For example: `fusion store merge stores/part-0 stores/part-1 --out stores/mpt`.
    """
    from fusion_plugins.store.maintain import merge as run
    from fusion_plugins.store.maintain import missing_parts
    from fusion_plugins.store.manifest import load_manifest

    manifest = run(parts, out)
    _say(f"{out}: {manifest.rows:,} {manifest.NOUN} in {len(manifest.shards)} shards")
    if missing := missing_parts(map(load_manifest, parts)):
        shown = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
        _say(f"not complete: {len(missing)} parts are missing ({shown}). Merge all of them, into the same folder.")


def compact(folder: Folder) -> None:
    """Join small shards, and rewrite those of an older version.

    For example: `fusion store compact stores/mpt`.
    """
    from fusion_plugins.store.maintain import compact as run
    from fusion_plugins.store.manifest import load_manifest

    before = load_manifest(folder)
    after = run(folder)
    sizes = f"{before.bytes:,} bytes became {after.bytes:,}"
    _say(f"{folder}: {len(before.shards)} shards became {len(after.shards)}, {sizes}")


def export(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="An empty folder to write Parquet files into.")],
    format: Annotated[str, typer.Option(help="datasets (plain lists) or axolotl-kd.")] = "datasets",
    temperature: Annotated[float, typer.Option(help="For axolotl-kd: the kd_temperature of the run.")] = 1.0,
) -> None:
    """Write a store as plain Parquet for Hugging Face datasets, or for axolotl's own knowledge distillation.

    For example: `fusion store export stores/mpt --out mpt-parquet`.
    """
    from fusion_plugins.store.export import export as run

    count = run(folder, out, format=format, temperature=temperature)
    _say(f"{out}: {count:,} records as {format}")
