"""The page of `fusion report` about a folder of scored responses.

It shows how often each source is right and how sure that is, the rewards, the gaps of the pairs that would be made with
the window that suits them, and some verdicts drawn at random, to look through.
"""

import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_plugins.core.preferences.candidates import Candidate, as_candidate, clean
from fusion_plugins.core.preferences.gaps import PUBLISHED_SCALE, GapWindow, Proposal, propose_window, reward_scales
from fusion_plugins.core.preferences.intervals import wilson
from fusion_plugins.core.preferences.pairs import pairs_per_prompt, same_source
from fusion_plugins.core.preferences.verdict import may_be_forged
from fusion_plugins.core.text.messages import conversation_text
from fusion_plugins.errors import DataError
from fusion_plugins.page import COLOURS, bin_edges, new_figure, plot_name, plot_unit, render_page, svg
from fusion_plugins.scoring.base import Row
from fusion_plugins.scoring.responses import response_name
from fusion_plugins.scoring.score import GroupSummary, summarize
from fusion_plugins.store import open_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: characters of a prompt, of the start and the end of a response, and of one detail that the page shows
PROMPT_SHOWN, START_SHOWN, END_SHOWN, DETAIL_SHOWN = 1500, 500, 1500, 400
#: sources that a picture has a line for
MOST_LINES = len(COLOURS)
#: name in a scorer's details -> what the page calls it, in the order of the page
_DETAILS = {
    "answer": "extracted",
    "gold": "gold",
    "found": "found",
    "rule": "rule",
    "format": "format",
    "tests": "tests",
    "trust": "trust",
    "error": "error",
    "reason": "reason",
}


@dataclass(frozen=True)
class SampledVerdict:
    """One verdict that the page shows in full.

    Attributes:
        name: prompt, source and index.
        scorer: who gave it.
        correct: the verdict.
        details: what was extracted, the gold answer, the rule, ... -> text.
        prompt: the text of the prompt, cut.
        response: the response, cut in its middle.
    """

    name: str
    scorer: str
    correct: bool
    details: Mapping[str, str]
    prompt: str
    response: str


@dataclass(frozen=True)
class ScoredReport:
    """What the page shows.

    Attributes:
        groups: (domain, source) -> counts.
        scales: models that gave the rewards; empty where nobody says.
        rewards: source -> its rewards.
        gaps: rewards of chosen minus rejected answers, of all pairs of one source that have one.
        proposal: the window that suits them; None without gaps.
        verdicts: verdicts drawn at random.
        judged: rows with a verdict.
        inside: those of them whose checks ran inside the program, which can forge them.
        seed: of the draw.
    """

    groups: Mapping[tuple[str, str], GroupSummary]
    scales: Sequence[str]
    rewards: Mapping[str, Sequence[float]]
    gaps: Sequence[float]
    proposal: Proposal | None
    verdicts: Sequence[SampledVerdict]
    judged: int
    inside: int
    seed: int


def examine_scored(folder: Path, *, seed: int = 0, verdicts: int = 50) -> ScoredReport:
    """Read a folder of scored responses.

    Args:
        folder: what `fusion score` wrote.
        seed: decides which verdicts are drawn.
        verdicts: how many.

    Raises:
        StoreError: the folder holds no rows, or is damaged.
        DataError: its rows are not scored, a reward is not finite, or candidates of one prompt disagree.
    """
    rows = open_rows(folder)
    if missing := [name for name in ("reward", "correct", "scores") if name not in rows.manifest.columns]:
        raise DataError(
            f"{folder}: expected scored responses, got rows without {', '.join(missing)}. Give the folder that `fusion "
            "score` wrote."
        )
    drawn, judged = _draw((row for row in rows if row["correct"] is not None), verdicts, random.Random(seed))
    rewards: dict[str, list[float]] = defaultdict(list)
    candidates = []
    inside = 0
    for number, row in enumerate(rows):
        inside += may_be_forged(row["scores"])
        candidates.append(as_candidate(_light(row), number))
        if row["reward"] is not None:
            rewards[row["source"]].append(row["reward"])
    gaps = gaps_of(candidates)
    return ScoredReport(
        groups=summarize(rows),
        scales=sorted(reward_scales(candidates)),
        rewards=dict(sorted(rewards.items())),
        gaps=gaps,
        proposal=propose_window(gaps),
        verdicts=[_shown(row) for row in drawn],
        judged=judged,
        inside=inside,
        seed=seed,
    )


def gaps_of(candidates: Iterable[Candidate]) -> list[float]:
    """Return the reward gaps that a window decides about: of the pairs of one source, code left out as published."""
    window = GapWindow(None, None)
    pairs, _ = pairs_per_prompt(clean(candidates), same_source, window, per_prompt=1 << 30)
    return [pair.gap for pair in pairs if pair.gap is not None and pair.chosen.domain not in window.exempt]


def render_scored_report(folder: Path, *, seed: int = 0, verdicts: int = 50) -> str:
    """Return the page for a folder of scored responses; see :func:`examine_scored`.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
    """
    return render_page("scored.html", scored_values(folder, seed=seed, verdicts=verdicts))


