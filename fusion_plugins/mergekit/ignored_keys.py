"""Finds what mergekit ignores in silence: misspelt keys, and parameters that have no effect where they stand."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from mergekit.merge_methods.base import MergeMethodSpec, ParameterScope
from pydantic import BaseModel

__all__ = ["parameter_problems", "unknown_keys"]


def parameter_problems(config: Mapping[str, Any], spec: MergeMethodSpec) -> list[str]:
    """Return one message per parameter that the method does not know, or that is set where it has no effect.

    Args:
        config: the merge configuration as plain data.
        spec: mergekit's description of the method.
    """
    known = {parameter.name: parameter for parameter in spec.parameters}
    problems = []
    for where, settings, per_model in _settings(config):
        for name in settings:
            if name not in known:
                problems.append(f"{where}: {spec.name} has no parameter {name!r}{_hint(name, known)}")
            elif per_model and known[name].scope == ParameterScope.SHARED:
                problems.append(
                    f"{where}: {name!r} is one setting for all models and has no effect under a model; move it to the "
                    "parameters of the whole merge"
                )
    return problems


def unknown_keys(raw: Any, model: type[BaseModel], where: str = "configuration") -> list[str]:
    """Return one message per key that a configuration model of mergekit would drop.

    Args:
        raw: the parsed YAML.
        model: the pydantic model that it is read into.
        where: how to call this place.
    """
    if not isinstance(raw, Mapping):
        return []
    problems = []
    for key, value in raw.items():
        if key not in model.model_fields:
            problems.append(f"{where}: unknown key {key!r}{_hint(key, model.model_fields)}")
            continue
        inner = _model_within(model.model_fields[key].annotation)
        if inner is None or key == "parameters":
            continue
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            place = f"{key}[{index}]" if isinstance(value, list) else key
            problems += unknown_keys(item, inner, place if where == "configuration" else f"{where}.{place}")
    return problems


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Yield (where, parameters, whether they stand under a model)."""
    yield "parameters", config.get("parameters") or {}, False
    yield from _models("models", config.get("models"))
    for where, part in [("slices", config), *_modules(config)]:
        if where != "slices":
            yield f"{where}.parameters", part.get("parameters") or {}, False
            yield from _models(f"{where}.models", part.get("models"))
        for index, output in enumerate(part.get("slices") or []):
            place = f"slices[{index}]" if where == "slices" else f"{where}.slices[{index}]"
            yield f"{place}.parameters", output.get("parameters") or {}, False
            yield from _models(f"{place}.sources", output.get("sources"))


def _modules(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(f"modules.{name}", part) for name, part in (config.get("modules") or {}).items()]


def _models(where: str, models: Any) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    for index, model in enumerate(models or []):
        yield f"{where}[{index}].parameters", model.get("parameters") or {}, True


def _model_within(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside ``Optional[List[...]]``; None for models that are also written as a string."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return None if annotation.__name__ in ("ModelReference", "ModelPath") else annotation
    for argument in get_args(annotation):
        found = _model_within(argument)
        if found is not None:
            return found
    return None


def _hint(name: str, known: Any) -> str:
    close = get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"
