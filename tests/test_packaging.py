"""The wheel holds the package, its recipes, the mergekit hook and nothing else."""

import re
import tomllib
import zipfile
from pathlib import Path

import pytest

from fusion_plugins.recipes import FOLDERS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(wheel_file):
    return zipfile.ZipFile(wheel_file)


def test_wheel_has_the_package_and_the_hook_at_top_level(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fusion_plugins", "fusion_plugins_mergekit.pth"}


def test_wheel_has_every_module_and_the_type_marker(wheel):
    names = set(wheel.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fusion_plugins").rglob("*.py")}
    assert len(modules) > 20
    assert modules <= names
    assert "fusion_plugins/py.typed" in names


def test_wheel_has_the_templates(wheel):
    """They are no Python modules, so the build has to take them along."""
    files = [path for path in (ROOT / "fusion_plugins" / "templates").rglob("*") if path.is_file()]
    templates = {str(path.relative_to(ROOT)) for path in files}
    assert {"doctor.html", "merge.html", "page.html", "training.yml"} <= {Path(name).name for name in templates}
    assert templates <= set(wheel.namelist())
    for name in templates:
        assert wheel.read(name) == (ROOT / name).read_bytes() != b""


def test_wheel_has_every_recipe_under_the_name_that_the_documents_use(wheel):
    files = {
        path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()
    }
    shipped = {name.removeprefix("fusion_plugins/shipped/") for name in wheel.namelist() if "/shipped/" in name}
    assert shipped == files


def test_the_description_has_no_link_or_picture_that_needs_the_repository(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    text = wheel.read(metadata).decode()
    assert "LLM fusion inside the tools you already use" in text
    assert "](http" in text
    assert re.findall(r"\]\((?!http)[^)]*\)", text) == []


def test_hook_is_one_guarded_line_of_the_standard_library(wheel):
    lines = wheel.read("fusion_plugins_mergekit.pth").decode().strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("import ")


def test_base_dependencies_pull_in_no_host():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = " ".join(project["dependencies"])
    assert not any(host in base for host in ("torch", "transformers", "axolotl", "mergekit", "vllm", "deepspeed"))


def test_all_extra_names_every_extra_that_shares_the_environment():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(everything.split("[")[1].rstrip("]").split(","))
    assert named == set(extras) - {"all", "vllm"}
