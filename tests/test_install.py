"""What messages say about packages that are missing."""

import ast
import json
import re
import sys
import tomllib
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from fusion_plugins import install
from fusion_plugins.errors import ConfigError

ROOT = Path(__file__).parents[1]


def _installed_from(monkeypatch, origin):
    class Installed(Distribution):
        def read_text(self, filename):
            return origin if filename == "direct_url.json" else None

        def locate_file(self, path):
            raise NotImplementedError

    monkeypatch.setattr(install, "distribution", lambda name: Installed())


def test_the_command_names_the_checkout_or_wheel_that_is_installed(tmp_path, monkeypatch):
    wheel = tmp_path / "fusion plugins.whl"
    wheel.touch()
    _installed_from(monkeypatch, json.dumps({"url": tmp_path.as_uri(), "dir_info": {"editable": True}}))
    assert install.install_command("score") == f"pip install -e '{tmp_path}[score]'"
    _installed_from(monkeypatch, json.dumps({"url": wheel.as_uri(), "archive_info": {}}))
    assert install.install_command("score") == f"pip install '{wheel}[score]'"


@pytest.mark.parametrize("origin", [None, "", "{", "[]", '{"url": 3}', '{"url": "file:///no/such/place"}'])
def test_without_a_known_origin_the_command_has_a_placeholder(origin, monkeypatch):
    _installed_from(monkeypatch, origin)
    assert install.install_command("ray") == "pip install 'PATH/TO/fusion_plugins[ray]'"


def test_every_extra_exists_and_every_missing_package_names_one():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(install.EXTRA_OF.values()) <= set(extras)
    message = install.missing_package(ModuleNotFoundError(name="math_verify.parser"), "the scorer math")
    assert message.startswith("the scorer math needs the package math_verify, which is not installed: pip install ")
    assert install.missing_package(ModuleNotFoundError(name="fusion_plugins.x"), "x") is None


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("py3langid.langid", r"languages needs the package py3langid, .*: pip install .*\[clean\]'\. Or do without\."),
        ("vllm", r"languages needs the package vllm, .*\[vllm\]', in an environment of its own\. Or do without\."),
        (
            "unheard_of.part",
            r"languages needs the package unheard_of, which is not installed; install it\. Or do without\.",
        ),
    ],
)
def test_the_error_of_a_missing_package_says_how_to_install_it(module, message):
    found = install.missing_package_error(ModuleNotFoundError(name=module), "languages", "Or do without.")
    assert isinstance(found, ConfigError)
    assert re.fullmatch(message, str(found))


@pytest.mark.parametrize("name", ["fusion_plugins.scoring.gone", None])
def test_a_missing_module_of_our_own_is_not_the_users_to_install(name):
    error = ModuleNotFoundError(name=name)
    assert install.missing_package_error(error, "x") is error


def test_every_import_is_of_a_package_that_is_declared():
    """Not of one that happens to come with another: typer, for one, once brought click, and no longer does."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    base = {re.split(r"[<>=\[]", name)[0] for name in dependencies} - {"pyyaml"} | {"yaml", "pydantic_core"}
    imported = {}
    for file in (ROOT / "fusion_plugins").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0]: file.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported[str(node.module).partition(".")[0]] = file.name
    known = {*sys.stdlib_module_names, "fusion_plugins", *base, *install.EXTRA_OF}
    assert {name: file for name, file in imported.items() if name not in known} == {}