def scored_values(folder: Path, *, seed: int = 0, verdicts: int = 50, level: int = 2) -> dict[str, Any]:
    """Return what the template ``parts/scored.html`` names; see :func:`examine_scored`.

    Args:
        folder: what `fusion score` wrote.
        seed: decides which verdicts are drawn.
        verdicts: how many.
        level: of the headings.
    """
    report = examine_scored(folder, seed=seed, verdicts=verdicts)
    groups = [_line(domain, source, group) for (domain, source), group in report.groups.items()]
    reasons: Counter[tuple[str, str]] = Counter()
    for (domain, _), group in report.groups.items():
        for reason, count in group.reasons.items():
            reasons[domain, reason] += count
    return {
        "level": level,
        "name": folder.resolve().name,
        "report": report,
        "responses": sum(group.responses for group in report.groups.values()),
        "groups": groups,
        "reasons": reasons.most_common(20),
        "more_reasons": max(0, len(reasons) - 20),
        "rewards": svg(_draw_rewards(report), "Rewards by source") if report.rewards else None,
        "gaps": svg(_draw_gaps(report), "Reward gaps of the pairs of one source") if report.proposal else None,
        "published_scale": any(PUBLISHED_SCALE in scale.lower() for scale in report.scales),
        "window": GapWindow(),
    }


def _draw(rows: Iterable[Row], count: int, draw: random.Random) -> tuple[list[Row], int]:
    """Return rows drawn with equal chance, in a single pass, and the number of all."""
    kept: list[Row] = []
    seen = 0
    for seen, row in enumerate(rows, start=1):
        if len(kept) < count:
            kept.append(row)
        elif (place := draw.randrange(seen)) < count:
            kept[place] = row
    return kept, seen


def _light(row: Row) -> dict[str, Any]:
    """Return a row for the choice of pairs: texts, which are large, are replaced by what tells them apart."""
    found = {name: row[name] for name in ("prompt_id", "source", "index", "domain", "reward", "correct")}
    found |= {"prompt": row["prompt_id"], "response": _digest(row["response"] or ""), "scores": row["scores"]}
    return found | {name: row.get(name) for name in ("finish_reason",)}


def _digest(text: str) -> str:
    return blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=16).hexdigest() if text.strip() else ""


def _shown(row: Row) -> SampledVerdict:
    scores: Mapping[str, Mapping[str, Any]] = row["scores"] or {}
    scorer = next((name for name, result in scores.items() if result.get("correct") is not None), "another tool")
    result = scores.get(scorer, {})
    details = {label: _text(result.get(name)) for name, label in _DETAILS.items() if result.get(name) is not None}
    if "gold" not in details and row.get("reference") is not None:
        details["gold"] = _text(row["reference"])
    return SampledVerdict(
        name=f"{response_name(row)}, {row['domain']}",
        scorer=scorer,
        correct=bool(row["correct"]),
        details=details,
        prompt=_cut(conversation_text(row["prompt"]), PROMPT_SHOWN, 0),
        response=_cut(row["response"] or "", START_SHOWN, END_SHOWN),
    )


def _text(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        value = ", ".join(f"{count} {part}" for part, count in Counter(value).items())
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _cut(text, DETAIL_SHOWN, 0)


def _cut(text: str, start: int, end: int) -> str:
    left_out = len(text) - start - end
    if left_out <= 0:
        return text
    return f"{text[:start]} … [{left_out:,} characters] … {text[len(text) - end :] if end else ''}".rstrip()


def _line(domain: str, source: str, group: GroupSummary) -> dict[str, Any]:
    """Return the texts of one line of the table."""
    low, high = wilson(group.correct / group.judged, group.judged) if group.judged else (math.nan, math.nan)
    return {
        "domain": domain,
        "source": source,
        "responses": f"{group.responses:,}",
        "accuracy": f"{group.correct / group.judged:.1%}" if group.judged else "–",
        "interval": f"{low:.1%} to {high:.1%}" if group.judged else "–",
        "judged": f"{group.judged:,}",
        "unjudged": f"{group.responses - group.judged:,}",
        "reward": "–" if group.reward is None else f"{group.reward:.4g}",
        "length": f"{group.mean_length:,.0f} ({group.median_length:,.0f})",
    }


def _draw_rewards(report: ScoredReport) -> "Figure":
    figure = new_figure(3.6, 3.0)
    panel = figure.subplots()
    largest = sorted(report.rewards, key=lambda source: -len(report.rewards[source]))[:MOST_LINES]
    shown = {source: report.rewards[source] for source in sorted(largest)}
    unit, named = plot_unit(reward for rewards in shown.values() for reward in rewards)
    edges = bin_edges(reward / unit for rewards in shown.values() for reward in rewards)
    for colour, (source, rewards) in zip(COLOURS, shown.items(), strict=False):
        weights = [1 / len(rewards)] * len(rewards)
        panel.hist(
            [reward / unit for reward in rewards],
            bins=edges,
            weights=weights,
            histtype="step",
            color=colour,
            label=plot_name(source, 22),
        )
    _plain(panel, f"reward{named}", "share of the source's responses")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _draw_gaps(report: ScoredReport) -> "Figure":
    assert report.proposal is not None
    figure = new_figure(3.6, 3.0)
    panel = figure.subplots()
    unit, named = plot_unit(report.gaps)
    gaps = [gap / unit for gap in report.gaps]
    panel.hist(gaps, bins=bin_edges(gaps), color=COLOURS[0])
    low, high = report.proposal.limits
    panel.axvspan(low / unit, high / unit, color=COLOURS[1], alpha=0.25, label="proposed window")
    _plain(panel, f"reward of chosen minus rejected{named}", "pairs")
    figure.legend(loc="outside lower center", fontsize=9, frameon=False)
    return figure


def _plain(panel: Any, across: str, up: str) -> None:
    panel.set_xlabel(across, fontsize=9)
    panel.set_ylabel(up, fontsize=9)
    panel.tick_params(labelsize=9)
    panel.spines[["top", "right"]].set_visible(False)
