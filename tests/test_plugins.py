"""The plugin manager, the hooks and their documentation."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusion_plugins import hookimpl, hookspecs
from fusion_plugins.errors import PluginError
from fusion_plugins.plugins import KINDS, get_plugin_manager, get_registry, lookup

HOOKS = {
    name: function
    for name, function in vars(hookspecs).items()
    if inspect.isfunction(function) and hasattr(function, f"{hookspecs.PROJECT}_spec")
}
DOCUMENT = (Path(__file__).parents[1] / "docs" / "hooks.md").read_text()
BUILT_IN = {
    "fusion_rules": ("fusion_plugins.core.fusion.fuse", "RULES"),
    "aligners": ("fusion_plugins.core.fusion.align", "ALIGNERS"),
    "losses": ("fusion_plugins.core.fusion.divergences", "LOSSES"),
    "scorers": ("fusion_plugins.scoring", "SCORERS"),
    "pair_rules": ("fusion_plugins.core.preferences.pairs", "PAIR_RULES"),
}


def manager_with(*plugins):
    manager = get_plugin_manager(load=[])
    for number, plugin in enumerate(plugins):
        manager.register(plugin, f"plugin{number}")
    return manager


def test_every_hook_has_a_kind_and_every_kind_a_hook():
    assert {f"register_{kind}" for kind in KINDS} == set(HOOKS)
    assert len(HOOKS) == 5


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_in_the_document_with_its_signature(name):
    arguments = ", ".join(inspect.signature(HOOKS[name]).parameters)
    assert f"## {name}({arguments})" in DOCUMENT
    assert HOOKS[name].__doc__


def test_the_document_describes_no_hook_that_does_not_exist():
    assert set(re.findall(r"^## (register_\w+)", DOCUMENT, re.MULTILINE)) == set(HOOKS)


@pytest.mark.parametrize("kind", KINDS)
def test_built_ins_come_in_through_the_hooks(kind):
    module, table = BUILT_IN[kind]
    expected = getattr(__import__(module, fromlist=[table]), table)
    assert expected
    found = get_registry(kind, manager_with())
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_plugin_adds_to_every_kind(kind):
    def register_something(register):
        register("mine", "an object")

    register_something.__name__ = f"register_{kind}"
    plugin = SimpleNamespace(**{f"register_{kind}": hookimpl(register_something)})
    registry = get_registry(kind, manager_with(plugin))
    assert registry["mine"] == "an object"
    assert len(registry) == 1 + len(get_registry(kind, manager_with()))


def test_a_name_that_is_registered_twice_is_an_error_that_names_both_plugins():
    class Plugin:
        @hookimpl
        def register_pair_rules(self, register):
            register("same_source", None)

    with pytest.raises(PluginError, match="pair rule 'same_source' is registered twice") as caught:
        get_registry("pair_rules", manager_with(Plugin()))
    assert "'builtins'" in str(caught.value)
    assert "'plugin0'" in str(caught.value)


def test_a_hook_that_does_not_exist_is_an_error(monkeypatch):
    class Plugin:
        @hookimpl
        def register_everything(self, register):
            register("x", None)

    entry = SimpleNamespace(name="wrong", value="wrong_module", load=Plugin)
    monkeypatch.setattr("fusion_plugins.plugins.entry_points", lambda group: [entry])
    with pytest.raises(PluginError, match=r"'wrong'.*register_everything.*The hooks are: register_fusion_rules"):
        get_plugin_manager()


def test_a_plugin_that_cannot_be_imported_is_an_error_that_names_it_and_can_be_left_out(monkeypatch):
    def load():
        raise ImportError("no module named torchh")

    entry = SimpleNamespace(name="broken", value="broken_module", load=load)
    monkeypatch.setattr("fusion_plugins.plugins.entry_points", lambda group: [entry])
    with pytest.raises(PluginError, match=r"'broken' \(broken_module\) cannot be loaded.*torchh.*FUSION_PLUGINS_LOAD"):
        get_plugin_manager()
    monkeypatch.setenv("FUSION_PLUGINS_LOAD", "")
    assert get_plugin_manager().has_plugin("builtins")
    monkeypatch.setenv("FUSION_PLUGINS_LOAD", "another, broken")
    with pytest.raises(PluginError, match="broken"):
        get_plugin_manager()


def test_unknown_names_and_kinds_are_refused_with_the_known_ones():
    with pytest.raises(PluginError, match="no pair rule named 'best': expected one of .*across_sources.*same_source"):
        lookup("pair_rules", "best")
    with pytest.raises(PluginError, match="expected one of fusion_rules.*got 'rules'"):
        get_registry("rules")
