"""``fusion score``: responses -> the same rows with ``reward``, ``correct`` and the result of each scorer.

The scored folder has the key of the responses, continues where an earlier run stopped, and refuses scorers with other
settings. A response in a domain that no scorer takes is copied without a score, so that none is lost. Rows whose
prompt, gold answer or tests have changed since are scored again.
"""

import json
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from pydantic import ConfigDict, Field

from fusion_plugins.config import Settings
from fusion_plugins.core.preferences.numbers import mean
from fusion_plugins.errors import ConfigError, MismatchError, ScoringError, StoreError
from fusion_plugins.plugins import lookup
from fusion_plugins.progress import meter
from fusion_plugins.scoring.base import Row, Score, Scorer
from fusion_plugins.scoring.responses import ResponseFiles, Responses, key_of, open_responses, outdated
from fusion_plugins.store import ColumnKind, RowManifest, RowWriter, open_rows
from fusion_plugins.terminal import say

#: columns that scoring adds; ``scores`` is scorer -> {reward, correct, reason, ...}
ADDED_COLUMNS: dict[str, ColumnKind] = {"reward": "float64", "correct": "bool", "scores": "json"}
#: fact of a scorer that is compared up to rounding: rewards of known answers
PROBES = "probe_rewards"
#: largest difference between two runs with one model, as a share of the range of those rewards
PROBE_TOLERANCE = 0.01


class ScorerSettings(Settings):
    """One entry of ``scorers``; keys other than ``domains`` are options of the scorer."""

    model_config = ConfigDict(extra="allow")

    domains: list[str] | None = Field(None, description="domains to score; default: what the scorer is made for")


class ScoreConfig(Settings):
    """Keys of the YAML file of ``fusion score``."""

    MOVED = {"unit_rows": "now batch_rows"}

    responses: str | list[str] = Field(
        min_length=1,
        description="folder of responses, also of scored ones for other scorers; or .jsonl or .parquet files, or "
        "hf:ORG/NAME",
    )
    out: str = Field(description="folder of the scored responses")
    scorers: dict[str, ScorerSettings] = Field(min_length=1, description="name of a scorer -> domains and its options")
    limit: int | None = Field(None, ge=1, description="score only the first N responses")
    batch_rows: int = Field(256, ge=1, description="responses of a batch, which is scored and committed together")
    on_unusable: Literal["raise", "skip"] = Field(
        "raise", description="rows of files that are no responses: raise, or skip and report"
    )


@dataclass(frozen=True)
class ScoreReport:
    """Counts of one run.

    Attributes:
        out: the folder of scored responses.
        scored: rows written by this run.
        present: rows that an earlier run has scored and that are still up to date.
        unscored: rows written by this run that no scorer takes.
        renewed: rows that an earlier run has scored and this one again, because the responses have changed.
        skipped: place of a row of a file -> why it was left out (``on_unusable: skip`` only).
    """

    out: Path
    scored: int
    present: int
    unscored: int
    renewed: int = 0
    skipped: Mapping[str, str] = field(default_factory=dict)


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
        median_length: of the responses, in characters.
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
    """A scorer that was started, with its name and the domains that it scores."""

    name: str
    scorer: Scorer
    domains: frozenset[str] | None

    def takes(self, row: Row) -> bool:
        return self.domains is None or row["domain"] in self.domains


def score_responses(config: ScoreConfig) -> ScoreReport:
    """Score a folder or files of responses.

    Raises:
        ConfigError: a scorer's options are wrong, or the folder lacks a column.
        DataError: a row of a file is wrong.
        MismatchError: ``out`` holds rows of other scorers, settings or prompts.
        ScoringError: a scorer cannot work at all (missing package, model or isolation).
    """
    responses = open_responses(config.responses, config.on_unusable)
    if Path(config.out).resolve() == Path(responses.path).resolve():
        raise ConfigError(
            f"out: expected another folder than that of the responses, got {config.out!r} for both; name a new folder"
        )
    with ExitStack() as stack:
        running = [_start(name, settings, stack) for name, settings in config.scorers.items()]
        writer = stack.enter_context(RowWriter(config.out, _manifest(Path(config.out), responses, running)))
        renewed = _drop_outdated(responses, writer, config.scorers)
        whole = any(getattr(one.scorer, "by_prompt", False) for one in running)
        groups, again = _unfinished_prompts(responses, writer) if whole else (_missing(responses, writer), 0)
        renewed += again
        present = writer.manifest.rows
        scored = unscored = 0
        progress = stack.enter_context(meter("score", config.limit or len(responses), present, unit="responses"))
        while batch := _next_batch(groups, config, present + scored):
            for row, results in zip(batch, _score_batch(batch, running), strict=True):
                writer.write(_merge(row, results))
                unscored += not results
            # One shard per batch: a killed run loses one batch at most.
            writer.flush()
            scored += len(batch)
            progress.advance(len(batch))
        if next(groups, None) is None:
            writer.finish()
    skipped = responses.unusable if isinstance(responses, ResponseFiles) else {}
    return ScoreReport(Path(config.out), scored, present, unscored, renewed, skipped)


