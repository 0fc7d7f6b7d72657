"""`fusion doctor` on a folder of scored responses."""

import json
import random

import pytest
from scored_rows import COLUMNS, write
from typer.testing import CliRunner

from fusion_plugins.cli import app

HOSTILE = "</b><script>alert(1)</script>\x1b[2J"


def rows_of(skills, prompts=60, samples=3, seed=0):
    draw = random.Random(seed)
    for prompt in range(prompts):
        gold = str(draw.randrange(50))
        for source, skill in skills.items():
            for index in range(samples):
                answer = gold if draw.random() < skill else str(draw.randrange(50))
                right = answer == gold
                yield {
                    "prompt_id": f"p{prompt}",
                    "source": source,
                    "index": index,
                    "prompt": [{"role": "user", "content": f"Sum {prompt}?"}],
                    "response": f"It is {answer}.",
                    "domain": "math",
                    "reference": gold,
                    "reward": None,
                    "correct": right,
                    "scores": {"math": {"correct": right, "answer": answer, "gold": gold, "reward": None}},
                }


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor-responses")
    return write(folder / "scored", rows_of({"strong": 0.95, HOSTILE: 0.1, "llama": 0.4}))


def _doctor(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def test_a_folder_gives_a_verdict_a_page_and_a_picture(scored, tmp_path):
    result = _doctor(scored, "--target", "llama", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "math: worth it" in result.output
    assert "strong is better than the target on math" in result.output
    assert "\x1b" not in result.output
    found = json.loads((tmp_path / "out" / "doctor.json").read_text())
    (domain,) = found["domains"]
    assert (found["target"], found["responses"], domain["conclusion"]) == ("llama", 540, "worth it")
    assert {each["name"]: each["verdict"] for each in domain["sources"]} == {"strong": "better", HOSTILE: "worse"}
    assert domain["target"]["difference"] is None
    page = (tmp_path / "out" / "doctor.html").read_text()
    assert page.count("<svg role=") == 1
    assert "<script>" not in page
    assert "http" not in page
    assert "worth it" in page
    assert (tmp_path / "out" / "doctor.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_all_of_the_output(scored, tmp_path):
    result = _doctor(scored, "--target", "llama", "--json", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "doctor.json").read_text())


def test_the_target_may_be_marked_in_the_rows(tmp_path):
    rows = [row | {"is_target": row["source"] == "own"} for row in rows_of({"a": 0.9, "own": 0.1}, prompts=40)]
    write(tmp_path / "scored", rows, COLUMNS | {"is_target": "bool"})
    assert _doctor(tmp_path / "scored", "--out", tmp_path / "out").exit_code == 0
    found = json.loads((tmp_path / "out" / "doctor.json").read_text())
    assert (found["target"], found["domains"][0]["conclusion"]) == ("own", "worth it")


def test_without_answers_of_the_target_the_command_says_what_is_missing(scored, tmp_path):
    result = _doctor(scored, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "math: not enough data" in result.output
    assert "there are no answers of the target in math: sample it" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "gemma"], "expected a source of .*, got 'gemma'; its sources are .*llama, strong"),
        (["--target", "llama", "--limit", "5"], "limit: expected only target and out with scored responses"),
        (["--texts", "a.jsonl", "--no-chain"], "chain, texts: expected only target and out .* remove them"),
        (["OTHER"], "one folder of scored responses, got the folder of responses .* among 2 sources"),
    ],
)
def test_what_does_not_belong_together_is_refused(scored, tmp_path, arguments, message):
    arguments = [str(scored) if each == "OTHER" else each for each in arguments]
    error = _doctor(scored, *arguments, "--out", tmp_path / "out")
    assert error.exit_code == 1
    with pytest.raises(type(error.exception), match=message):
        raise error.exception


def test_folders_that_are_not_scored_or_empty_are_refused(tmp_path):
    unscored = {name: kind for name, kind in COLUMNS.items() if name not in ("reward", "correct", "scores")}
    write(tmp_path / "responses", rows_of({"a": 1.0}, prompts=2), unscored, "responses")
    error = str(_doctor(tmp_path / "responses").exception)
    assert "expected scored responses, got rows without correct, reward" in error
    assert "fusion score --responses" in error
    write(tmp_path / "empty", [])
    assert "got a folder without rows" in str(_doctor(tmp_path / "empty").exception)
    (tmp_path / "file.jsonl").write_text("{}")
    assert "a folder of scored responses" in str(_doctor(tmp_path / "file.jsonl").exception)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    assert "damaged" in str(_doctor(tmp_path / "damaged").exception)
