"""The lab: the world's problems, the statistics, the runner that resumes, and the page made from the results."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest

sys.path.append(str(Path(__file__).parents[1] / "lab"))

from fusion_lab.problems import Problem, answer_of, make_problems, score, sums_of
from fusion_lab.report import PAGE, fill, write_page
from fusion_lab.runner import QUESTIONS, RESULTS, Cell, Question, Work, _do, _finished, read_question
from fusion_lab.statistics import difference, holm, mean
from fusion_lab.world import SEEDS, Lab

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in QUESTIONS.glob("*.yml"))


# Problems


def test_every_sum_of_a_solution_is_right_and_follows_from_the_one_before():
    for problem in make_problems(300, seed=5):
        sums = sums_of(problem.solution)
        assert 1 <= len(sums) <= 2
        for left, sign, right, result in sums:
            assert int(result) == int(left) + int(right) * (1 if sign == "+" else -1)
            assert 1 <= int(result) <= 20
        assert all(before[3] == after[0] for before, after in zip(sums, sums[1:], strict=False))
        assert sums[-1][3] == problem.gold == answer_of(problem.solution)
        assert all(f" {number}" in problem.question for sum_ in sums[:1] for number in (sum_[0], sum_[2]))


def test_no_question_is_in_two_splits(tmp_path):
    lab = Lab("quick", tmp_path)
    questions = {split: {problem.question for problem in lab.problems(split)} for split in SEEDS}
    assert sum(map(len, questions.values())) == len(set().union(*questions.values()))


def problem(gold, sums):
    return Problem(f"Question {gold} {sums}", "\n".join([*sums, f"#### {gold}"]), gold)


@pytest.mark.parametrize(
    ("response", "answers", "chains"),
    [
        ("3 + 4 = 7\n#### 7", 1, 1),
        ("#### 7", 1, 0),  # the number alone
        ("2 + 5 = 7\n#### 7", 1, 0),  # other sums
        ("3 + 4 = 7\n7 - 0 = 7\n#### 7", 1, 0),  # one sum too many
        ("3 + 4 = 8\n#### 7", 1, 0),  # a wrong sum
        ("3 + 4 = 7\n#### 8", 0, 0),
        ("3 + 4 = 7", 0, 0),  # no answer
        ("", 0, 0),
    ],
)
def test_an_answer_is_told_from_a_chain(response, answers, chains):
    found = score([problem("7", ["3 + 4 = 7"])], [response])
    assert (found.answers, found.chains) == (answers, chains)


def test_luck_is_the_rate_over_all_other_problems():
    rng = random.Random(3)
    problems = [problem(str(rng.randint(1, 4)), []) for _ in range(12)]
    given = [rng.choice(["1", "2", "4", "9", None]) for _ in problems]
    responses = ["nothing" if answer is None else f"#### {answer}" for answer in given]
    pairs = [(a, p.gold) for i, a in enumerate(given) for j, p in enumerate(problems) if i != j]
    assert score(problems, responses).luck == pytest.approx(sum(a == gold for a, gold in pairs) / len(pairs))


def test_one_constant_answer_has_its_own_rate_as_luck_nearly():
    problems = make_problems(200, seed=9)
    found = score(problems, ["#### 5"] * len(problems))
    assert found.chains == 0
    assert found.luck == pytest.approx(found.answers, abs=1e-9)
    assert found.answers <= found.constant


# Statistics


def test_an_interval_is_students():
    found = mean([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3.0
    assert found.half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-5)
    assert found.clear
    assert not mean([-1.0, 1.0, 0.5]).clear
    assert math.isnan(mean([1.0]).half)
    assert not mean([1.0]).clear


def test_differences_are_paired_by_seed_and_seeds_of_one_side_do_not_count():
    table = pandas.DataFrame(
        [("a", 0, 1.0), ("a", 1, 5.0), ("a", 2, 9.0), ("b", 1, 4.0), ("b", 0, 0.5), ("b", 7, 100.0)],
        columns=["run", "seed", "bpb"],
    )
    found = difference(table, table["run"] == "a", table["run"] == "b", "bpb")
    assert (found.value, found.n) == (0.75, 2)


def test_holm_corrects_the_known_values_only():
    values = [mean([1.0, 1.1, 0.9]), mean([2.0]), mean([0.1, -0.1, 0.3])]
    corrected = holm(values)
    assert corrected[0] == pytest.approx(2 * values[0].p)
    assert math.isnan(corrected[1])
    assert corrected[2] == pytest.approx(max(values[2].p, corrected[0]))


# Questions and cells


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quick", [False, True])
def test_a_question_is_complete(name, quick):
    question = read_question(name, quick=quick)
    cells = list(question.choices())
    assert question.title
    assert question.hypotheses or "pilot" in name
    assert cells[0] == question.base
    assert len({Cell(question, factors, 0).name for factors in cells}) == len(cells)
    assert len(question.seeds) >= (1 if quick or "pilot" in name else 5)


def test_cells_are_the_base_sweeps_crosses_and_single_ones_each_once():
    question = Question(
        "q", "?", "r", [], [0], {"a": 1, "b": "x"},
        sweeps={"a": [1, 2]}, crosses=[{"a": [2, 3], "b": ["x", "y"]}], cells=[{"b": "z"}],
    )  # fmt: skip
    assert [tuple(factors.values()) for factors in question.choices()] == [
        *[(1, "x"), (2, "x"), (2, "y"), (3, "x"), (3, "y"), (1, "z")]
    ]


def test_a_factor_that_the_base_lacks_is_refused():
    question = Question("q", "?", "r", [], [0], {"a": 1}, sweeps={"aa": [2]})
    with pytest.raises(ValueError, match="aa: no factor"):
        list(question.choices())


def test_a_cell_that_fails_leaves_no_result_and_one_that_ends_leaves_its_key(tmp_path):
    def fail(work: Work) -> None:
        work.record("x", y=1)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        _do(tmp_path / "cell", "key", {}, fail)
    assert not _finished(tmp_path / "cell", "key")
    _do(tmp_path / "cell", "key", {}, lambda work: work.record("x", y=1))
    assert _finished(tmp_path / "cell", "key")
    assert not _finished(tmp_path / "cell", "other key")


# The page


def test_a_page_is_filled_between_its_markers_only():
    page = "before\n<!-- lab:a -->\nold\n<!-- /lab -->\nbetween\n<!-- lab:b -->\nkept\n<!-- /lab -->\n"
    assert fill(page, {"a": "new\n"}) == page.replace("old", "new")


def test_the_evidence_is_what_the_results_say(tmp_path):
    page = tmp_path / "evidence.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    filled = write_page(RESULTS, page, tmp_path)
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    assert set(filled) >= {"world"}
    assert all(f"lab:{name} " in page.read_text(encoding="utf-8") for name in filled)


# The runner, with the real hosts


def start(folder):
    command = [sys.executable, str(ROOT / "lab" / "run.py"), "a", "--quick", "--out", str(folder)]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
def test_a_killed_run_resumes_and_weight_1_trains_as_the_plain_run(tmp_path):
    process = start(tmp_path)
    world = tmp_path / "quick" / "stages" / "model-target" / "result.json"
    while not world.exists():
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = world.stat().st_mtime_ns
    assert start(tmp_path).wait() == 0, (tmp_path / "log").read_text()[-3000:]
    assert world.stat().st_mtime_ns == before
    table = pandas.read_csv(tmp_path / "quick" / "results" / "a_fusellm.csv")
    curves = table[table["of"] == "validation"]
    plain = curves[curves["method"] == "clm"]["bpb"].to_numpy()
    weight_1 = curves[curves["lm_loss_weight"] == 1.0]["bpb"].to_numpy()
    fused = curves[(curves["method"] == "fusion") & (curves["lm_loss_weight"] == 0.5)]["bpb"].to_numpy()
    assert len(plain) >= 2
    assert weight_1 == pytest.approx(plain, abs=2e-5)
    assert abs(fused - plain).max() > 1e-4
    (cell,) = (tmp_path / "quick" / "cells" / "fusellm").glob("seed-0-*")
    assert "axolotl train train.yml" in (cell / "commands.sh").read_text()
    assert json.loads((cell / "result.json").read_text())["cpu"]["axolotl train"] > 0
