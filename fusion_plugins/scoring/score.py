"""``fusion score``: responses -> the same rows with ``reward``, ``correct`` and what each scorer said.

The scored folder has the key of the responses, goes on where an earlier run stopped, and refuses scorers with other
settings. A response that no scorer takes (a domain that none names) is copied without a score, so that nothing is lost.
Rows whose prompt, gold answer or tests were corrected since are scored anew.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fusion_plugins.errors import ConfigError, ScoringError
from fusion_plugins.plugins import lookup
from fusion_plugins.scoring.base import Score, Scorer
from fusion_plugins.scoring.responses import Responses, key_of, open_responses, outdated
from fusion_plugins.store import RowManifest, RowWriter, open_rows

__all__ = ["GroupSummary", "ScoreConfig", "ScoreReport", "score_responses", "summarize"]

#: columns that scoring adds; ``scores`` holds scorer -> {reward, correct, reason, ...}
ADDED_COLUMNS = {"reward": "float64", "correct": "bool", "scores": "json"}
SECONDS_BETWEEN_LINES = 30.0


class ScorerSettings(BaseModel):
    """One entry of ``scorers``; keys other than ``domains`` are options of the scorer."""

    model_config = ConfigDict(extra="allow")

    domains: list[str] | None = Field(None, description="domains to score; default: what the scorer is made for")


class ScoreConfig(BaseModel):
    """Keys of the YAML file of ``fusion score``."""

    model_config = ConfigDict(extra="forbid")

    responses: str | list[str] = Field(
        min_length=1,
        description="folder of responses, or of responses that other scorers have scored; or .jsonl or .parquet files",
    )
    out: str = Field(description="folder of the scored responses")
    scorers: dict[str, ScorerSettings] = Field(min_length=1, description="name of a scorer -> domains and its options")
    limit: int | None = Field(None, ge=1, description="score the first so many responses only")
    unit_rows: int = Field(256, ge=1, description="responses that are scored and committed together")


@dataclass(frozen=True)
class ScoreReport:
    """What a run did.

    Attributes:
        out: the folder of scored responses.
        scored: rows written by this run.
        present: rows that were there before.
        unscored: rows written by this run that no scorer takes.
        renewed: rows that were there but are scored anew, because what they were scored with has changed.
    """

    out: Path
    scored: int
    present: int
    unscored: int
    renewed: int = 0


@dataclass(frozen=True)
class GroupSummary:
    """The scored responses of one source in one domain.

    Attributes:
        responses: number of rows.
        correct: rows with verdict True.
        judged: rows with a verdict.
        reasons: why rows have no verdict or reward -> rows.
        reward: mean reward of the rows that have one; None where none has.
        mean_length: of the responses, in characters.
        median_length: the same.
    """

    responses: int
    correct: int
    judged: int
    reasons: Mapping[str, int]
    reward: float | None
    mean_length: float
    median_length: float


@dataclass(frozen=True)
class _Running:
    name: str
    scorer: Scorer
    domains: frozenset[str] | None

    def takes(self, row: Mapping[str, Any]) -> bool:
        return self.domains is None or row["domain"] in self.domains


def score_responses(config: ScoreConfig) -> ScoreReport:
    """Score a folder or files of responses.

    Raises:
        ConfigError: a scorer's options are wrong, or the folder lacks a column.
        DataError: a row of a file is wrong.
        MismatchError: ``out`` holds rows that other scorers or settings made, or rows of other prompts.
        ScoringError: a scorer cannot work at all (missing package, model or isolation).
    """
    responses = open_responses(config.responses)
    if Path(config.out).resolve() == Path(responses.path).resolve():
        raise ConfigError(f"out: expected another folder than that of the responses, got {config.out!r} for both")
    with ExitStack() as stack:
        running = [_start(name, settings, stack) for name, settings in config.scorers.items()]
        writer = stack.enter_context(RowWriter(config.out, _manifest(responses, running)))
        renewed = _drop_outdated(responses, writer, config.scorers)
        present = len(writer.done_keys)
        scored = unscored = 0
        waiting = (row for row in responses if key_of(row, responses.manifest) not in writer.done_keys)
        wanted = max(0, config.limit - present) if config.limit is not None else None
        advance = stack.enter_context(_progress(config.limit or len(responses), present))
        for unit in _units(islice(waiting, wanted), config.unit_rows):
            for row, results in zip(unit, _score_unit(unit, running), strict=True):
                writer.write(_merge(row, results))
                unscored += not results
            writer.flush()
            scored += len(unit)
            advance(len(unit))
        if next(waiting, None) is None:
            writer.finish()
    return ScoreReport(Path(config.out), scored, present, unscored, renewed)


def _drop_outdated(responses: Responses, writer: RowWriter, scorers: Iterable[str]) -> int:
    """Take rows out that were scored with what no longer holds, and say so; return their number."""
    if not writer.done_keys:
        return 0
    changed = outdated(responses, open_rows(writer.path), scorers)
    if changed:
        columns = Counter(name for names in changed.values() for name in names)
        key = next(iter(changed))
        Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(
            f"{len(changed)} rows of {writer.path} are scored anew, because what they were scored with has changed: "
            f"{', '.join(f'{name} in {count}' for name, count in columns.items())}. The first: "
            + ", ".join(f"{name} {value!r}" for name, value in zip(responses.manifest.key, key, strict=True))
        )
        writer.drop(changed)
    return len(changed)


def summarize(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], GroupSummary]:
    """Return (domain, source) -> accuracy, rewards and lengths; reads the rows once and keeps only numbers."""
    groups: dict[tuple[str, str], list[tuple[bool | None, float | None, int, str | None]]] = defaultdict(list)
    for row in rows:
        groups[row["domain"], row["source"]].append((row["correct"], row["reward"], len(row["response"]), _reason(row)))
    return {key: _summary(found) for key, found in sorted(groups.items())}


def _summary(found: Sequence[tuple[bool | None, float | None, int, str | None]]) -> GroupSummary:
    rewards = [reward for _, reward, _, _ in found if reward is not None]
    lengths = [length for _, _, length, _ in found]
    return GroupSummary(
        responses=len(found),
        correct=sum(correct is True for correct, _, _, _ in found),
        judged=sum(correct is not None for correct, _, _, _ in found),
        reasons=dict(Counter(reason for _, _, _, reason in found if reason is not None).most_common()),
        reward=fmean(rewards) if rewards else None,
        mean_length=fmean(lengths),
        median_length=median(lengths),
    )


def _reason(row: Mapping[str, Any]) -> str | None:
    """Why a scorer could not say anything; what it said about a wrong answer is no such reason."""
    for said in (row["scores"] or {}).values():
        if said.get("reason") and said.get("correct") is None and said.get("reward") is None:
            return str(said["reason"])
    return None


def _start(name: str, settings: ScorerSettings, stack: ExitStack) -> _Running:
    try:
        scorer: Scorer = lookup("scorers", name)(**(settings.model_extra or {}))
    except TypeError as error:
        raise ConfigError(f"scorers.{name}: wrong options {settings.model_extra}: {error}") from error
    stack.callback(scorer.close)
    return _Running(name, scorer, frozenset(settings.domains) if settings.domains is not None else scorer.domains)


def _manifest(responses: Responses, running: Sequence[_Running]) -> RowManifest:
    made_by = {
        one.name: {"domains": None if one.domains is None else sorted(one.domains), **one.scorer.facts}
        for one in running
    }
    before = responses.manifest.facts
    return RowManifest(
        stage="scored",
        columns=responses.manifest.columns | ADDED_COLUMNS,
        key=responses.manifest.key,
        facts={**before, "scorers": {**before.get("scorers", {}), **made_by}},
        provenance={"responses": str(responses.path)},
    )


def _units(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while unit := list(islice(rows, size)):
        yield unit


def _score_unit(unit: Sequence[Mapping[str, Any]], running: Sequence[_Running]) -> list[dict[str, Score]]:
    results: list[dict[str, Score]] = [{} for _ in unit]
    for one in running:
        places = [place for place, row in enumerate(unit) if one.takes(row)]
        scores = one.scorer.score([unit[place] for place in places]) if places else []
        if len(scores) != len(places):
            raise ScoringError(f"scorer {one.name!r} gave {len(scores)} scores for {len(places)} responses")
        for place, score in zip(places, scores, strict=True):
            results[place][one.name] = score
    return results


def _merge(row: Mapping[str, Any], results: Mapping[str, Score]) -> dict[str, Any]:
    said = {
        name: {"reward": score.reward, "correct": score.correct, "reason": score.reason, **score.details}
        for name, score in results.items()
    }
    return {
        **row,
        "reward": _only("reward", row, results),
        "correct": _only("correct", row, results),
        "scores": {**(row.get("scores") or {}), **said},
    }


def _only(field: str, row: Mapping[str, Any], results: Mapping[str, Score]) -> Any:
    given = {name: getattr(score, field) for name, score in results.items() if getattr(score, field) is not None}
    if len(given) > 1:
        raise ScoringError(
            f"prompt {row['prompt_id']!r}: scorers {', '.join(given)} all give a {field}. Let only one of them score "
            f"the domain {row['domain']!r}: set `domains` of the others."
        )
    return next(iter(given.values()), row.get(field))


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Give a function that notes progress: a bar on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("score"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("score", total=total, completed=done)
            yield lambda count: bar.advance(task, count)
        return
    count, started = done, time.monotonic()
    last = started

    def advance(more: int) -> None:
        nonlocal count, last
        count += more
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            left = (last - started) / (count - done) * max(total - count, 0)
            console.print(f"scored {count}/{total}, about {left:,.0f} s left")

    yield advance
