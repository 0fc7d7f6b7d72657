"""The commands ``fusion cut``, ``fusion capture`` and ``fusion sample``."""

from typing import Annotated, Any

import typer

__all__ = ["capture", "cut", "sample"]

ConfigFile = Annotated[str | None, typer.Option("--config", "-c", help="YAML file with the settings.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE for any key of the YAML file, dots for nested ones.")
]
Limit = Annotated[int | None, typer.Option(help="Take the first so many rows only.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Measure a little and say what everything will take.")]
Out = Annotated[str | None, typer.Option(help="Folder to write into; an unfinished one is continued.")]


def capture(
    config: ConfigFile = None,
    texts: Annotated[str | None, typer.Option(help="JSONL or Parquet file or folder with the texts.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub name of the source model.")] = None,
    out: Out = None,
    backend: Annotated[str | None, typer.Option(help="transformers, vllm, openai or ray.")] = None,
    top_k: Annotated[str | None, typer.Option(help="Entries per row, or 'all'.")] = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    assign: Assignments = None,
) -> None:
    """Store the top-k log-probabilities of one source model over a set of texts."""
    from rich.console import Console

    from fusion_plugins.config import load_config
    from fusion_plugins.sources.capture import CaptureConfig, capture_texts, describe_estimate, estimate_capture

    flags = {
        "texts": texts,
        "model": model,
        "out": out,
        "backend": backend,
        "top_k": int(top_k) if top_k is not None and top_k.isdigit() else top_k,
        "limit": limit,
    }
    settings = load_config(CaptureConfig, config, flags, assign)
    console = Console(stderr=True, soft_wrap=True)
    if dry_run:
        console.print(describe_estimate(estimate_capture(settings)))
        return
    report = capture_texts(settings)
    console.print(
        f"{report.captured} texts captured ({report.tokens:,} tokens, {_speed(report):,.0f} tokens/s), "
        f"{report.present} were there, {len(report.skipped)} left out: {report.out}"
    )
    for text_id, reason in report.skipped.items():
        console.print(f"left out {text_id}: {reason}")


def sample(
    config: ConfigFile = None,
    prompts: Annotated[str | None, typer.Option(help="JSONL or Parquet file or folder with the prompts.")] = None,
    out: Out = None,
    only: Annotated[list[str] | None, typer.Option(help="Ask this source only (may stand several times).")] = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    assign: Assignments = None,
) -> None:
    """Draw N responses of each of M source models to a set of prompts."""
    from rich.console import Console

    from fusion_plugins.config import load_config
    from fusion_plugins.sources.estimate import estimate_samples
    from fusion_plugins.sources.sample import SampleConfig, sample_prompts

    flags = {"prompts": prompts, "out": out, "only": only or None, "limit": limit}
    settings = load_config(SampleConfig, config, flags, assign)
    console = Console(stderr=True, soft_wrap=True)
    if dry_run:
        for name, estimate in estimate_samples(settings).items():
            console.print(
                f"{name}: {estimate['responses']:,} responses, about {estimate['tokens']:,.0f} tokens, "
                f"{estimate['bytes'] / 1e6:,.1f} MB, {estimate['hours']:,.2f} hours at the measured "
                f"{estimate['tokens_per_second']:,.0f} tokens/s"
            )
        return
    report = sample_prompts(settings)
    console.print(
        f"{report.drawn} responses drawn ({report.tokens:,} tokens, {_speed(report):,.0f} tokens/s), "
        f"{report.present} were there: {report.out}"
    )
    for (source, prompt), reason in report.skipped.items():
        console.print(f"left out {prompt} of {source}: {reason}")


def cut(
    config: ConfigFile = None,
    texts: Annotated[str | None, typer.Option(help="JSONL or Parquet file or folder with the texts.")] = None,
    out: Annotated[str | None, typer.Option(help="JSONL file to write.")] = None,
    tokenizer: Annotated[
        list[str] | None, typer.Option(help="Folder or hub name of a tokenizer (several: of all sources and targets).")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest piece in tokens.")] = None,
    assign: Assignments = None,
) -> None:
    """Cut long texts into pieces that every tokenizer's model can take."""
    from rich.console import Console

    from fusion_plugins.config import load_config
    from fusion_plugins.sources.cut import CutConfig, cut_texts

    flags = {"texts": texts, "out": out, "tokenizers": tokenizer or None, "max_length": max_length}
    report = cut_texts(load_config(CutConfig, config, flags, assign))
    Console(stderr=True, soft_wrap=True).print(f"{report.texts} texts cut into {report.pieces}: {report.out}")


def _speed(report: Any) -> float:
    return float(report.tokens / max(report.seconds, 1e-9))