def _missing(responses: Responses, writer: RowWriter) -> Iterator[list[dict[str, Any]]]:
    """Yield each response that is not scored yet, as a group of its own."""
    return ([row] for row in responses if not writer.holds(key_of(row, responses.manifest)))


def _unfinished_prompts(responses: Responses, writer: RowWriter) -> tuple[Iterator[list[dict[str, Any]]], int]:
    """Return the responses to each prompt that is not scored as a whole, and how many rows are scored again for it.

    What was scored of such a prompt was compared with less than there is now.
    """
    prompts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in responses:
        prompts[row["prompt_id"]].append(row)
    keys = {prompt: {key_of(row, responses.manifest) for row in rows} for prompt, rows in prompts.items()}
    unfinished = {prompt for prompt, found in keys.items() if not all(map(writer.holds, found))}
    partly = {key for prompt in unfinished for key in keys[prompt] if writer.holds(key)}
    if partly:
        writer.drop(partly)
    return (rows for prompt, rows in prompts.items() if prompt in unfinished), len(partly)


def _next_batch(groups: Iterator[list[dict[str, Any]]], config: ScoreConfig, done: int) -> list[dict[str, Any]]:
    """Return the responses of the next batch; groups stay whole, also where that is more than was asked for."""
    batch: list[dict[str, Any]] = []
    most = config.batch_rows if config.limit is None else min(config.batch_rows, config.limit - done)
    while len(batch) < most and (group := next(groups, None)):
        batch += group
    return batch


def _drop_outdated(responses: Responses, writer: RowWriter, scorers: Iterable[str]) -> int:
    """Remove scored rows whose responses have changed since, with a message; return their number."""
    if not writer.manifest.rows:
        return 0
    # Not a second set of as many keys.
    changed = outdated(responses, open_rows(writer.path), scorers, writer.index)
    if changed:
        columns = Counter(name for names in changed.values() for name in names)
        key = next(iter(changed))
        say(
            f"{len(changed)} rows of {writer.path} are scored again, because the responses have changed: "
            f"{', '.join(f'{name} in {count}' for name, count in columns.items())}. The first: "
            + ", ".join(f"{name} {value!r}" for name, value in zip(responses.manifest.key, key, strict=True)),
            stderr=True,
        )
        writer.drop(changed)
    return len(changed)


def summarize(rows: Iterable[Row]) -> dict[tuple[str, str], GroupSummary]:
    """Return (domain, source) -> accuracy, rewards and lengths; reads the rows once and keeps only numbers."""
    groups: dict[tuple[str, str], _Group] = defaultdict(_Group)
    for row in rows:
        groups[row["domain"], row["source"]].add(row)
    return {key: group.summary() for key, group in sorted(groups.items())}


@dataclass
class _Group:
    """Numbers of the rows of one group, 16 bytes a row."""

    verdicts: Counter[bool | None] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    rewards: "array[float]" = field(default_factory=lambda: array("d"))
    lengths: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, row: Row) -> None:
        self.verdicts[row["correct"]] += 1
        self.lengths.append(len(row["response"] or ""))
        if row["reward"] is not None:
            self.rewards.append(row["reward"])
        if (reason := _reason(row)) is not None:
            self.reasons[reason] += 1

    def summary(self) -> GroupSummary:
        return GroupSummary(
            responses=len(self.lengths),
            correct=self.verdicts[True],
            judged=self.verdicts[True] + self.verdicts[False],
            reasons=dict(self.reasons.most_common()),
            reward=mean(self.rewards) if self.rewards else None,
            mean_length=fmean(self.lengths),
            median_length=median(self.lengths),
        )


def _reason(row: Row) -> str | None:
    """Return why no scorer gave a result; None if one did."""
    for result in (row["scores"] or {}).values():
        if result.get("reason") and result.get("correct") is None and result.get("reward") is None:
            return str(result["reason"])
    return None


def _start(name: str, settings: ScorerSettings, stack: ExitStack) -> _Running:
    try:
        scorer: Scorer = lookup("scorers", name)(**(settings.model_extra or {}))
    except TypeError as error:
        # Python's own message names the option that the scorer does not have.
        raise ConfigError(
            f"scorers.{name}: expected the options of docs/responses.md, got {settings.model_extra}: {error}. Correct "
            "or remove it."
        ) from error
    stack.callback(scorer.close)
    return _Running(name, scorer, frozenset(settings.domains) if settings.domains is not None else scorer.domains)


