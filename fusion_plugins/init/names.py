"""Names and paths, as the files of a run write them."""

import os
from pathlib import Path

from fusion_plugins.errors import ConfigError
from fusion_plugins.hub import hub_dataset, is_hub


def short_names(names: list[str]) -> dict[str, str]:
    """Return name -> short name: the last part, made different from those before it."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"expected different models, got {', '.join(twice)} twice. "
            "The target is captured by itself and needs no second mention; name every source once."
        )
    short: dict[str, str] = {}
    for name in names:
        last = Path(name.rstrip("/")).name if Path(name).is_dir() else name.rstrip("/").rsplit("/", 1)[-1]
        last = "".join(letter if letter.isascii() and letter.isalnum() or letter in "._-" else "-" for letter in last)
        last = last.lower().strip(".-") or "model"
        candidate, number = last, 2
        while candidate in short.values():
            candidate, number = f"{last}-{number}", number + 1
        short[name] = candidate
    return short


def seen_from(folder: str, path: str) -> str:
    """Return a path of this folder as another folder sees it.

    A name on the hub and an absolute path stay as they are. A file of the folder begins with ``./``, because mergekit
    asks the hub about names like "word/word".

    Example:
        >>> seen_from("runs/one", "org/name"), seen_from("one", "/data/a.jsonl")
        ('org/name', '/data/a.jsonl')
    """
    if is_hub(path) and (place := hub_dataset(path).name) != (seen := seen_from(folder, place)):
        return path.replace(place, seen, 1)
    if os.path.isabs(path) or not Path(path).exists():
        return path
    # Programs that run there know no links above them.
    seen = Path(os.path.relpath(path, os.path.realpath(folder))).as_posix()
    return seen if seen.startswith("..") else f"./{seen}"
