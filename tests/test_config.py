"""Settings of a command: a YAML file, flags and ``KEY=VALUE`` over it, and the errors that name what is wrong."""

from typing import Literal

import pytest
from pydantic import Field

from fusion_plugins.config import Settings, load_config, validate
from fusion_plugins.errors import ConfigError


class Inner(Settings):
    depth: int = 0


class Example(Settings):
    MOVED = {"old": "now new", "gone": "gone: nothing reads it"}

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
    with pytest.raises(ConfigError, match="settings: old is now new; gone is gone: nothing reads it$"):
        load_config(Example, _file(tmp_path, "old: x\ngone: 1\n"), {})
    with pytest.raises(ConfigError, match="old is now new"):
        load_config(Example, None, {}, ["old=x"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "expected YAML, got an error"),
        (b"a: \xff\n", "expected YAML in UTF-8"),
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


def test_a_flag_that_is_given_counts_even_if_it_is_empty(tmp_path):
    path = _file(tmp_path, "new: file\n")
    assert load_config(Example, path, {"new": ""}).new == ""
    with pytest.raises(ConfigError, match="count: .* got 0"):
        load_config(Example, path, {"count": 0})


def test_of_two_assignments_the_later_one_counts_and_groups_are_made_where_they_are_missing(tmp_path):
    assert load_config(Example, None, {}, ["count=2", "count=3"]).count == 3
    assert load_config(Example, _file(tmp_path, "inner:\n"), {}, ["inner.depth=4"]).inner.depth == 4
    assert load_config(Example, None, {}, ["inner={depth: 5}", "new=a=b"]) == Example(new="a=b", inner=Inner(depth=5))


def test_validate_names_the_place_and_every_wrong_key():
    assert validate(Example, {"count": 2}, where="the block") == Example(count=2)
    with pytest.raises(ConfigError, match=r"^the block: 2 wrong setting\(s\): count: .*; nwe: unknown key"):
        validate(Example, {"count": "x", "nwe": 1}, where="the block")


def test_an_error_does_not_repeat_whole_groups_of_settings():
    """A group may hold an API key that was put into the wrong place."""
    with pytest.raises(ConfigError, match="count: ") as caught:
        validate(Example, {"count": {"api_key": "secret"}, "inner": {"api_key": "secret"}}, where="the block")
    assert "inner.api_key: unknown key" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert caught.value.__cause__ is None


def test_a_renamed_key_of_a_group_is_refused_with_its_place():
    class Outer(Settings):
        example: Example = Field(default_factory=Example)

    with pytest.raises(ConfigError, match="the block: .* example: old is now new"):
        validate(Outer, {"example": {"old": "x"}}, where="the block")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"name: \xff\xfe", "expected YAML in UTF-8"),
        (b"name: a\x00b", "special characters are not allowed"),
        (b"name: 2024-13-45", "month must be in 1..12"),
        (b"name: " + b"[" * 3000 + b"]" * 3000, "nested too deeply"),
        (b"name: [a", r"expected ',' or ']'.* in line 1, column 9"),
        (b'name: !!python/object/apply:os.system ["id"]', "could not determine a constructor"),
        (b"name: a\nname: b\n", "the key 'name' is there twice in line 1"),
        (b"inner:\n  depth: 1\n  width: 2\n  depth: 3\n", "the key 'depth' is there twice in line 2"),
        (b"name: *nothing", "undefined alias"),
        (b"\t- a", "cannot start any token"),
    ],
)
def test_a_file_that_is_no_yaml_is_one_line_with_the_place(tmp_path, text, said):
    path = tmp_path / "settings.yml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(Example, path, {})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    ["[", "2024-13-45", "\udcff", "*a", "{a: 1, a: 2}", "!!python/name:os.system"]
    + ["!!timestamp soon", "!!bool perhaps", "!!int ''", "!!float x"],
)
def test_a_value_that_is_no_yaml_is_one_line(text):
    with pytest.raises(ConfigError, match="^--set name: expected a YAML value") as caught:
        load_config(Example, None, {}, [f"name={text}"])
    assert "\n" not in str(caught.value)


class Choice(Settings):
    model: str = Field(description="folder or hub name of the model")
    top_k: int | Literal["all"] = 64
    n: int | dict[str, int] = 1
    names: str | list[str] = "a"
    many: list[Inner] = Field(default_factory=list)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": "x"}, "top_k: Input should be a valid integer or 'all', got 'x'"),
        ({"top_k": 1.5}, "top_k: Input should be a valid integer or 'all', got 1.5"),
        ({"n": "q"}, "n: Input should be a valid integer or a valid dictionary, got 'q'"),
        ({"n": {"math": "x"}}, "n.math: Input should be a valid integer, got 'x'"),
        ({"names": ["a", 5]}, "names.1: Input should be a valid string, got 5"),
        ({"many": [{"depth": 1}, {"depth": "x"}]}, "many.1.depth: Input should be a valid integer, got 'x'"),
        ({"many": [{"dept": 1}]}, "many.0.dept: unknown key"),
        ({"names": ["http://me:secret@h", 5]}, "names.1: "),
        ({"top_k": "http://me:secret@h/v1"}, "top_k: Input should be a valid integer or 'all', got '***@h/v1'"),
    ],
)
def test_a_wrong_setting_is_named_as_it_was_written_with_all_that_it_may_be(values, message):
    with pytest.raises(ConfigError, match=r"here: 1 wrong setting\(s\): ") as caught:
        validate(Choice, {"model": "m", **values}, where="here")
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_missing_setting_is_named_with_what_is_expected():
    with pytest.raises(
        ConfigError, match="^here: 1 wrong.*: model: missing; expected folder or hub name of the model$"
    ):
        validate(Choice, {}, where="here")
