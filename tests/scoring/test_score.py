"""``fusion score`` as users run it: real folders, the real command line, killed and continued."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import fusion_plugins.scoring.score as score_module
from fusion_plugins.config import load_config
from fusion_plugins.errors import ConfigError, FusionError, MismatchError, ScoringError, StoreError
from fusion_plugins.plugins import get_registry
from fusion_plugins.scoring.base import Score
from fusion_plugins.scoring.reward import RewardOptions
from fusion_plugins.scoring.score import ScoreConfig, score_responses, summarize
from fusion_plugins.store import open_rows


def config(responses, out, scorers=None, **more):
    return ScoreConfig(responses=str(responses), out=str(out), scorers=scorers or {"math": {"workers": 1}}, **more)


def test_scored_rows_keep_everything_and_add_verdict_and_reasons(responses, tmp_path, one_scorer):
    report = score_responses(config(responses, tmp_path / "scored"))
    assert (report.scored, report.present, report.unscored) == (5, 0, 1)
    scored = open_rows(tmp_path / "scored")
    assert scored.manifest.complete
    assert scored.manifest.stage == "scored"
    assert scored.manifest.facts["prompts_fingerprint"] == "abc"
    assert scored.manifest.facts["scorers"]["math"]["domains"] == ["math"]
    assert "math_verify" in scored.manifest.facts["scorers"]["math"]
    before = open_rows(responses)
    assert scored.keys() == before.keys()
    assert all(
        {name: row[name] for name in before.manifest.columns} == before[key]
        for key, row in zip(scored.keys(), scored, strict=True)
    )
    assert [row["correct"] for row in scored] == [True, False, True, None, None]
    unreadable = scored["p2", "b", 0, "f"]
    assert "cannot be read" in unreadable["scores"]["math"]["reason"]
    assert scored["zh", "q", 0, "f"]["scores"] == {}


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_of_a_plugin_that_is_not_finite_is_a_reason_and_no_reward(responses, tmp_path, monkeypatch, reward):
    plugin = SimpleNamespace(domains=None, facts={}, close=lambda: None)
    plugin.score = lambda rows: [Score(reward=reward if row["source"] == "a" else 1e308) for row in rows]
    monkeypatch.setattr(score_module, "lookup", lambda kind, name: lambda **options: plugin)
    score_responses(config(responses, tmp_path / "scored", {"plugin": {}}))
    rows = list(open_rows(tmp_path / "scored"))
    assert [row["reward"] for row in rows] == [None, None, 1e308, 1e308, 1e308]
    assert rows[0]["scores"]["plugin"]["reason"] == f"the reward is {reward}"
    groups = summarize(rows)
    assert groups["math", "a"].reasons == {f"the reward is {reward}": 2}
    assert groups["math", "b"].reward == 1e308


def test_a_second_run_adds_nothing_and_a_longer_folder_is_continued(responses, tmp_path, one_scorer):
    score_responses(config(responses, tmp_path / "scored", limit=2))
    assert not open_rows(tmp_path / "scored").manifest.complete
    report = score_responses(config(responses, tmp_path / "scored"))
    assert (report.scored, report.present) == (3, 2)
    assert score_responses(config(responses, tmp_path / "scored")).scored == 0
    assert len(set(open_rows(tmp_path / "scored").keys())) == 5


def test_a_folder_made_with_other_settings_is_refused(responses, tmp_path):
    score_responses(config(responses, tmp_path / "scored"))
    with pytest.raises(MismatchError, match="marked_only"):
        score_responses(config(responses, tmp_path / "scored", {"math": {"marked_only": True}}))


def test_scores_of_an_earlier_scorer_stay_when_another_scores_the_scored_folder(responses, tmp_path, one_scorer):
    first = score_responses(config(responses, tmp_path / "first", {"math": {"workers": 1, "domains": ["physics"]}}))
    assert first.unscored == 5
    score_responses(config(responses, tmp_path / "second"))
    score_responses(config(tmp_path / "second", tmp_path / "third", {"math": {"workers": 1, "domains": ["physics"]}}))
    assert [row["correct"] for row in open_rows(tmp_path / "third")] == [True, False, True, None, None]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scorers": {"maths": {}}}, FusionError, "no scorer named 'maths'.*math"),
        (
            {"scorers": {"math": {"timeouts": 3}}},
            ConfigError,
            "scorers.math: expected the options of .*, got .*timeouts.*remove it",
        ),
        ({"responses": "nowhere"}, StoreError, "nowhere"),
        ({"out": "same"}, ConfigError, "another folder"),
    ],
)
def test_wrong_settings_are_named(responses, tmp_path, change, error, message):
    settings = {"responses": responses, "out": str(tmp_path / "scored"), "scorers": {"math": {}}} | change
    if settings["out"] == "same":
        settings["out"] = responses
    with pytest.raises(error, match=message):
        score_responses(ScoreConfig.model_validate(settings))


def test_a_folder_without_prompts_is_refused(responses, tmp_path, write_responses):
    columns = {name: kind for name, kind in open_rows(responses).manifest.columns.items() if name != "prompt"}
    folder = write_responses(tmp_path / "bare", [], columns)
    with pytest.raises(ConfigError, match="prompt is missing"):
        score_responses(config(folder, tmp_path / "scored"))


def test_two_scorers_that_judge_the_same_response_are_refused(responses, tmp_path, one_scorer):
    with pytest.raises(ScoringError, match="math, again all give a correct"):
        score_responses(config(responses, tmp_path / "scored", {"math": {}, "again": {}}))


def test_summary_has_accuracy_lengths_and_reasons_per_domain_and_source(responses, tmp_path, one_scorer):
    score_responses(config(responses, tmp_path / "scored"))
    summary = summarize(open_rows(tmp_path / "scored"))
    a, b = summary["math", "a"], summary["math", "b"]
    assert (a.responses, a.correct, a.judged, a.reward) == (2, 1, 2, None)
    assert a.mean_length == (len("\\boxed{18}") + len("It is 19.")) / 2
    assert (b.responses, b.correct, b.judged) == (2, 1, 1)
    assert b.reasons == {"the response's answer cannot be read": 1}
    assert summary["chinese", "q"].judged == 0


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "examples").rglob("score*.yml")), ids=str)
def test_shipped_settings_are_valid_and_name_scorers_that_exist(path):
    settings = load_config(ScoreConfig, path, {})
    assert set(settings.scorers) <= set(get_registry("scorers"))
    reward = settings.scorers.get("reward")
    assert reward is None or RewardOptions.model_validate(reward.model_extra)


def test_recipes_are_found():
    assert (Path(__file__).parents[2] / "examples" / "fusechat3" / "score.yml").exists()


def start(*arguments):
    code = "import sys; from fusion_plugins.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "score", *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for_rows(folder, count, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if len(open_rows(folder)) >= count:
                return
        except StoreError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"never saw {count} rows; {process.communicate()}")


@pytest.mark.slow
def test_a_killed_run_is_continued_without_loss_or_repetition(tmp_path, response, write_responses):
    # Towers of powers take all the time that they are given, so that both stops come in the middle.
    towers = (8, 14)
    texts = ["\\boxed{9^{9^{9^{9}}}}" if n in towers else f"\\boxed{{{n}}}" for n in range(24)]
    folder = write_responses(
        tmp_path / "responses", [response(f"p{n}", "a", 0, text, reference=str(n)) for n, text in enumerate(texts)]
    )
    settings = {"responses": folder, "batch_rows": 3, "scorers": {"math": {"workers": 1, "timeout": 4}}}
    (tmp_path / "score.yml").write_text(yaml.safe_dump(settings))
    arguments = ["-c", tmp_path / "score.yml", "--out", tmp_path / "scored"]
    for stop, at_least in ((signal.SIGKILL, 6), (signal.SIGINT, 12)):
        process = start(*arguments)
        wait_for_rows(tmp_path / "scored", at_least, process)
        os.kill(process.pid, stop)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
    assert "run the same command again" in errors
    done = len(open_rows(tmp_path / "scored"))
    assert 12 <= done < 24
    last = start(*arguments)
    output, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    assert f"{24 - done} responses scored" in " ".join(output.split())
    scored = open_rows(tmp_path / "scored")
    assert sorted(scored.keys()) == sorted(open_rows(folder).keys())
    assert scored.manifest.complete
    assert [row["correct"] for row in scored] == [None if n in towers else True for n in range(24)]
