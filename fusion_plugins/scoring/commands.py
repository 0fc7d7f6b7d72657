"""The commands ``fusion score`` and ``fusion clean``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fusion_plugins.command_options import Assignments, ConfigFile, Limit, Out
from fusion_plugins.config import load_config
from fusion_plugins.terminal import console

if TYPE_CHECKING:
    from fusion_plugins.scoring.score import GroupSummary


def score(
    config: ConfigFile = None,
    responses: Annotated[str | None, typer.Option(help="Folder of responses, or a .jsonl or .parquet file.")] = None,
    out: Out = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(help="A scorer with its default options (repeatable), in place of the file's `scorers`."),
    ] = None,
    limit: Limit = None,
    assign: Assignments = None,
) -> None:
    """Score responses: verdicts of verifiers, rewards of a reward model; prints a table per domain and source.

    For example: `fusion score --config examples/fusechat3/score.yml`. `fusion keys score` lists the keys of the file.
    """
    from fusion_plugins.scoring.score import ScoreConfig, score_responses, summarize
    from fusion_plugins.store import open_rows

    flags: dict[str, Any] = {"responses": responses, "out": out, "limit": limit}
    if scorer:
        flags["scorers"] = {name: {} for name in scorer}
    settings = load_config(ScoreConfig, config, flags, assign)
    report = score_responses(settings)
    messages = console()
    messages.print(_table(summarize(open_rows(report.out))))
    messages.print(
        f"{report.scored} responses scored ({report.unscored} of them in a domain that no scorer takes, "
        f"{report.renewed} of them again, because they had changed); {report.present} were scored before: {report.out}",
    )
    for reason in report.skipped.values():
        messages.print(f"left out {reason}")


def clean(
    config: ConfigFile = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="File or folder of prompts (repeatable): .jsonl or .parquet.")
    ] = None,
    responses: Annotated[
        str | None, typer.Option(help="Instead of prompts: folder of responses, or a .jsonl or .parquet file.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder for what is kept and for clean_report.json.")] = None,
    assign: Assignments = None,
) -> None:
    """Remove duplicates and, where asked for, texts of evaluations, other languages, lengths and refusals.

    For example: `fusion clean --config examples/fusechat3/clean.yml`. `fusion keys clean` lists the keys of the file.
    """
    from fusion_plugins.scoring.clean import REPORT_NAME, CleanConfig
    from fusion_plugins.scoring.clean import clean as run

    settings = load_config(CleanConfig, config, {"prompts": prompts, "responses": responses, "out": out}, assign)
    report = run(settings)
    table = Table("removed", "rows", "share", "for example", "because")
    for reason, (count, first) in report.counts().items():
        table.add_row(reason, f"{count:,}", f"{count / report.read:.1%}", first.id, f"{first.because:.120}")
    messages = console()
    if report.removed:
        messages.print(table)
    for note in report.notes:
        messages.print(note)
    messages.print(f"{report.kept:,} of {report.read:,} rows kept: {report.out} (all that were removed: {REPORT_NAME})")


def _table(groups: "dict[tuple[str, str], GroupSummary]") -> Table:
    table = Table(
        "domain", "source", "responses", "accuracy", "no verdict", "mean reward", "characters", "why no verdict"
    )
    for (domain, source), group in groups.items():
        reasons = "; ".join(f"{count} {reason}" for reason, count in list(group.reasons.items())[:2])
        table.add_row(
            domain,
            source,
            str(group.responses),
            f"{group.correct / group.judged:.1%} of {group.judged}" if group.judged else "-",
            str(group.responses - group.judged),
            "-" if group.reward is None else f"{group.reward:.4g}",
            f"{group.mean_length:.0f} (median {group.median_length:.0f})",
            reasons,
        )
    return table