def _manifest(out: Path, responses: Responses, running: Sequence[_Running]) -> RowManifest:
    made_by = {
        one.name: {"domains": None if one.domains is None else sorted(one.domains), **one.scorer.facts}
        for one in running
    }
    former = _former_scorers(out)
    for name, facts in made_by.items():
        made_by[name] = _settled(facts, former.get(name, {}))
        _check_former(out, name, made_by[name], former.get(name))
    # A scored folder may be scored by further scorers: the facts of earlier ones stay.
    before = responses.manifest.facts
    return RowManifest(
        stage="scored",
        columns=responses.manifest.columns | ADDED_COLUMNS,
        key=responses.manifest.key,
        facts={**before, "scorers": {**before.get("scorers", {}), **made_by}},
        provenance={"responses": str(responses.path)},
    )


def _former_scorers(out: Path) -> Mapping[str, Any]:
    """Return the facts of the scorers that ``out`` was made with; none where it holds no rows yet."""
    try:
        former = RowManifest.load(out).facts.get("scorers", {})
    except StoreError:
        return {}  # nothing there, or nothing that can be continued: the writer says what is wrong
    return former if isinstance(former, dict) else {}


def _settled(facts: dict[str, Any], former: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts, with the earlier run's rewards of known answers where this run's differ by rounding only.

    The files of a served model are not here, so its rewards of a few texts are its fingerprint. They change in the last
    digits with the size of a server's batches; a model that was trained changes them more.
    """
    now, before = facts.get(PROBES), former.get(PROBES)
    if not isinstance(now, list) or not isinstance(before, list) or len(now) != len(before):
        return facts
    given = [reward for reward in before if reward is not None]
    tolerance = PROBE_TOLERANCE * (max(given) - min(given)) if given else 0.0
    same = all(
        (old is None) == (new is None) and (old is None or abs(old - new) <= tolerance)
        for old, new in zip(before, now, strict=True)
    )
    return facts | {PROBES: before} if same else facts


def _check_former(out: Path, name: str, facts: Mapping[str, Any], former: Mapping[str, Any] | None) -> None:
    """Refuse to add to rows of the same scorer with other settings or another model; name what differs.

    Raises:
        MismatchError: a fact differs.
    """
    if former is None:
        return
    wrong = [
        f"{key}: the folder has {former.get(key)!r:.200}, this run {facts.get(key)!r:.200}"
        for key in sorted({*former, *facts})
        if json.dumps(former.get(key), sort_keys=True, default=list)
        != json.dumps(facts.get(key), sort_keys=True, default=list)
    ]
    if wrong:
        raise MismatchError(
            f"{out} was scored by {name!r} with other settings or another model: {'; '.join(wrong)}. Scores of the two "
            "cannot be compared: restore what the folder was made with, or score all responses into a new folder `out`."
        )


def _score_batch(batch: Sequence[Row], running: Sequence[_Running]) -> list[dict[str, Score]]:
    """Return scorer -> score for each row of a batch."""
    results: list[dict[str, Score]] = [{} for _ in batch]
    for one in running:
        places = [place for place, row in enumerate(batch) if one.takes(row)]
        scores = one.scorer.score([batch[place] for place in places]) if places else []
        if len(scores) != len(places):
            raise ScoringError(
                f"scorers.{one.name}: expected one score for each of {len(places)} responses, got {len(scores)}; the "
                "scorer is wrong, report it to the plugin that registers it"
            )
        for place, score in zip(places, scores, strict=True):
            results[place][one.name] = _with_finite_reward(score)
    return results


def _with_finite_reward(score: Score) -> Score:
    """Return the score, without a reward where that is no finite number: the reason says so, and is counted."""
    if score.reward is None:
        return score
    try:
        reward = float(score.reward)  # an integer of a plugin, too
    except OverflowError:
        reward = math.inf
    if math.isfinite(reward):
        return replace(score, reward=reward)
    return replace(score, reward=None, reason=f"the reward is {reward}")


def _merge(row: Row, results: Mapping[str, Score]) -> dict[str, Any]:
    """Return a row with its scores, beside those that earlier scorers gave it."""
    scores = {
        name: {"reward": score.reward, "correct": score.correct, "reason": score.reason, **score.details}
        for name, score in results.items()
    }
    return {
        **row,
        "reward": _only("reward", row, results),
        "correct": _only("correct", row, results),
        "scores": {**(row.get("scores") or {}), **scores},
    }


def _only(field: str, row: Row, results: Mapping[str, Score]) -> Any:
    """Return the reward or verdict that one of the scorers gave, else the one that the row has already."""
    given = {name: getattr(score, field) for name, score in results.items() if getattr(score, field) is not None}
    if len(given) > 1:
        raise ScoringError(
            f"prompt {row['prompt_id']!r}: expected at most one {field}, but scorers {', '.join(given)} all give a "
            f"{field}. Let only one of them score the domain {row['domain']!r}: set `domains` of the others."
        )
    return next(iter(given.values()), row.get(field))
