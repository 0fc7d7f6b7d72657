"""What the package exports, and what importing it loads."""

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import fusion_plugins
import fusion_plugins.core
from fusion_plugins import errors

ROOT = Path(__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(fusion_plugins.__path__, "fusion_plugins."))
MODULES_AND_PACKAGE = ["fusion_plugins", *MODULES]
CORE = sorted(module.name for module in pkgutil.walk_packages(fusion_plugins.core.__path__, "fusion_plugins.core."))
HOSTS = (
    "axolotl",
    "mergekit",
    "vllm",
    "transformers",
    "datasets",
    "trl",
    "ray",
    "pyarrow",
    "pydantic",
    "pluggy",
    "typer",
    "rich",
)
HEAVY = (
    "torch",
    "numba",
    "numpy",
    "transformers",
    "pyarrow",
    "axolotl",
    "mergekit",
    "vllm",
    "pydantic",
    "typer",
    "rich",
)
#: modules that run as programs or belong to a package that only another environment has
NOT_IMPORTED_HERE = {
    "fusion_plugins.sources.backends.vllm_engine",
    "fusion_plugins.scoring.reward_backends.vllm_engine",
}

# Import each module with an empty slate and say what came with it; torch and numpy may be there already, hosts not.
WALK = """
import importlib, json, sys
names, hosts = json.loads(sys.argv[1])
loaded = {}
for name in names:
    for other in [other for other in sys.modules if other.startswith("fusion_plugins")]:
        del sys.modules[other]
    importlib.import_module(name)
    loaded[name] = sorted(host for host in hosts if host in sys.modules)
print(json.dumps(loaded))
"""


def loaded_by(code, watched):
    program = f"import sys, json; {code}; print(json.dumps([name for name in {list(watched)} if name in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import fusion_plugins", HEAVY) == []


@pytest.mark.parametrize("name", ["FusionError", "hookimpl", "__version__"])
def test_light_names_of_the_package_load_no_torch(name):
    assert loaded_by(f"import fusion_plugins; fusion_plugins.{name}", ("torch", "transformers", "axolotl")) == []


def test_asking_for_scorers_and_pair_rules_loads_no_torch():
    code = "from fusion_plugins.plugins import get_registry; get_registry('scorers'); get_registry('pair_rules')"
    assert loaded_by(code, ("torch", "transformers", "math_verify")) == []


def test_the_command_line_starts_without_torch_or_hosts():
    assert (
        loaded_by("import fusion_plugins.cli", ("torch", "transformers", "axolotl", "mergekit", "vllm", "datasets"))
        == []
    )


def test_the_preference_data_set_type_is_found_on_the_package():
    assert callable(fusion_plugins.multi_source_dpo)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fusion_plugins.no_such_name


def test_core_modules_import_no_host_no_file_format_and_no_adapter():
    assert len(CORE) >= 12
    adapters = [
        f"fusion_plugins.{name}" for name in ("axolotl", "mergekit", "sources", "scoring", "store", "doctor", "cli")
    ]
    watched = [*HOSTS, *adapters, "fusion_plugins.plugins", "fusion_plugins.hookspecs"]
    run = subprocess.run(
        [sys.executable, "-c", WALK, json.dumps([CORE, watched])], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    loaded = json.loads(run.stdout)
    assert {name: found for name, found in loaded.items() if found} == {}


def test_core_loads_torch_only_where_tensors_are_the_subject():
    with_torch = set()
    for name in CORE:
        source = Path(importlib.import_module(name).__file__).read_text()
        if "import torch" in source or "from torch" in source:
            with_torch.add(name.rpartition(".")[2])
    losses = {"chunk_losses", "divergences", "entries", "logit_change", "losses", "one_pass"}
    assert with_torch <= losses | {"varm", "sce", "deltas"}


def test_the_public_names_are_those_of_the_checked_in_list():
    """A name is public when a package exports it; adding or removing one is a decision, so the list is written down."""
    listed = json.loads((ROOT / "tests" / "public_names.json").read_text(encoding="utf-8"))
    found = {}
    for name in MODULES_AND_PACKAGE:
        if name in NOT_IMPORTED_HERE:
            continue
        module = importlib.import_module(name)
        if hasattr(module, "__all__"):
            found[name] = sorted(module.__all__)
            assert [item for item in module.__all__ if not hasattr(module, item)] == []
    assert found == listed


@pytest.mark.parametrize("name", [name for name in MODULES if name not in NOT_IMPORTED_HERE])
def test_every_module_can_be_imported_by_itself(name):
    assert importlib.import_module(name).__doc__


def test_every_error_is_exported_drawn_in_the_tree_and_no_import_error():
    found = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert found == set(errors.__all__)
    for name in found:
        assert name in errors.__doc__
        assert issubclass(getattr(errors, name), errors.FusionError)
        # A host that loads plugins swallows ImportError and goes on without the plugin.
        assert not issubclass(getattr(errors, name), ImportError)
