"""The settings of a command: a YAML file, flags that override it, and one pydantic model that knows every key."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fusion_plugins.errors import ConfigError
from fusion_plugins.redaction import without_credentials

#: what pydantic adds to "Input should be a valid integer"
_REASON = re.compile(", (?=unable to|got a number)")
Model = TypeVar("Model", bound=BaseModel)


class Settings(BaseModel):
    """A group of settings. An unknown key is an error; a renamed one is an error that gives the new name.

    Attributes:
        MOVED: old key -> what the error says after "KEY is", such as "now NEW_KEY".
    """

    model_config = ConfigDict(extra="forbid")
    MOVED: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_moved_keys(cls, values: Any) -> Any:
        moved = [key for key in cls.MOVED if isinstance(values, Mapping) and key in values]
        if moved:
            raise ValueError("; ".join(f"{key} is {cls.MOVED[key]}" for key in moved))
        return values


def with_preset(values: Any, presets: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return settings on top of those of the preset that they name; anything but a mapping is left to pydantic.

    Raises:
        ValueError: no preset has that name.
    """
    name = values.get("preset") if isinstance(values, dict) else None
    if name is None:
        return values
    if name not in presets:
        raise ValueError(f"expected one of the presets {', '.join(presets)}, got {name!r}; name one of them")
    return {**presets[name], **values}


def load_config(
    model: type[Model], path: str | Path | None, flags: Mapping[str, Any], assignments: list[str] | None = None
) -> Model:
    """Return the settings of a command: those of a file, overridden by flags, overridden by ``KEY=VALUE``.

    Args:
        model: the pydantic model of the command's settings; it must forbid unknown keys.
        path: YAML file, or None to take everything from the flags.
        flags: key -> value; None where a flag was not given.
        assignments: ``key=value`` with dots for nested keys; the value is read as YAML.

    Raises:
        ConfigError: the file cannot be read or holds no mapping, or settings are wrong (all of them are named).
    """
    values = _read_yaml(Path(path)) if path is not None else {}
    values |= {key: value for key, value in flags.items() if value is not None}
    for assignment in assignments or []:
        key, separator, text = assignment.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigError(f"--set: expected KEY=VALUE with dots for nested keys, got {assignment!r}")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"--set {key}: expected a YAML value, got {text[:200]!r}: {error}. Quote it.") from None
        values = _assign(values, key, value)
    return validate(model, values, where=str(path) if path is not None else "the command line")


def validate(model: type[Model], values: Mapping[str, Any], *, where: str) -> Model:
    """Return ``model`` built from ``values``.

    Raises:
        ConfigError: names every wrong, missing or unknown key of ``where`` in one message.
    """
    try:
        return model.model_validate(dict(values))
    # Not chained: pydantic's own message repeats whole groups of settings, and with them an API key that was put into
    # the wrong place.
    except ValidationError as error:
        lines = _descriptions(model, values, error)
        raise ConfigError(f"{where}: {len(lines)} wrong setting(s): " + "; ".join(lines)) from None


def _descriptions(model: type[BaseModel], values: Mapping[str, Any], error: ValidationError) -> list[str]:
    """Return one sentence per wrong key: the problems of all the types that the key may have are one."""
    problems: dict[str, list[Any]] = {}
    for problem in error.errors():
        problems.setdefault(_key(problem, values), []).append(problem)
    # What is wrong inside a key says more than that the key's other types do not fit.
    inner = [key for key in problems if not any(other.startswith(f"{key}.") for other in problems)]
    return [f"{key}: {_describe(model, problems[key])}" for key in inner]


def _key(problem: Any, values: Any) -> str:
    """Return the key of a problem as the user wrote it, without the names of types that pydantic puts between."""
    key: list[str] = []
    for part in problem["loc"]:
        inside = part in values if isinstance(values, Mapping) else isinstance(values, list) and isinstance(part, int)
        if inside:
            values = values[part]
        elif problem["type"] != "missing" or part != problem["loc"][-1]:
            continue
        key.append(str(part))
    return ".".join(key) or "settings"


def _describe(model: type[BaseModel], problems: list[Any]) -> str:
    first = problems[0]
    if first["type"] == "extra_forbidden":
        known = f"; known keys: {', '.join(sorted(model.model_fields))}" if len(first["loc"]) == 1 else ""
        return f"unknown key{known}"
    if first["type"] == "missing":
        field = model.model_fields.get(first["loc"][0]) if len(first["loc"]) == 1 else None
        return f"missing; expected {field.description}" if field is not None and field.description else "missing"
    texts = [_REASON.split(problem["msg"].removeprefix("Value error, "))[0] for problem in problems]
    # "Input should be a valid integer or 'all'"
    text = " or ".join(dict.fromkeys([texts[0], *(text.removeprefix("Input should be ") for text in texts[1:])]))
    value = first["input"]
    # A group may hold a key that was put into the wrong place, and so may a URL.
    shown = isinstance(value, str | int | float | bool) or value is None
    return f"{text}, got {without_credentials(f'{value!r:.200}')}" if shown else text


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which in a mapping lets the second of two equal keys win without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        for key, times in keys.items():
            if times > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        ValueError: it is no YAML; the message is one line, with the place.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ValueError(f"{' '.join(str(error.problem or error.context).split())}{place}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # What looks like a date but is none, for one; PyYAML fails on a value of another type than its tag in many ways.
    except Exception as error:
        raise ValueError(f"{type(error).__name__} {' '.join(str(error).split())}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected YAML in UTF-8, got {error}. Save the file as UTF-8.") from None
    except ValueError as error:
        raise ConfigError(f"{path}: expected YAML, got an error: {error}. Repair the file.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return values


def _assign(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return ``values`` with one of them replaced; a group that does not exist yet is made."""
    first, dot, rest = key.partition(".")
    if not dot:
        return {**values, first: value}
    group = values.get(first) or {}
    if not isinstance(group, dict):
        raise ConfigError(f"--set: expected a group of settings in {first!r}, got {group!r}")
    return {**values, first: _assign(group, rest, value)}
