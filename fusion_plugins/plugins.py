"""The plugin manager, and the one place where a name of a configuration becomes a function or class.

Built-ins and the entry points of installed packages register through the same hooks (:mod:`fusion_plugins.hookspecs`).
``FUSION_PLUGINS_LOAD`` limits which entry points are loaded (comma-separated names, empty for none), to find a bad one.
"""

import os
from collections.abc import Mapping
from functools import cache, partial
from importlib.metadata import entry_points
from typing import Any

import pluggy

from fusion_plugins import hookspecs
from fusion_plugins.errors import PluginError
from fusion_plugins.hookspecs import Register, hookimpl

#: kind of extension -> what messages call one of them; ``register_<kind>`` is its hook
KINDS = {
    "fusion_rules": "fusion rule",
    "aligners": "aligner",
    "losses": "loss",
    "scorers": "scorer",
    "pair_rules": "pair rule",
}
LOAD_VARIABLE = "FUSION_PLUGINS_LOAD"

Registry = Mapping[str, Any]


def get_plugin_manager(*, load: list[str] | None = None) -> pluggy.PluginManager:
    """Return a new manager with the hooks, the built-ins and the entry points registered.

    Args:
        load: names of the entry points to load; ``None`` means all, or those that ``FUSION_PLUGINS_LOAD`` names.

    Raises:
        PluginError: an entry point fails to import, or a plugin implements a hook that does not exist.
    """
    if load is None and LOAD_VARIABLE in os.environ:
        load = [name.strip() for name in os.environ[LOAD_VARIABLE].split(",")]
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(_BuiltIns(), "builtins")
    for entry in entry_points(group=hookspecs.PROJECT):
        if load is not None and entry.name not in load:
            continue
        try:
            manager.register(entry.load(), entry.name)
        # Loading runs the other package's code, so any exception can get here.
        except Exception as error:
            raise PluginError(
                f"plugin {entry.name!r} ({entry.value}) cannot be loaded: {type(error).__name__}: {error}. "
                f"Repair or uninstall it, or leave it out with {LOAD_VARIABLE}=<names of the others>."
            ) from error
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        hooks = ", ".join(f"register_{kind}" for kind in KINDS)
        raise PluginError(f"plugin {manager.get_name(error.plugin)!r}: {error}. The hooks are: {hooks}.") from error
    return manager


def get_registry(kind: str, manager: pluggy.PluginManager | None = None) -> Registry:
    """Return name -> object for one kind of extension.

    Args:
        kind: one of :data:`KINDS`.
        manager: the manager to ask; the shared one by default.

    Raises:
        PluginError: the kind is unknown, or two plugins register one name.
    """
    if kind not in KINDS:
        raise PluginError(f"unknown kind of extension: expected one of {', '.join(KINDS)}, got {kind!r}")
    return _shared_registry(kind) if manager is None else _collect(kind, manager)


def lookup(kind: str, name: str) -> Any:
    """Return the object registered under ``name``.

    Raises:
        PluginError: nothing is registered under that name; the message lists the names that are.
    """
    registry = get_registry(kind)
    if name not in registry:
        raise PluginError(
            f"no {KINDS[kind]} named {name!r}: expected one of {', '.join(sorted(registry))}. Correct the name, or "
            "install the package that registers it."
        )
    return registry[name]


@cache
def _shared_manager() -> pluggy.PluginManager:
    return get_plugin_manager()


@cache
def _shared_registry(kind: str) -> Registry:
    return _collect(kind, _shared_manager())


def _collect(kind: str, manager: pluggy.PluginManager) -> dict[str, Any]:
    found: dict[str, Any] = {}
    owner: dict[str, str] = {}

    def register(plugin: str, name: str, obj: Any) -> None:
        if name in found:
            raise PluginError(
                f"{KINDS[kind]} {name!r} is registered twice, by plugin {owner[name]!r} and by plugin {plugin!r}: "
                f"expected unique names. Rename one, or leave a plugin out with {LOAD_VARIABLE}=<names of the others>."
            )
        found[name], owner[name] = obj, plugin

    # Called one by one and not through pluggy's `manager.hook`, so that the error above can name both plugins.
    for implementation in getattr(manager.hook, f"register_{kind}").get_hookimpls():
        implementation.function(register=partial(register, implementation.plugin_name))
    return found


class _BuiltIns:
    """The built-in extensions, registered through the hooks that other packages use.

    Each hook imports its table only when it is called, so that a run that needs no loss loads no torch.
    """

    @hookimpl
    def register_fusion_rules(self, register: Register) -> None:
        from fusion_plugins.core.fusion.fuse import RULES

        _register_all(register, RULES)

    @hookimpl
    def register_aligners(self, register: Register) -> None:
        from fusion_plugins.core.fusion.align import ALIGNERS

        _register_all(register, ALIGNERS)

    @hookimpl
    def register_losses(self, register: Register) -> None:
        from fusion_plugins.core.fusion.chunk_losses import CHUNK_LOSSES
        from fusion_plugins.core.fusion.divergences import LOSSES

        _register_all(register, {**LOSSES, **CHUNK_LOSSES})

    @hookimpl
    def register_scorers(self, register: Register) -> None:
        from fusion_plugins.scoring import SCORERS

        _register_all(register, SCORERS)

    @hookimpl
    def register_pair_rules(self, register: Register) -> None:
        from fusion_plugins.core.preferences.pairs import PAIR_RULES

        _register_all(register, PAIR_RULES)


def _register_all(register: Register, table: Mapping[str, Any]) -> None:
    for name, obj in table.items():
        register(name, obj)
