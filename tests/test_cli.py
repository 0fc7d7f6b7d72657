"""The command line as a whole: what it lists, how it fails, and what it costs to start."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fusion_plugins
from fusion_plugins.cli import app

COMMANDS = ["capture", "cut", "doctor", "merge-check", "plugins", "report", "sample", "score"]
STORE_COMMANDS = ["compact", "export", "info", "merge", "verify"]


def _fusion(*arguments):
    return subprocess.run([Path(sys.executable).parent / "fusion", *arguments], capture_output=True, text=True)


def _names(group):
    return sorted(command.name or command.callback.__name__.replace("_", "-") for command in group.registered_commands)


def test_the_commands_are_these():
    assert _names(app) == COMMANDS
    (store,) = app.registered_groups
    assert store.name == "store"
    assert _names(store.typer_instance) == STORE_COMMANDS


@pytest.mark.parametrize("command", [*COMMANDS, *(f"store {name}" for name in STORE_COMMANDS)])
def test_every_command_explains_itself(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version_is_the_package_version():
    assert CliRunner().invoke(app, ["--version"]).output.strip() == fusion_plugins.__version__


def test_plugins_lists_the_built_ins():
    result = CliRunner().invoke(app, ["plugins"])
    assert result.exit_code == 0
    for name in ("min_ce", "avg_ce", "offsets", "dtw", "same_source"):
        assert name in result.output


def test_a_mistake_of_the_user_is_one_message_and_status_1(tmp_path):
    result = _fusion("report", str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith("DataError: ")
    assert "Traceback" not in result.stderr


def test_starting_the_command_line_loads_neither_torch_nor_a_host():
    code = (
        "import sys, fusion_plugins.cli; print([m for m in ('torch', 'transformers', 'axolotl', 'mergekit', 'vllm', "
        "'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
