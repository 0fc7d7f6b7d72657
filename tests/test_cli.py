"""The command line as a whole: what it lists, how it fails, what it costs to start, and how it reads settings."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field
from typer.testing import CliRunner

import fusion_plugins
from fusion_plugins.cli import app
from fusion_plugins.config import Settings, load_config
from fusion_plugins.errors import ConfigError

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


class Inner(Settings):
    depth: int = 0


class Example(Settings):
    MOVED = {"old": "new", "gone": "gone: nothing reads it"}

    new: str = "x"
    count: int = Field(1, ge=1)
    inner: Inner = Field(default_factory=Inner)


def _file(folder, content):
    path = folder / "settings.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_assignments_override_flags_and_flags_override_the_file(tmp_path):
    path = _file(tmp_path, "new: file\ncount: 2\ninner: {depth: 3}\n")
    assert load_config(Example, path, {}) == Example(new="file", count=2, inner=Inner(depth=3))
    assert load_config(Example, path, {"new": "flag", "count": None}).new == "flag"
    found = load_config(Example, path, {"new": "flag"}, ["new=set", "inner.depth=4"])
    assert (found.new, found.count, found.inner.depth) == ("set", 2, 4)
    assert load_config(Example, None, {}, ["inner.depth=5"]).inner.depth == 5
    assert load_config(Example, _file(tmp_path, ""), {}) == Example()


def test_all_wrong_settings_are_named_in_one_message(tmp_path):
    with pytest.raises(ConfigError, match=r"settings\.yml: 3 wrong setting\(s\): .*") as caught:
        load_config(Example, _file(tmp_path, "count: 0\ninner: {depth: x, dept: 1}\n"), {})
    message = str(caught.value)
    assert "count: Input should be greater than or equal to 1, got 0" in message
    assert "inner.depth: " in message
    assert "inner.dept: unknown key" in message
    with pytest.raises(ConfigError, match="the command line: .* nwe: unknown key; known keys: count, inner, new"):
        load_config(Example, None, {"nwe": "x"})


def test_a_renamed_key_is_refused_with_its_new_name(tmp_path):
    with pytest.raises(ConfigError, match="settings: old is now new; gone is now gone: nothing reads it$"):
        load_config(Example, _file(tmp_path, "old: x\ngone: 1\n"), {})
    with pytest.raises(ConfigError, match="old is now new"):
        load_config(Example, None, {}, ["old=x"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not YAML in UTF-8"),
        (b"a: \xff\n", "is not YAML in UTF-8"),
        ("- a\n", "expected a mapping of settings, got list"),
        (None, "cannot read the config file"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path, content, message):
    path = tmp_path / "missing.yml" if content is None else _file(tmp_path, content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Example, path, {})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("count", "expected KEY=VALUE with dots for nested keys, got 'count'"),
        ("=1", "expected KEY=VALUE"),
        ("inner.=1", "expected KEY=VALUE"),
        ("new.a=1", "expected a group of settings in 'new', got 'flag'"),
        ("new=[1", r"--set new: expected a YAML value, got '\[1'"),
    ],
)
def test_an_assignment_that_sets_nothing_is_refused(assignment, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Example, None, {"new": "flag"}, [assignment])
