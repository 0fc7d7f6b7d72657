"""What the math worker says about one response, and its protocol."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusion_plugins.scoring.math_worker import judge

ROOT = Path(__file__).parents[2]


def test_a_verdict_says_what_was_compared_and_where_it_was_found():
    assert judge("so #### 18", r"First 3, then \boxed{18}.") == {
        "correct": True, "reason": None, "gold": "18", "answer": "18", "found": "boxed", "rule": "text"
    }  # fmt: skip
    assert judge("18", "#### 19") | {"found": "hashes", "rule": "number"} == judge("18", "#### 19")
    assert judge("18", "The answer is $18$.")["found"] == "phrase"
    assert judge("x + 1", "So $1 + x$.") == {
        "correct": True, "reason": None, "gold": "x + 1", "answer": "1 + x", "found": "formula", "rule": "math-verify"
    }  # fmt: skip
    reply = {"correct": False, "reason": "the response has no answer", "gold": "18"}
    assert judge("18", "I do not know.") == reply | {"answer": None, "found": None, "rule": None}


@pytest.mark.parametrize(("reference", "response"), [("\\frac{", "18"), ("18", "\\boxed{((((}")])
def test_what_cannot_be_read_has_no_verdict(reference, response):
    found = judge(reference, response)
    assert found["correct"] is None
    assert "cannot be read" in found["reason"]


def serve(requests, path):
    """Run the worker on lines of JSON; return its lines and its exit status."""
    run = subprocess.run(
        [sys.executable, "-P", "-m", "fusion_plugins.scoring.math_worker", "60"],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])},
        timeout=300,
    )
    return run.stdout.splitlines(), run.returncode


def test_it_answers_one_line_with_one_line_until_its_input_ends():
    ready, *replies = serve(
        [{"reference": "5", "response": "5"}, {"reference": "5"}, {"reference": "5", "response": "6"}], []
    )[0]
    assert ready == "ready"
    right, broken, wrong = map(json.loads, replies)
    assert (right["correct"], wrong["correct"]) == (True, False)
    assert broken["correct"] is None
    assert broken["reason"].startswith("the verifier failed: TypeError")


def test_what_a_library_prints_is_no_reply(tmp_path):
    (tmp_path / "math_verify.py").write_text(
        "print('ANTLR runtime and generated code versions disagree')\n"
        "def parse(text, **options):\n    print('parsing')\n    return [1, text]\n"
        "def verify(gold, answer, **options):\n    return False\n"
    )
    lines, status = serve([{"reference": "5", "response": "6"}], [tmp_path])
    assert status == 0
    assert lines[0] == "ready"
    assert json.loads(lines[1])["correct"] is False
    assert len(lines) == 2
