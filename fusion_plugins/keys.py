"""Every configuration key with its legal values, made of the models that read them; the command ``fusion keys``.

Nothing of it is written by hand, so that it cannot be behind the code. The reference of the documentation is made of
the same sections.
"""

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.table import Table

from fusion_plugins.docstrings import as_markdown, entries, first_sentence
from fusion_plugins.errors import ConfigError
from fusion_plugins.terminal import console, say

#: (topic of `fusion keys`, title, where the keys stand in the YAML file, the objects with the keys): the first object
#: has the keys, a later one may have the meaning. Mergekit wraps the methods, so their keys are in the documents alone.
READERS: tuple[tuple[str | None, str, str, tuple[str, ...]], ...] = (
    ("axolotl", "axolotl", "fusion", ("fusion_plugins.axolotl.args:FusionBlock",)),
    ("capture", "fusion capture", "", ("fusion_plugins.sources.capture_config:CaptureConfig",)),
    ("sample", "fusion sample", "", ("fusion_plugins.sources.sample_config:SampleConfig",)),
    ("clean", "fusion clean", "", ("fusion_plugins.scoring.clean:CleanConfig",)),
    ("cut", "fusion cut", "", ("fusion_plugins.sources.cut:CutConfig",)),
    ("doctor", "fusion doctor", "", ("fusion_plugins.doctor.examine:DoctorConfig",)),
    ("report", "fusion report", "", ("fusion_plugins.report:ReportConfig",)),
    ("run", "fusion run", "", ("fusion_plugins.chain.settings:ChainSettings",)),
    ("rounds", "fusion rounds", "", ("fusion_plugins.chain.round_settings:RoundsConfig",)),
    (
        "transformers",
        "Backend `transformers`",
        "options",
        ("fusion_plugins.sources.backends.transformers_local:TransformersOptions",),
    ),
    ("vllm", "Backend `vllm`", "options", ("fusion_plugins.sources.backends.vllm_engine:VllmOptions",)),
    ("openai", "Backend `openai`", "options", ("fusion_plugins.sources.backends.openai_server:ServerOptions",)),
    ("ray", "Backend `ray`", "options", ("fusion_plugins.sources.backends.ray_data:RayOptions",)),
    ("score", "fusion score", "", ("fusion_plugins.scoring.score:ScoreConfig",)),
    ("math", "Scorer `math`", "scorers.math", ("fusion_plugins.scoring.math_scorer:MathScorer",)),
    ("code", "Scorer `code`", "scorers.code", ("fusion_plugins.scoring.code_scorer:CodeScorer",)),
    ("code", "Scorer `code`: limits", "scorers.code", ("fusion_plugins.scoring.sandbox:Limits",)),
    ("reward", "Scorer `reward`", "scorers.reward", ("fusion_plugins.scoring.reward:RewardOptions",)),
    (
        "reward",
        "Scorer `reward`: backend `server`",
        "scorers.reward.options",
        ("fusion_plugins.scoring.reward_backends.server:RewardServerOptions",),
    ),
    ("judge", "Scorer `judge`", "scorers.judge", ("fusion_plugins.scoring.judge:JudgeOptions",)),
    (
        None,
        "mergekit: `merge_method: varm`",
        "parameters",
        ("fusion_plugins.mergekit.methods:varm", "fusion_plugins.core.merging.varm:VarmRule"),
    ),
    (
        None,
        "mergekit: `merge_method: fusechat_sce`",
        "parameters",
        ("fusion_plugins.mergekit.methods:fusechat_sce",),
    ),
)
#: (class, field) -> table of the names that the field takes, where neither its type nor a registry has them.
NAMED = {
    ("SftArgs", "rule"): "fusion_plugins.core.preferences.best:BEST_RULES",
    ("SampledSource", "preset"): "fusion_plugins.sources.presets:PRESETS",
    ("RewardOptions", "preset"): "fusion_plugins.scoring.reward_presets:REWARD_PRESETS",
}
#: A description that says this means that other packages can add names.
REGISTERED = re.compile(r"registered (fusion rule|aligner|loss|pair rule)")
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
WORDS = {
    str: "text",
    Path: "text",
    int: "whole number",
    float: "number",
    bool: "`true`, `false`",
    NoneType: "`null`",
    Any: "any value",
}


@dataclass(frozen=True)
class Key:
    """One line of the page: where a key stands, what it may be, what it is without being set, and what it means."""

    path: str
    values: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """The keys of one block."""

    title: str
    about: str
    keys: tuple[Key, ...]


def topics() -> list[str]:
    """Return the names that :func:`sections` takes."""
    return list(dict.fromkeys(topic for topic, *_ in READERS if topic is not None))


def sections(topic: str | None = None) -> Iterator[Section]:
    """Yield the sections of one topic, or of all of them.

    Raises:
        LookupError: a table of this module names a field that does not exist.
    """
    if topic is None:
        fields = {(model.__name__, name) for model in _models() for name in model.model_fields}
        if gone := set(NAMED) - fields:
            raise LookupError(f"{__name__}: NAMED has fields that do not exist: {sorted(gone)}")
    for name, title, prefix, places in READERS:
        if topic not in (None, name):
            continue
        first, *others = (_load(place) for place in places)
        if inspect.isclass(first) and issubclass(first, BaseModel):
            yield from _model_sections(title, prefix, first)
            continue
        meanings = {key: text for obj in (first, *others) for key, text in entries(obj).items()}
        yield Section(title, first_sentence(first), tuple(_signature_keys(prefix, first, meanings)))


