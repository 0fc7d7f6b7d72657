"""`fusion run` as a command."""

import json

import pytest
import tiny
import yaml
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.errors import ChainError, ConfigError


@pytest.fixture
def run(tmp_path, monkeypatch):
    def called(steps, *arguments):
        (tmp_path / "fusion.yml").write_text(yaml.safe_dump({"steps": steps}))
        monkeypatch.chdir(tmp_path)
        return CliRunner().invoke(app, ["run", *arguments], env={"COLUMNS": "200"})

    return called


def test_the_file_is_fusion_yml_and_steps_can_be_chosen(run, tmp_path):
    steps = [{"name": name, "command": f"touch {name}.txt", "writes": [f"{name}.txt"]} for name in ("a", "b", "c")]
    done = run(steps, "fusion.yml", "b", "c", "--jobs", "2")
    assert done.exit_code == 0
    assert sorted(path.stem for path in tmp_path.glob("*.txt")) == ["b", "c"]
    for state in ("b: started", "b: done in", "c: done in"):
        assert state in done.output
    assert "b: was done" in run(steps).output
    assert "got 'x'" in str(run(steps, "fusion.yml", "x").exception)
    assert isinstance(run([{"name": "a", "command": "false"}]).exception, ChainError)
    assert isinstance(run([], "nothing.yml").exception, ConfigError)


def test_a_dry_run_without_the_program_says_so(run):
    shown = run([{"name": "a", "command": "fusion capture", "env": "nowhere", "variables": {"PATH": ""}}], "--dry-run")
    assert (shown.exit_code, "a: no estimate: fusion: No such file" in shown.output) == (0, True)


@pytest.mark.slow
def test_a_dry_run_shows_the_steps_and_what_their_own_dry_runs_say(run, tmp_path):
    tiny.llama_checkpoint(tmp_path / "model", seed=1, tokenizer=tiny.byte_level())
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.TEXTS))
    capture = "fusion capture --model {} --texts texts.jsonl --out {}"
    steps = [
        {"name": "known", "command": capture.format("model", "one"), "reads": ["texts.jsonl"], "writes": ["one"]},
        {"name": "later", "command": capture.format("tuned", "two"), "needs": ["known", "tune"]},
        {"name": "wrong", "command": "fusion capture --no-such-flag"},
        {"name": "tune", "command": "cp -r model tuned", "reads": ["model"], "writes": ["tuned"]},
    ]
    shown = run(steps, "--dry-run")
    assert shown.exit_code == 0
    assert [line.split()[1] for line in shown.output.splitlines() if "has not run" in line][-1] == "later"
    assert "known: 10 texts, about " in shown.output
    assert " tokens/s" in shown.output
    assert "later: can be estimated after known, tune" in shown.output
    assert "wrong: no estimate: UsageError: " in shown.output
    assert not (tmp_path / "one").exists()
    assert not (tmp_path / ".fusion_run").exists()
