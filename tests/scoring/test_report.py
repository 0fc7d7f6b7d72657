"""The page of `fusion report` about scored responses."""

import html
import math
import random
import re
import sys

import numpy as np
import pytest
from scored_rows import COLUMNS, write
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.core.preferences.gaps import GapWindow
from fusion_plugins.core.preferences.intervals import wilson
from fusion_plugins.core.preferences.pairs import build_pairs
from fusion_plugins.doctor.responses import examine_responses
from fusion_plugins.doctor.responses_page import render_responses_page
from fusion_plugins.errors import DataError
from fusion_plugins.scoring.report import examine_scored, render_scored_report
from fusion_plugins.store import open_rows

HOSTILE = "</pre><script>alert(1)</script>\x1b[2J{{ name }}$x$‮"


def scored_row(prompt, source, index, draw):
    right = draw.random() < {"a": 0.8, "b": 0.4}[source]
    judged = prompt % 10 != 0
    math = {
        "reward": None,
        "correct": right if judged else None,
        "reason": None if judged else "no gold answer",
        "answer": "18" if right else HOSTILE,
        "gold": "18",
        "rule": "number",
        "found": "boxed",
        "trust": "outside",
    }
    reward = draw.gauss(3 if right else 0, 2)
    return {
        "prompt_id": f"p{prompt}",
        "source": source,
        "index": index,
        "prompt": HOSTILE if prompt == 1 else f"What is {prompt}?",
        "response": f"{HOSTILE} {prompt}{source}{index}" + "word " * draw.randint(1, 800),
        "domain": "math",
        "reference": "18",
        "reward": reward,
        "correct": math["correct"],
        "scores": {"math": math, "reward": {"reward": reward, "correct": None, "reason": None, "model": "skywork-x"}},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    draw = random.Random(0)
    rows = [scored_row(prompt, source, n, draw) for prompt in range(40) for source in "ab" for n in range(3)]
    zh = [
        row | {"domain": "chinese", "prompt_id": f"zh{n}", "correct": None, "reward": None, "scores": {}}
        for n, row in enumerate(rows[:5])
    ]
    return write(tmp_path_factory.mktemp("report") / "scored", rows + zh)


def test_counts_intervals_and_gaps_are_those_of_the_rows(folder):
    report, rows = examine_scored(folder), list(open_rows(folder))
    a = [row for row in rows if row["source"] == "a" and row["domain"] == "math"]
    group = report.groups["math", "a"]
    assert (group.responses, group.judged) == (120, 108)
    assert group.correct == sum(row["correct"] is True for row in a)
    assert group.reasons == {"no gold answer": 12}
    assert report.judged == 216
    pairs = build_pairs(
        [{name: value for name, value in row.items() if name != "scores"} for row in rows],
        window=GapWindow(None, None),
        per_prompt=99,
    )
    assert sorted(report.gaps) == pytest.approx(sorted(pair.gap for pair in pairs))
    assert report.proposal.limits == pytest.approx(tuple(np.quantile(report.gaps, (0.2, 0.9))))
    assert report.scales == ["skywork-x"]


@pytest.mark.parametrize(("right", "judged"), [(0, 3), (3, 3), (50, 100), (7, 9), (1, 1), (999, 1000)])
def test_an_interval_is_that_of_wilson(right, judged):
    """Its ends are where the share differs from the interval's end by 1.96 standard errors of that end."""
    low, high = wilson(right / judged, judged)
    for end in (low, high):
        if 0 < end < 1:
            assert abs(right / judged - end) == pytest.approx(1.959964 * (end * (1 - end) / judged) ** 0.5, rel=1e-6)
    assert 0 <= low <= right / judged <= high <= 1


def test_verdicts_are_drawn_with_a_seed_and_say_what_was_compared(folder):
    first, same, other = (examine_scored(folder, seed=seed).verdicts for seed in (0, 0, 1))
    assert first == same != other
    assert len(first) == len({verdict.name for verdict in first}) == 50
    assert all(verdict.details["gold"] == "18" and verdict.details["rule"] == "number" for verdict in first)
    assert {"extracted", "found", "trust"} <= set(first[0].details)
    # As often from the end of the folder as from its start.
    places = [
        int(re.match(r"p(\d+),", verdict.name)[1])
        for seed in range(8)
        for verdict in examine_scored(folder, seed=seed).verdicts
    ]
    assert 17 < np.mean(places) < 23
    assert len(examine_scored(folder, verdicts=3).verdicts) == 3
    assert len(examine_scored(folder, verdicts=1000).verdicts) == 216


def test_the_page_is_self_contained_and_texts_of_models_are_data(folder):
    page = render_scored_report(folder)
    assert "<script" not in page.lower()
    assert "\x1b" not in page
    assert "‮" not in page
    assert html.escape("</pre><script>alert(1)</script>") in page
    # Nothing is loaded: every address is inside the page.
    assert set(re.findall(r'(?:href|src)="([^"#]+)', page)) == set()
    assert page.count("<svg") == 2
    assert page.count('class="card"') == 50
    assert "gap_unit: quantile" in page
    assert "these rewards are of another model" in page
    assert "95 % interval" in page


def test_the_command_writes_the_page_and_its_options_are_settings(folder, tmp_path):
    out = tmp_path / "page.html"
    result = CliRunner().invoke(
        app, ["report", str(folder), "--out", str(out), "--set", "verdicts=5", "--set", "seed=3"]
    )
    assert result.exit_code == 0, result.output
    assert out.read_text().count('class="card"') == 5


def test_a_folder_without_rewards_or_without_verdicts_has_a_page(tmp_path):
    draw = random.Random(1)
    rows = [scored_row(prompt, "a", n, draw) for prompt in range(1, 4) for n in range(2)]
    bare = [row | {"reward": None, "scores": {"math": row["scores"]["math"]}} for row in rows]
    page = render_scored_report(write(tmp_path / "verdicts", bare))
    assert "<svg" not in page
    assert "Reward-gap window" not in page
    page = render_scored_report(
        write(tmp_path / "rewards", [row | {"correct": None, "domain": "chat"} for row in rows])
    )
    assert "Verdicts to look through" not in page
    assert page.count("<svg") == 2
    assert render_scored_report(write(tmp_path / "empty", []))
    equal = [row | {"reward": 1.0} for row in rows]
    assert render_scored_report(write(tmp_path / "equal", equal))


def test_a_response_that_ended_before_its_first_word_is_an_empty_one(tmp_path):
    rows = [scored_row(1, source, 0, random.Random(0)) | {"response": None, "correct": False} for source in "ab"]
    write(tmp_path / "scored", rows)
    report = examine_scored(tmp_path / "scored")
    assert [verdict.response for verdict in report.verdicts] == ["", ""]
    assert {group.median_length for group in report.groups.values()} == {0}


def test_what_is_no_scored_folder_is_refused(tmp_path):
    columns = {name: kind for name, kind in COLUMNS.items() if name not in ("reward", "correct", "scores")}
    with pytest.raises(DataError, match="expected scored responses, got rows without reward, correct, scores"):
        render_scored_report(write(tmp_path / "responses", [], columns))
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(result.exception, DataError)
    assert "inside it responses (responses): give one of these" in str(result.exception)


@pytest.mark.parametrize(
    "rewards",
    [
        (1e308, -1e308),
        (sys.float_info.max, -sys.float_info.max, 0.0),
        (1e300, 1e301),
        (1e308, 1e308),
        (1e-300, 2e-300),
        (5e-324, 0.0),
        (0.1, math.nextafter(0.1, 1)),
        (1e16, 1e16 + 2),
        (-7, -7),
        (3, 1e18),
    ],
    ids=str,
)
def test_rewards_of_any_size_have_pictures(tmp_path, rewards):
    draw = random.Random(2)
    rows = [
        scored_row(prompt, source, n, draw) | {"correct": None, "domain": "chat", "reward": rewards[n % len(rewards)]}
        for prompt in range(2, 5)
        for source in "ab"
        for n in range(3)
    ]
    folder = write(tmp_path / "scored", rows)
    page = render_scored_report(folder)
    assert page.count("<svg") == (1 if len(set(rewards)) == 1 else 2)
    assert ("1e300" in page) == (max(map(abs, rewards)) > 1e300)
    doctor = render_responses_page(examine_responses(folder))
    assert doctor.count("<svg") == 1


def test_verdicts_that_a_program_can_forge_are_counted(folder, tmp_path):
    assert examine_scored(folder).inside == 0
    assert "fusion.min_trust" not in render_scored_report(folder)
    draw = random.Random(4)
    rows = [scored_row(prompt, "a", 0, draw) for prompt in range(11, 15)]
    for row in rows[:3]:
        row["scores"] = {"code": row["scores"]["math"] | {"trust": "inside"}}
    inside = write(tmp_path / "scored", rows)
    assert examine_scored(inside).inside == 3
    assert "3 of them have <code>trust: inside</code>" in render_scored_report(inside)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named(tmp_path, reward):
    draw = random.Random(3)
    rows = [scored_row(prompt, "a", n, draw) for prompt in (4, 5) for n in range(2)]
    rows[2] |= {"reward": reward}
    with pytest.raises(
        DataError, match=r"row 2 \(prompt 'p5', source 'a'\): expected a finite number as reward, got -?(nan|inf)"
    ):
        render_scored_report(write(tmp_path / "scored", rows))
