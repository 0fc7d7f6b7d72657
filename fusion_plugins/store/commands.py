"""The commands ``fusion store info | verify | merge | compact | push | pull | import | export``."""

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


def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(help="ORG/NAME of a dataset repository; it is made if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; else it is private.")] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
) -> None:
    """Upload a store, or a folder of responses, to the Hugging Face hub.

    For example: `fusion store push stores/mpt my-org/mpt-minipile`.
    """
    from fusion_plugins.store.remote import push as run

    _say(f"{folder} is at {run(folder, repo, private=not public, message=message)}")


def pull(
    repo: Annotated[str, typer.Argument(help="ORG/NAME of a dataset repository that was pushed.")],
    out: Annotated[Path, typer.Option(help="Folder to write; an interrupted download is continued.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default="main")] = None,
) -> None:
    """Download a store, or a folder of responses, from the Hugging Face hub, and verify it.

    For example: `fusion store pull my-org/mpt-minipile --out stores/mpt`.
    """
    from fusion_plugins.store.remote import pull as run

    manifest = run(repo, out, revision=revision)
    _say(f"{out}: {manifest.rows:,} {manifest.NOUN} in {len(manifest.shards)} shards, no problems found")


def import_(
    source: Annotated[str, typer.Argument(help="Parquet file or folder, or hf:ORG/NAME.")],
    out: Annotated[Path, typer.Option(help="Store to write; an import that was stopped is continued.")],
    texts: Annotated[Path, typer.Option(help=".jsonl file to write: the texts, for other sources and the training.")],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub name of the teacher's tokenizer.")],
    format: Annotated[str, typer.Option(help="distillkit.")] = "distillkit",
    compression: Annotated[
        Path | None, typer.Option(help="YAML file with `logprob_compressor`; default: the one in the folder.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the teacher.", show_default="the tokenizer's")] = None,
    on_unusable: Annotated[str, typer.Option(help="Rows that cannot be used: raise, or skip and report.")] = "raise",
) -> None:
    """Make a store of teacher outputs that another program has published.

    For example: `fusion store import hf:arcee-ai/Qwen3-235B-Logits-Packed-8192 --tokenizer Qwen/Qwen3-235B-A22B
    --compression compression.yml --out stores/qwen3 --texts data/qwen3.jsonl`.
    """
    from fusion_plugins.errors import ConfigError
    from fusion_plugins.store.distillkit import import_distillkit

    if format != "distillkit" or on_unusable not in ("raise", "skip"):
        raise ConfigError(
            f"expected --format distillkit and --on-unusable raise or skip, got {format!r} and {on_unusable!r}"
        )
    options = {"tokenizer": tokenizer, "compression": compression, "model": model, "on_unusable": on_unusable}
    report = import_distillkit(source, out, texts, **options)  # type: ignore[arg-type]
    share = report.outside / max(report.tokens - report.records, 1)
    _say(f"{out}: {report.records:,} records of {report.tokens:,} tokens; {share:.2%} of them outside the entries")
    for where, reason in report.skipped.items():
        _say(f"left out {where}: {reason}")


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
