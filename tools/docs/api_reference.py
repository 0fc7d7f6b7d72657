"""The pages of the Python interface: the names in ``__all__`` of the public modules, and no others.

A name may be resolved on first use, out of a module that is not public. Only importing it tells where it is defined;
what is rendered is read from there, under the public name.
"""

import inspect
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from fusion_plugins.docstrings import as_markdown

__all__ = ["PAGES", "api_page"]

#: page -> its title and the public modules on it
PAGES = {
    "core": ("Core", ("fusion_plugins.core",)),
    "store": ("Store", ("fusion_plugins.store",)),
    "scoring": ("Scoring", ("fusion_plugins.scoring",)),
    "hosts": ("Sources and hosts", ("fusion_plugins.sources", "fusion_plugins.axolotl", "fusion_plugins.mergekit")),
    "package": ("Package, hooks, errors", ("fusion_plugins", "fusion_plugins.hookspecs", "fusion_plugins.errors")),
}
PACKAGE = "fusion_plugins"
PUBLIC = {module for _, modules in PAGES.values() for module in modules}
OPTIONS = """    options:
      heading: {name}
      toc_label: {short}
      heading_level: 3"""


def api_page(name: str) -> str:
    """Return the Markdown of one of :data:`PAGES`, with directives that mkdocstrings renders."""
    title, modules = PAGES[name]
    lines = [f"# {title}", ""]
    for module in map(import_module, modules):
        lines += [f"## `{module.__name__}`", "", as_markdown(inspect.getdoc(module) or ""), ""]
        lines += list(_entries(module))
    return "\n".join(lines)


def _entries(module: ModuleType) -> Iterator[str]:
    # Hooks are called by name and imported by nobody, so that no `__all__` lists them.
    hooks = [name for name, obj in vars(module).items() if hasattr(obj, f"{PACKAGE}_spec")]
    public = sorted({*getattr(module, "__all__", ()), *hooks}, key=str.lower)
    if not public:
        yield "No Python name of this package is public: it is used through its commands and files.\n"
    for name in public:
        obj = getattr(module, name)
        home = getattr(obj, "__module__", "")
        if not (inspect.isclass(obj) or inspect.isfunction(obj)):
            yield f"### `{module.__name__}.{name}`\n\n{_about(obj)}\n"
        elif home != module.__name__ and home in PUBLIC:
            yield f"### `{module.__name__}.{name}`\n\nThe same as [`{home}.{name}`][{home}.{name}].\n"
        else:
            heading = OPTIONS.format(name=f"{module.__name__}.{name}", short=name)
            yield f"::: {home}.{obj.__qualname__}\n{heading}\n"


def _about(obj: Any) -> str:
    """What there is to say about a name that is neither a class nor a function."""
    if isinstance(obj, dict):
        return "A table of " + ", ".join(f"`{key}`" for key in obj) + "."
    kind = type(obj)
    is_own_value = kind.__module__ in ("builtins", "types", "typing", "collections.abc", "collections")
    return f"`{obj!r}`" if is_own_value else f"A `{kind.__module__.partition('.')[0]}.{kind.__name__}`."