def keys(
    topic: Annotated[
        str | None, typer.Argument(help="capture, sample, axolotl, ...; without it the topics are listed.")
    ] = None,
) -> None:
    """List every key of a configuration file, with its legal values, its default and its meaning.

    For example: `fusion keys capture`, or `fusion keys axolotl` for the `fusion:` block of axolotl's file.
    """
    if topic is None:
        table = Table("topic", "keys of")
        for name, title, prefix, _ in (reader for reader in READERS if reader[0] is not None):
            table.add_row(name, f"{title}, {prefix}" if prefix else title)
        console().print(table)
        return
    if topic not in topics():
        raise ConfigError(f"expected one of the topics {', '.join(topics())}, got {topic!r}")
    for section in sections(topic):
        say(section.title.replace("`", ""))
        table = Table("key", "legal values", "default", "meaning")
        for key in section.keys:
            table.add_row(*(text.replace("`", "") for text in (key.path, key.values, key.default, key.meaning)))
        console().print(table)


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _models() -> Iterator[type[BaseModel]]:
    waiting = [_load(places[0]) for *_, places in READERS]
    while waiting:
        model = waiting.pop()
        if inspect.isclass(model) and issubclass(model, BaseModel):
            yield model
            waiting += [inner for field in model.model_fields.values() for inner in _inner_models(field.annotation)]


def _model_sections(title: str, prefix: str, model: type[BaseModel]) -> Iterator[Section]:
    keys, blocks = [], []
    for name, field in model.model_fields.items():
        path = f"{prefix}.{name}" if prefix else name
        keys.append(Key(path, _field_values(model, name, field), _default(field), _meaning(field)))
        for inner in _inner_models(field.annotation):
            mark = "[]" if _is_list(field.annotation) else ".NAME" if _is_mapping(field.annotation) else ""
            blocks.append((f"{path}{mark}", inner))
    yield Section(title, first_sentence(model), tuple(keys))
    for path, inner in blocks:
        yield from _model_sections(f"{title}: `{path}`", path, inner)


def _meaning(field: FieldInfo) -> str:
    """The description as Markdown; what is no sentence but code (`fusion_plugins.x`, an arrow) is marked as such."""
    text = as_markdown(field.description or "").replace("->", "→")
    return re.sub(r"(?<!`)\bfusion_plugins\.[\w.]+", lambda match: f"`{match[0]}`", text)


def _field_values(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    if (model.__name__, name) in NAMED:
        names = [f"`{value}`" for value in _load(NAMED[model.__name__, name])]
        return ", ".join([*names, *(["`null`"] if NoneType in get_args(field.annotation) else [])])
    if found := REGISTERED.search(field.description or ""):
        from fusion_plugins.plugins import get_plugin_manager, get_registry

        kind = f"{found[1].replace(' ', '_')}{'es' if found[1].endswith('s') else 's'}"
        registered = get_registry(kind, get_plugin_manager(load=[]))
        return ", ".join(f"`{value}`" for value in registered) + f", or the name of a {found[0]}"
    return _values(field.annotation, field.metadata)


def _values(annotation: Any, metadata: Any = ()) -> str:
    """The legal values of a type, in words; ``metadata`` are pydantic's constraints on it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(arguments[0], (*arguments[1:], *metadata))
    if origin is Literal:
        return ", ".join(f"`{value if isinstance(value, str) else json.dumps(value)}`" for value in arguments)
    if origin in (Union, UnionType):
        return ", ".join(_values(argument, metadata) for argument in arguments)
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "a block, see below"
    if annotation in WORDS:
        return _names(metadata) or f"{WORDS[annotation]}{_limits(metadata) if annotation in (int, float) else ''}"
    if _is_mapping(annotation):
        return f"mapping of {_values(arguments[0])} to {_values(arguments[1])}"
    return f"list of {_values(arguments[0]).replace('a block', 'blocks')}"


def _names(metadata: Any) -> str:
    return next(
        (", ".join(f"`{name}`" for name in value) for value in _enclosed(metadata) if isinstance(value, tuple)), ""
    )


def _limits(metadata: Any) -> str:
    signs = [
        f"{sign} {getattr(item, name):g}" for item in metadata for name, sign in SIGNS.items() if hasattr(item, name)
    ]
    if signs:
        return f" {' and '.join(signs)}"
    return next((value[8:] for value in _enclosed(metadata) if str(value).startswith("a number ")), "")


def _enclosed(metadata: Any) -> Iterator[Any]:
    """What validators hold in their closures: those of the merge methods know their legal values in no other way."""
    for item in metadata:
        if inspect.isfunction(check := getattr(item, "func", None)):
            yield from inspect.getclosurevars(check).nonlocals.values()


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) in (list, tuple)


def _is_mapping(annotation: Any) -> bool:
    return inspect.isclass(get_origin(annotation)) and issubclass(get_origin(annotation), dict)


def _inner_models(annotation: Any) -> list[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _inner_models(argument)]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "its own defaults" if isinstance(value, BaseModel) else _literal(value)


def _literal(value: Any) -> str:
    if value is inspect.Parameter.empty or value is PydanticUndefined:
        return "required"
    return f"`{json.dumps(value, ensure_ascii=False)}`" if not isinstance(value, str) else f"`{value}`"


def _signature_keys(prefix: str, obj: Any, meanings: dict[str, str]) -> Iterator[Key]:
    """The keys of a function, a class or a dataclass whose parameters are the settings."""
    for parameter in inspect.signature(obj).parameters.values():
        hosts_own = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty
        # This argument of the merge methods comes from the plan of a merge, not from the YAML.
        hosts_own |= parameter.name == "planned"
        if parameter.kind is parameter.VAR_KEYWORD or hosts_own and not is_dataclass(obj):
            continue
        values = _values(parameter.annotation)
        yield Key(f"{prefix}.{parameter.name}", values, _literal(parameter.default), meanings.get(parameter.name, ""))
