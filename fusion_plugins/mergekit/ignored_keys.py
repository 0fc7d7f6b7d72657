"""Finds what mergekit ignores silently: misspelt keys, and parameters that have no effect where they are."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from mergekit.merge_methods.base import MergeMethodSpec, ParameterScope
from pydantic import BaseModel


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


def unknown_keys(raw: Any, model: type[BaseModel], where: str = "") -> list[str]:
    """Return one message per key that mergekit would drop when it reads a configuration.

    Args:
        raw: the parsed YAML.
        model: the pydantic model that it is read into.
        where: path of this part within the configuration, for the messages.
    """
    if not isinstance(raw, Mapping):
        return []
    problems = []
    for key, value in raw.items():
        if key not in model.model_fields:
            problems.append(f"{where or 'configuration'}: unknown key {key!r}{_hint(key, model.model_fields)}")
            continue
        annotation = model.model_fields[key].annotation
        inner = _model_within(annotation)
        if inner is None or key == "parameters":  # their names belong to the method: see parameter_problems
            continue
        path = f"{where}.{key}" if where else key
        named_by_user = any(get_origin(each) is dict for each in (annotation, *get_args(annotation)))  # modules, tokens
        if isinstance(value, list):
            parts = {f"{path}[{index}]": part for index, part in enumerate(value)}
        elif isinstance(value, Mapping) and named_by_user:
            parts = {f"{path}.{name}": part for name, part in value.items()}
        else:
            parts = {path: value}
        for place, part in parts.items():
            problems += unknown_keys(part, inner, place)
    return problems


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Yield (where, parameters, whether they belong to one model)."""
    modules = {f"modules.{name}.": part for name, part in (config.get("modules") or {}).items()}
    for prefix, part in {"": config, **modules}.items():
        yield f"{prefix}parameters", part.get("parameters") or {}, False
        for index, model in enumerate(part.get("models") or []):
            yield f"{prefix}models[{index}].parameters", model.get("parameters") or {}, True
        for index, output in enumerate(part.get("slices") or []):
            place = f"{prefix}slices[{index}]"
            yield f"{place}.parameters", output.get("parameters") or {}, False
            for number, source in enumerate(output.get("sources") or []):
                yield f"{place}.sources[{number}].parameters", source.get("parameters") or {}, True


def _model_within(annotation: Any) -> type[BaseModel] | None:
    """Return the pydantic model inside an annotation such as ``Optional[List[...]]``, or None."""
    models = [each for each in _classes(annotation) if issubclass(each, BaseModel)]
    # Where several are allowed, only pydantic can tell which is meant. References to models are usually written as
    # strings, and their mapping form has a validator of its own.
    if len(models) != 1 or models[0].__name__ in ("ModelReference", "ModelPath"):
        return None
    return models[0]


def _classes(annotation: Any) -> Iterator[type]:
    arguments = get_args(annotation)
    if not arguments and isinstance(annotation, type):
        yield annotation
    for argument in arguments:
        yield from _classes(argument)


def _hint(name: str, known: Any) -> str:
    close = get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"
