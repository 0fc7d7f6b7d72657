"""The configurations that come with the package."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.recipes import FOLDERS, recipe_files

ROOT = Path(__file__).parents[1]


def _recipes(*arguments):
    return CliRunner().invoke(app, ["recipes", *map(str, arguments)])


def test_every_recipe_of_the_repository_is_listed():
    files = {
        path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()
    }
    assert {"axolotl_configs/fusechat3_llama.yml", "mergekit_configs/varm.yml"} <= files
    assert set(_recipes().output.split()) == files


def test_recipes_are_copied_and_a_changed_one_is_kept(tmp_path):
    assert _recipes("--out", tmp_path).exit_code == 0
    recipe = tmp_path / "mergekit_configs" / "varm.yml"
    assert recipe.read_bytes() == (ROOT / "mergekit_configs" / "varm.yml").read_bytes()
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == len(recipe_files())
    assert _recipes("--out", tmp_path).exit_code == 0
    recipe.write_text("mine")
    assert "mergekit_configs/varm.yml" in str(_recipes("--out", tmp_path).exception)
    assert recipe.read_text() == "mine"


def test_one_recipe_is_copied_alone(tmp_path):
    assert _recipes("mergekit_configs/varm.yml", "--out", tmp_path).exit_code == 0
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["varm.yml"]


@pytest.mark.parametrize("name", ["varm.yml", "../README.md", "mergekit_configs"])
def test_an_unknown_name_is_refused(name, tmp_path):
    assert f"got {name!r}" in str(_recipes(name, "--out", tmp_path).exception)
