"""The page of the command line, made of the signatures of the commands."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import typer

from fusion_plugins.docstrings import as_markdown

__all__ = ["cli_page"]

INTRODUCTION = """Generated from the commands; `fusion COMMAND --help` prints the same. An option wins over the same key
of a file that `--config` names, and `--set KEY=VALUE` reaches every [key](config.md), nested ones with dots."""
WORDS = {str: "text", int: "whole number", float: "number", bool: "", Path: "path"}


def cli_page() -> str:
    """Return the Markdown of the page."""
    from fusion_plugins.cli import app

    lines = ["# Command line", "", INTRODUCTION, ""]
    for name, command in _commands("fusion", app):
        lines += [f"## {name}", "", as_markdown(inspect.getdoc(command) or ""), ""]
        parameters = inspect.signature(command).parameters.values()
        if parameters:
            lines += ['<div class="keys" markdown>', "", "| option | value | default | meaning |"]
            lines += ["| --- | --- | --- | --- |", *map(_line, parameters), "", "</div>", ""]
    return "\n".join(lines)


def _commands(name: str, app: typer.Typer) -> Iterator[tuple[str, Callable[..., Any]]]:
    for command in app.registered_commands:
        if command.callback is not None:
            yield f"{name} {command.name or command.callback.__name__.replace('_', '-')}", command.callback
    for group in app.registered_groups:
        if group.typer_instance is not None:
            yield from _commands(f"{name} {group.name}", group.typer_instance)


def _line(parameter: inspect.Parameter) -> str:
    annotation, settings = get_args(parameter.annotation)
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType]
    several = get_origin(annotation) is list or get_origin(kinds[0]) is list
    kind = get_args(kinds[0])[0] if get_origin(kinds[0]) is list else kinds[0]
    value = WORDS[kind] + ("" if settings.min is None else f" ≥ {settings.min}") + (", several" if several else "")
    default = parameter.default
    shown = "required" if default is parameter.empty else "" if default is None else f"`{default}`"
    cells = (_flags(parameter.name, kind, settings), value, shown.replace("True", "on").replace("False", "off"))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, settings.help or "")) + " |"


def _flags(name: str, kind: type, settings: Any) -> str:
    if isinstance(settings, typer.models.ArgumentInfo):
        return f"`{name.upper()}`"
    dashed = name.replace("_", "-")
    default = [f"--{dashed}", *([f"--no-{dashed}"] if kind is bool else [])]
    # The first flag that a command names for itself arrives as the default of the annotation.
    named = [flag for flag in (settings.default, *(settings.param_decls or ())) if isinstance(flag, str)]
    return ", ".join(f"`{flag}`" for flag in named or default)
