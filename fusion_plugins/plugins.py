"""The plugin manager: built-ins, then the entry points of installed packages, all through the same hooks.

``FUSION_PLUGINS_LOAD`` limits which entry points are loaded (comma-separated names, empty for none), to find a bad one.
"""

import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import pluggy

from fusion_plugins import hookspecs
from fusion_plugins.errors import PluginError
from fusion_plugins.hookspecs import Register, hookimpl

__all__ = ["KINDS", "Registry", "get_plugin_manager", "get_registry", "lookup"]

KINDS = ("fusion_rules", "aligners", "losses", "scorers", "pair_rules")
LOAD_VARIABLE = "FUSION_PLUGINS_LOAD"

Registry = Mapping[str, Any]


def get_plugin_manager(*, load: list[str] | None = None) -> pluggy.PluginManager:
    """Make a manager with the specs, the built-ins and the entry points registered.

    Args:
        load: names of the entry points to load; ``None`` means all, or those that ``FUSION_PLUGINS_LOAD`` names.

    Raises:
        PluginError: an entry point fails to import, or a plugin implements a hook that does not exist.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(_BuiltIns(), "builtins")
    wanted = _wanted(load)
    for entry in entry_points(group=hookspecs.PROJECT):
        if wanted is not None and entry.name not in wanted:
            continue
        try:
            manager.register(entry.load(), entry.name)
        except Exception as error:
            raise PluginError(
                f"plugin {entry.name!r} ({entry.value}) cannot be loaded: {type(error).__name__}: {error}. "
                f"Repair or uninstall it, or leave it out with {LOAD_VARIABLE}=<names of the others>."
            ) from error
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        name = manager.get_name(error.plugin)
        raise PluginError(f"plugin {name!r}: {error}. The hooks are: {', '.join(_hook_names())}.") from error
    return manager


def get_registry(kind: str, manager: pluggy.PluginManager | None = None) -> Registry:
    """Return name -> object for one kind of extension.

    Args:
        kind: one of :data:`KINDS`.
        manager: the manager to ask; the shared one by default.

    Raises:
        PluginError: the kind is unknown, or a name is registered twice.
    """
    if kind not in KINDS:
        raise PluginError(f"unknown kind of extension {kind!r}; expected one of {', '.join(KINDS)}")
    if manager is None:
        return _shared_registry(kind)
    return _collect(kind, manager)


def lookup(kind: str, name: str) -> Any:
    """Return the object registered under ``name``, or say which names there are.

    Raises:
        PluginError: nothing is registered under that name.
    """
    registry = get_registry(kind)
    if name not in registry:
        raise PluginError(f"no {kind[:-1].replace('_', ' ')} named {name!r}; known: {', '.join(sorted(registry))}")
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
    hook = f"register_{kind}"
    # One plugin at a time, so that an error can name both owners of a name.
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        implementation.function(register=_registrar(kind, found, owner, implementation.plugin_name))
    return found


def _registrar(kind: str, found: dict[str, Any], owner: dict[str, str], plugin: str) -> Callable[[str, Any], None]:
    def register(name: str, obj: Any) -> None:
        if name in found:
            raise PluginError(
                f"{kind[:-1].replace('_', ' ')} {name!r} is registered twice, by plugin {owner[name]!r} and by plugin "
                f"{plugin!r}; names are unique, so one of them must choose another"
            )
        found[name] = obj
        owner[name] = plugin

    return register


def _wanted(load: list[str] | None) -> set[str] | None:
    if load is not None:
        return set(load)
    value = os.environ.get(LOAD_VARIABLE)
    return None if value is None else {name.strip() for name in value.split(",") if name.strip()}


def _hook_names() -> list[str]:
    return [f"register_{kind}" for kind in KINDS]


class _BuiltIns:
    """The built-in extensions, registered through the hooks that other packages use.

    Each hook imports its table only when it is asked, so that a run that needs no loss loads no torch.
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
        from fusion_plugins.core.fusion.losses import LOSSES

        _register_all(register, LOSSES)

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
