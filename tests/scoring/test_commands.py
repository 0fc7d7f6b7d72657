"""The command ``fusion score``: files of settings, flags and the table."""

import yaml
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.store import open_rows


def test_command_reads_a_file_and_flags_and_prints_the_table(responses, tmp_path):
    settings = tmp_path / "score.yml"
    settings.write_text(yaml.safe_dump({"responses": responses, "scorers": {"math": {"workers": 1}}}))
    run = CliRunner().invoke(
        app, ["score", "-c", str(settings), "--out", str(tmp_path / "scored")], env={"COLUMNS": "200"}
    )
    assert run.exit_code == 0, run.output
    assert "50.0% of 2" in run.output
    assert "5 responses scored" in run.output


def test_scorer_can_be_named_on_the_command_line(responses, tmp_path, one_scorer):
    run = CliRunner().invoke(
        app, ["score", "--responses", responses, "--out", str(tmp_path / "out"), "--scorer", "math"]
    )
    assert run.exit_code == 0, run.output
    assert [row["correct"] for row in open_rows(tmp_path / "out")] == [True, False, True, None, None]


def test_unknown_keys_of_the_file_are_refused(responses, tmp_path):
    settings = tmp_path / "score.yml"
    settings.write_text(yaml.safe_dump({"responses": responses, "out": "x", "scorer": "math"}))
    run = CliRunner().invoke(app, ["score", "-c", str(settings)])
    assert run.exit_code != 0
    assert "unknown key" in str(run.exception)
