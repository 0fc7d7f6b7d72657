"""The command line as a whole: what it lists, how it fails, and what it costs to start."""

import errno
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import fusion_plugins
from fusion_plugins.cli import app, main
from fusion_plugins.errors import StoreError

COMMANDS = [
    "capture",
    "clean",
    "cut",
    "doctor",
    "init",
    "keys",
    "merge-check",
    "plugins",
    "recipes",
    "report",
    "rounds",
    "run",
    "sample",
    "score",
]
STORE_COMMANDS = ["compact", "export", "import", "info", "merge", "pull", "push", "verify"]


def _fusion(*arguments):
    return subprocess.run([Path(sys.executable).parent / "fusion", *arguments], capture_output=True, text=True)


def _names(group):
    return sorted(command.name or command.callback.__name__.replace("_", "-") for command in group.registered_commands)


def test_the_commands_are_these():
    assert _names(app) == COMMANDS
    (store,) = app.registered_groups
    assert store.name == "store"
    assert _names(store.typer_instance) == STORE_COMMANDS


def _commands(group, *names):
    """The words of every command, whatever groups it is in."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, *names, name)
        else:
            yield (*names, name)


TREE = sorted(_commands(typer.main.get_command(app)))


def test_the_tree_has_the_commands_of_all_groups():
    assert TREE == sorted([*((name,) for name in COMMANDS), *(("store", name) for name in STORE_COMMANDS)])


@pytest.mark.parametrize("words", TREE, ids=" ".join)
def test_every_command_explains_itself_with_an_example(words):
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output
    example = " ".join(result.output.partition("For example: ")[2].split())
    assert f"fusion {' '.join(words)}" in example


@pytest.mark.parametrize("words", TREE, ids=" ".join)
def test_every_option_of_an_example_exists(words):
    """An example that has gone stale is worse than none."""
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)} | {"--help", "-h"}
    lines = re.findall(r"`(fusion [^`]*)`", " ".join(command.help.partition("For example: ")[2].split()))
    own = [line for line in lines if line.startswith(f"fusion {' '.join(words)}")]
    assert own
    used = {word.partition("=")[0] for line in own for word in shlex.split(line) if word.startswith("-")}
    assert used <= known


def test_the_line_of_a_group_names_its_commands():
    shown = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output.split())
    (line,) = re.findall(r"Inspect, .*? stores\.", shown)
    assert [name for name in STORE_COMMANDS if name not in line.lower().replace("inspect", "info")] == []


@pytest.mark.parametrize(
    ("command", "model"),
    [
        ("capture", "fusion_plugins.sources.capture_config:CaptureConfig"),
        ("doctor", "fusion_plugins.doctor.examine:DoctorConfig"),
        ("sample", "fusion_plugins.sources.sample_config:SampleConfig"),
        ("cut", "fusion_plugins.sources.cut:CutConfig"),
        ("score", "fusion_plugins.scoring.score:ScoreConfig"),
    ],
)
def test_help_shows_the_defaults_of_the_settings(command, model):
    module, _, name = model.partition(":")
    fields = getattr(importlib.import_module(module), name).model_fields
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    for option in typer.main.get_command(app).commands[command].params:
        default = fields[option.name].default if option.name in fields else None
        if isinstance(default, bool):
            default = option.name if default else None
        if isinstance(default, str | int):
            assert f"[default: ({default})]" in shown, option.name


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["capture"], "ConfigError: "),
        (["doctor"], "ConfigError: "),
        (["store", "info"], "UsageError: Missing argument 'FOLDER'. `fusion store info --help`"),
        (["merge-check"], "UsageError: Missing argument 'CONFIG'."),
        (["capture", "--no-such-flag"], "UsageError: No such option"),
        (["nocommand"], "UsageError: No such command"),
        (["doctor", "--limit", "many"], "UsageError: Invalid value for '--limit'"),
    ],
)
def test_every_mistake_in_settings_and_flags_is_one_line_and_status_1(arguments, said):
    result = _fusion(*arguments)
    assert result.returncode == 1
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1


def _main_says(capsys, error, monkeypatch):
    """What `fusion plugins` says if listing the plugins raises the error."""
    monkeypatch.setattr("fusion_plugins.plugins.get_registry", lambda kind: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit) as ended:
        main(["plugins"])
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "stores/a"), "OSError: stores/a: No space left on device."),
        (PermissionError(errno.EACCES, "Permission denied", "b[/c]"), "PermissionError: b[/c]: Permission denied."),
        (KeyError("x\x1b[2J\ny"), "UnexpectedError: KeyError: 'x\\\\x1b[2J\\\\ny' (fusion_plugins/cli.py, line"),
        (RecursionError("deep"), "UnexpectedError: RecursionError: deep"),
        (StoreError("[/x] \x1b[31m"), "StoreError: [/x] \\x1b[31m"),
    ],
)
def test_what_nobody_has_caught_is_one_line_too(error, said, capsys, monkeypatch):
    monkeypatch.delenv("FUSION_TRACEBACK", raising=False)
    status, shown = _main_says(capsys, error, monkeypatch)
    assert status == 1
    assert shown.startswith(said.replace("\\\\", "\\"))
    assert shown.count("\n") == 1


def test_the_traceback_of_a_fault_can_be_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("FUSION_TRACEBACK", "1")
    _, shown = _main_says(capsys, KeyError("x"), monkeypatch)
    assert "Traceback (most recent call last)" in shown


def test_ctrl_c_has_the_status_of_shells(capsys, monkeypatch):
    assert _main_says(capsys, KeyboardInterrupt(), monkeypatch) == (130, "")


def test_a_reader_that_goes_away_is_no_error():
    shell = f"{Path(sys.executable).parent / 'fusion'} plugins | head -n 1"
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert result.stderr == ""


def test_plugins_of_packages_that_are_missing_are_listed_with_the_command_that_installs_them(capsys, monkeypatch):
    error = ModuleNotFoundError("No module named 'torch'", name="torch.nn")
    monkeypatch.setattr("fusion_plugins.plugins.get_registry", lambda kind: (_ for _ in ()).throw(error))
    assert CliRunner().invoke(app, ["plugins"]).output.count("needs the package torch, which is not installed") == 5


def test_h_is_help():
    assert "Usage" in CliRunner().invoke(app, ["-h"]).output
    assert "Usage" in CliRunner().invoke(app, ["store", "info", "-h"]).output


def test_starting_the_command_line_loads_neither_torch_nor_a_host():
    code = (
        "import sys, fusion_plugins.cli; print([m for m in ('torch', 'transformers', 'axolotl', 'mergekit', 'vllm', "
        "'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
