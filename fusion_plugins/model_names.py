"""What the name of a model means, before a library asks the hub for it, and why a model cannot be loaded."""

import re
from pathlib import Path

#: the hub's own form: a name, or an owner and a name
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


def missing_folder(name: str) -> str | None:
    """Return what is wrong with a name that can only be a folder; None for a folder that is there and for hub names.

    Example:
        >>> missing_folder("../nowhere")
        "there is no folder '../nowhere'"
        >>> missing_folder("mistralai/Mistral-7B-v0.1") is None
        True
    """
    path = Path(name)
    if name and path.is_dir():
        return None
    if name and path.exists():
        return f"expected a folder or a name on the hub, got the file {name!r}"
    if _HUB.fullmatch(name) and not name.startswith("."):
        return None
    home = ", and ~ is not expanded here" if name.startswith("~") else ""
    return f"there is no folder {name!r}{home}"


def is_same_model(name: str | None, other: str) -> bool:
    """Return whether two names mean one model; two spellings of one folder do."""
    if name is None or name == other:
        return name == other
    return Path(name).is_dir() and Path(other).is_dir() and Path(name).resolve() == Path(other).resolve()


def require_model(name: str) -> None:
    """Raise what a library raises for a model that it does not find, before it asks the hub for a name like a path.

    Raises:
        FileNotFoundError: see :func:`missing_folder`.
    """
    if problem := missing_folder(name):
        raise FileNotFoundError(problem)


def reason_of(error: BaseException) -> str:
    r"""Return in one line why a library could not load a model, for a message.

    The files of a model come from outside, and libraries fail on damaged ones with errors of any type.

    Example:
        >>> reason_of(TypeError("wrong size:\n  'x'.")), reason_of(KeyError())
        ("wrong size: 'x'", 'KeyError')
    """
    text = " ".join(str(error).split()).rstrip(".")[:500]
    return text if text and not isinstance(error, KeyError) else f"{type(error).__name__} {text}".rstrip()
