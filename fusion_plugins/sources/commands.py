"""The commands ``fusion cut``, ``fusion capture`` and ``fusion sample``."""

from collections.abc import Mapping
from typing import Annotated

import typer

from fusion_plugins.command_options import Assignments, ConfigFile, DryRun, Limit, Out, Shard
from fusion_plugins.config import load_config
from fusion_plugins.progress import duration
from fusion_plugins.terminal import console

# The modules that do the work load numpy and pyarrow. Each command imports its own, so that `fusion --help` is fast.


def capture(
    config: ConfigFile = None,
    texts: Annotated[str | None, typer.Option(help="JSONL or Parquet file or folder, or hf:ORG/NAME.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub name of the source model.")] = None,
    out: Out = None,
    backend: Annotated[
        str | None, typer.Option(help="transformers, vllm, openai or ray.", show_default="transformers")
    ] = None,
    top_k: Annotated[str | None, typer.Option(help="Entries per position, or 'all'.", show_default="64")] = None,
    limit: Limit = None,
    shard: Shard = None,
    dry_run: DryRun = False,
    assign: Assignments = None,
) -> None:
    """Store the top-k log-probabilities of one source model over a set of texts.

    For example: `fusion capture --model mosaicml/mpt-7b --texts corpus.jsonl --out stores/mpt`. `fusion keys capture`
    lists the keys of the file.
    """
    from fusion_plugins.response_texts import described_responses
    from fusion_plugins.sources.capture import capture_texts
    from fusion_plugins.sources.capture_config import CaptureConfig
    from fusion_plugins.sources.capture_estimate import estimate_capture

    flags = {
        "texts": texts,
        "model": model,
        "out": out,
        "backend": backend,
        "top_k": int(top_k) if top_k is not None and top_k.isdigit() else top_k,
        "limit": limit,
        "shard": shard,
    }
    settings = load_config(CaptureConfig, config, flags, assign)
    messages = console(stderr=True)
    if dry_run:
        estimate = estimate_capture(settings)
        messages.print(f"{estimate['texts']:,} texts, {_described(estimate)}")
        return
    report = capture_texts(settings)
    messages.print(
        f"{report.captured} texts captured ({_speed(report.tokens, report.seconds)}), {report.present} were there, "
        f"{len(report.skipped)} left out: {report.out}"
    )
    if report.text_changes:
        messages.print(f"the tokenizer changes texts, which is known: {'; '.join(report.text_changes)}")
    if responses := described_responses(report.without_text):
        messages.print(f"responses without a text of their own: {responses}")
    if answers := report.answers.described():
        messages.print(answers)
    for text_id, reason in report.skipped.items():
        messages.print(f"left out {text_id}: {reason}")


def sample(
    config: ConfigFile = None,
    prompts: Annotated[str | None, typer.Option(help="JSONL or Parquet file or folder, or hf:ORG/NAME.")] = None,
    out: Out = None,
    only: Annotated[list[str] | None, typer.Option(help="Ask only this source (may be given several times).")] = None,
    limit: Limit = None,
    shard: Shard = None,
    dry_run: DryRun = False,
    assign: Assignments = None,
) -> None:
    """Draw N responses of each of M source models to a set of prompts.

    For example: `fusion sample --config examples/fusechat3/sample.yml`. `fusion keys sample` lists the keys of the
    file.
    """
    from fusion_plugins.sources.sample import sample_prompts
    from fusion_plugins.sources.sample_config import SampleConfig
    from fusion_plugins.sources.sample_estimate import estimate_samples

    flags = {"prompts": prompts, "out": out, "only": only or None, "limit": limit, "shard": shard}
    settings = load_config(SampleConfig, config, flags, assign)
    messages = console(stderr=True)
    if dry_run:
        for name, estimate in estimate_samples(settings).items():
            messages.print(f"{name}: {estimate['responses']:,} responses, {_described(estimate)}")
        return
    report = sample_prompts(settings)
    messages.print(
        f"{report.drawn} responses drawn ({_speed(report.tokens, report.seconds)}), {report.present} were there, "
        f"{len(report.skipped)} prompts left out: {report.out}"
    )
    if report.repaired:
        messages.print(
            f"{report.repaired} responses were repaired: half characters became U+FFFD, impossible counts of tokens 0"
        )
    for (source, prompt), reason in report.skipped.items():
        messages.print(f"left out {prompt} of {source}: {reason}")


def cut(
    config: ConfigFile = None,
    texts: Annotated[str | None, typer.Option(help="JSONL or Parquet file or folder, or hf:ORG/NAME.")] = None,
    out: Annotated[str | None, typer.Option(help="JSONL file to write.")] = None,
    tokenizer: Annotated[
        list[str] | None, typer.Option(help="Folder or hub name of a tokenizer (several: of all sources and targets).")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest piece in tokens.")] = None,
    assign: Assignments = None,
) -> None:
    """Cut long texts into pieces that fit the context of every model.

    For example: `fusion cut --texts corpus.jsonl --tokenizer mosaicml/mpt-7b --max-length 2048 --out pieces.jsonl`.
    """
    from fusion_plugins.sources.cut import CutConfig, cut_texts

    flags = {"texts": texts, "out": out, "tokenizers": tokenizer or None, "max_length": max_length}
    report = cut_texts(load_config(CutConfig, config, flags, assign))
    messages = console(stderr=True)
    left_out = f", {len(report.skipped)} left out" if report.skipped else ""
    messages.print(f"{report.texts} texts cut into {report.pieces}{left_out}: {report.out}")
    for name, reason in report.skipped.items():
        messages.print(f"left out {name}: {reason}")


def _described(estimate: Mapping[str, float]) -> str:
    speed = estimate["tokens_per_second"]
    return (
        f"about {estimate['tokens']:,.0f} tokens, {estimate['bytes'] / 1e6:,.1f} MB, "
        f"{duration(estimate['hours'] * 3600)} at the measured {speed:,.{0 if speed >= 10 else 2}f} tokens/s"
    )


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens:,} tokens, {tokens / max(seconds, 1e-9):,.0f} tokens/s"
