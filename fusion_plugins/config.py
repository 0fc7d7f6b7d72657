"""Settings of a command: a YAML file, flags over it, and one pydantic model that knows every key."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fusion_plugins.errors import ConfigError

__all__ = ["Settings", "as_defaults", "load_config", "validate"]

Model = TypeVar("Model", bound=BaseModel)


class Settings(BaseModel):
    """A group of settings: unknown keys are errors, and so are keys that have moved.

    Attributes:
        MOVED: old key -> its new name, or what became of it.
    """

    model_config = ConfigDict(extra="forbid")
    MOVED: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_moved_keys(cls, values: Any) -> Any:
        moved = [key for key in cls.MOVED if isinstance(values, Mapping) and key in values]
        if moved:
            raise ValueError("; ".join(f"{key} is now {cls.MOVED[key]}" for key in moved))
        return values


def load_config(
    model: type[Model], path: str | Path | None, flags: Mapping[str, Any], assignments: list[str] | None = None
) -> Model:
    """Read ``path``, lay flags and ``KEY=VALUE`` assignments over it, and check everything at once.

    Args:
        model: the pydantic model of the command's settings; it must forbid unknown keys.
        path: YAML file, or None to take everything from the flags.
        flags: key -> value; a value of None means that the flag was not given.
        assignments: ``key=value`` with dots for nested keys; the value is read as YAML.

    Raises:
        ConfigError: the file is missing or no mapping, or any setting is wrong (all of them are named).
    """
    values = _read_yaml(Path(path)) if path is not None else {}
    values |= {key: value for key, value in flags.items() if value is not None}
    for assignment in assignments or []:
        values = _assign(values, assignment)
    return validate(model, values, where=str(path) if path is not None else "the command line")


def as_defaults(context: Any, path: str | None) -> str | None:
    """Take a YAML file's values for the flags and arguments that were not given; for typer's ``callback``.

    Raises:
        ConfigError: the file is missing or no mapping, or it has a key that is no flag or argument of the command.
    """
    if path is None:
        return None
    values = _read_yaml(Path(path))
    known = {parameter.name for parameter in context.command.params} - {"config", "help"}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"{path}: unknown key {', '.join(unknown)}; known keys: {', '.join(sorted(known))}")
    context.default_map = {**(context.default_map or {}), **values}
    return path


def validate(model: type[Model], values: Mapping[str, Any], *, where: str) -> Model:
    """Build ``model`` from ``values``.

    Raises:
        ConfigError: names every wrong, missing or unknown key of ``where`` in one message.
    """
    try:
        return model.model_validate(dict(values))
    # pydantic's own error repeats whole groups of settings, and with them a key that does not belong there.
    except ValidationError as error:
        lines = [_describe(model, problem) for problem in error.errors()]
        raise ConfigError(f"{where}: {len(lines)} wrong setting(s): " + "; ".join(lines)) from None


def _describe(model: type[BaseModel], problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "settings"
    if problem["type"] == "extra_forbidden":
        known = f"; known keys: {', '.join(sorted(model.model_fields))}" if len(problem["loc"]) == 1 else ""
        return f"{key}: unknown key{known}"
    value = problem["input"]
    group = isinstance(value, Mapping | BaseModel)
    got = "" if problem["type"] == "missing" or group else f", got {value!r}"
    return f"{key}: {problem['msg']}{got}"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return values


def _assign(values: Mapping[str, Any], assignment: str) -> dict[str, Any]:
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise ConfigError(f"expected KEY=VALUE, got {assignment!r}")
    first, dot, rest = key.partition(".")
    if not dot:
        return {**values, first: yaml.safe_load(text)}
    inner = values.get(first) or {}
    if not isinstance(inner, dict):
        raise ConfigError(f"{assignment!r}: {first!r} is not a group of settings")
    return {**values, first: _assign(inner, f"{rest}={text}")}
