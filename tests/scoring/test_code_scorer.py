"""The code scorer on HumanEval, in the real sandbox."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusion_plugins.errors import ConfigError
from fusion_plugins.scoring.code_scorer import CodeScorer
from fusion_plugins.scoring.code_tests import EXPECTED
from fusion_plugins.store import RowManifest, RowWriter, open_rows

DATA = Path(__file__).parents[1] / "data"
HUMANEVAL = [json.loads(line) for line in (DATA / "humaneval.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def scorer(short_limits):
    made = CodeScorer(workers=2, **short_limits)
    yield made
    made.close()


def row(problem, body):
    code = problem["prompt"] + body
    tests = {"test": problem["test"], "entry_point": problem["entry_point"]}
    return {"response": f"Here it is:\n```python\n{code}\n```\nDone.", "tests": tests}


# HumanEval


def test_canonical_solutions_pass(scorer):
    assert len(HUMANEVAL) == 10
    scores = scorer.score([row(problem, problem["canonical_solution"]) for problem in HUMANEVAL])
    assert [(score.correct, score.reason) for score in scores] == [(True, None)] * 10
    assert scores[0].details["tests"] == ["passed"]


def test_solutions_that_return_nothing_fail(scorer):
    scores = scorer.score([row(problem, "    return None\n") for problem in HUMANEVAL])
    assert [score.correct for score in scores] == [False] * 10
    assert scores[0].reason == "tests: 1 failed"
    assert "Error" in scores[0].details["error"]


def test_code_that_does_not_compile_is_incorrect_without_running_a_test(scorer):
    (score,) = scorer.score([row(HUMANEVAL[0], "    return ((\n")])
    assert score.correct is False
    assert score.reason == "does not compile"
    assert "SyntaxError" in score.details["error"]
    assert score.details["tests"] == []


# Data and settings


def test_what_is_missing_or_broken_in_the_data_is_no_verdict(scorer):
    none, empty, broken = scorer.score(
        [
            {"response": "x = 1", "tests": None},
            {"response": "x = 1", "tests": []},
            {"response": "x = 1", "tests": ["assert x =="]},
        ]
    )
    assert none.correct is empty.correct is broken.correct is None
    assert none.reason == "no tests"
    assert broken.reason == "a test does not compile"
    (prose,) = scorer.score([{"response": "```bash\nls\n```", "tests": ["assert x == 1"]}])
    assert prose.correct is False
    assert prose.reason == "the response has no code"
    (unknown,) = scorer.score([{"response": "x = 1", "tests": 3}])
    assert unknown.correct is None
    assert unknown.reason == f"the tests cannot be read: expected {EXPECTED}, got int"


def test_a_folder_that_is_not_there_is_not_quietly_left_out(tmp_path):
    with pytest.raises(ConfigError, match="packages"):
        CodeScorer(packages=[str(tmp_path / "nowhere")])


def test_unknown_and_useless_limits_are_refused():
    with pytest.raises(ConfigError, match="expected .*limits cpu_seconds.*, got cpu_secs"):
        CodeScorer(cpu_secs=3)
    with pytest.raises(ConfigError, match="memory"):
        CodeScorer(memory=0)


def test_ctrl_c_keeps_what_is_scored_and_ends_the_programs(tmp_path, descendants, alive):
    columns = dict.fromkeys(("prompt_id", "source", "prompt", "response", "domain"), "string")
    manifest = RowManifest(
        stage="responses", columns={**columns, "index": "int64", "tests": "json"}, key=("prompt_id", "source", "index")
    )
    with RowWriter(tmp_path / "responses", manifest) as writer:
        for index in range(40):
            texts = {"prompt_id": "p", "source": "a", "prompt": "?", "domain": "code", "response": f"x = {index}"}
            # From the fourth on they take longer than anybody waits.
            writer.write(
                {
                    **texts,
                    "index": index,
                    "tests": [f"import time; time.sleep({0 if index < 4 else 60}); assert x == {index}"],
                }
            )
    command = [sys.executable, "-c", "import sys; from fusion_plugins.cli import main; sys.exit(main())", "score"]
    command += ["--responses", str(tmp_path / "responses"), "--out", str(tmp_path / "scored"), "--set", "batch_rows=4"]
    command += ["--set", "scorers.code={wall_seconds: 100, total_seconds: 100, workers: 2}"]
    driver = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and driver.poll() is None:
        if (tmp_path / "scored" / "manifest.json").exists() and len(open_rows(tmp_path / "scored")) == 4:
            break
        time.sleep(0.1)
    time.sleep(1)
    children = descendants(driver.pid)
    assert children, driver.communicate()
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert "4 rows are safe" in errors
    assert len(open_rows(tmp_path / "scored")) == 4
    assert not any(alive(child) for child in children)
