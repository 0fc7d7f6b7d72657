"""The examples in the documents and docstrings run, links lead somewhere, and the generated pages are complete."""

import doctest
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

import fusion_plugins.core
from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.plugins import get_plugin_manager, get_registry
from fusion_plugins.scoring.score import ScoreConfig
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.sources.cut import CutConfig
from fusion_plugins.sources.sample_config import SampleConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "docs"))

from check_site import problems_of
from stage import GENERATED

from fusion_plugins.docstrings import as_markdown, entries

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")])
TUTORIALS = sorted(ROOT.glob("docs/tutorials/*.md"))
CORE = sorted(module.name for module in pkgutil.walk_packages(fusion_plugins.core.__path__, "fusion_plugins.core."))
PUBLIC = ("", ".core", ".store", ".scoring", ".axolotl", ".hookspecs", ".errors")


def test_there_are_documents_and_core_modules():
    assert len(DOCUMENTS) >= 4
    assert len(CORE) >= 8
    assert len(TUTORIALS) == 4


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_examples_in_documents_run(path):
    result = doctest.testfile(str(path), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", CORE)
def test_examples_in_core_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path):
    prose = "\n".join(line for line in path.read_text().splitlines() if not line.startswith((">>>", "...")))
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
        is_generated = os.path.relpath(path.parent / target, ROOT / "docs") in GENERATED
        assert is_generated or (path.parent / target).exists(), f"{path.name} links to {target}"


# Tutorials: every block of every one, in order, in one shell, as a reader would run them.


def blocks_of(path):
    return re.findall(r"^```bash\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def run_in_shell(script, folder):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1500,
    )


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """What the first block of every tutorial makes, made once."""
    folder = tmp_path_factory.mktemp("tutorial")
    done = run_in_shell(f"python {ROOT}/examples/tutorial/tiny_models.py make tutorial", folder)
    assert done.returncode == 0, done.stdout[-4000:]
    return folder / "tutorial"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_begin_with_the_same_material(path):
    assert blocks_of(path)[0].startswith("python examples/tutorial/tiny_models.py make tutorial\ncd tutorial\n")


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_every_block_of_a_tutorial_runs_in_order(path, material, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(material, tmp_path / "tutorial")
    done = run_in_shell("\n".join(blocks_of(path)), tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    made = {
        "fusellm": ("doctor/doctor.html", "fused/fusion_report.json", "fused/model.safetensors"),
        "fusechat": ("merged/model.safetensors", "merged/fusion_merge.json", "merged/fusion_report.html"),
        "fusechat3": (
            *("sft/fusion_sft.json", "dpo/fusion_pairs.json", "dpo/model.safetensors", "pairs.jsonl"),
            *("infifpo/model.safetensors", "wrpo/model.safetensors", "wrpo/fusion_pairs.json"),
        ),
        "rounds": ("tuned/fusion_sft.json", "rounds/rounds.svg", "rounds/01/model/fusion_report.json"),
    }[path.stem]
    assert all((tmp_path / "tutorial" / name).is_file() for name in made)


# The generated pages. They are made in a process of their own, because torch and the hosts are hidden there.


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged")
    command = [sys.executable, str(ROOT / "tools" / "docs" / "build.py"), "--stage-only", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.md")}


def test_every_generated_page_is_made_and_is_in_the_navigation(pages):
    assert set(pages) >= GENERATED
    navigation = re.findall(r'"([^"]+\.md)"', (ROOT / "zensical.toml").read_text())
    assert sorted(navigation) == sorted(pages)


def keys_of(model, prefix):
    """Every key below a model, as a YAML file has it."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for inner, mark in nested(field.annotation):
            yield from keys_of(inner, f"{prefix}{name}{mark}.")


def nested(annotation, mark=""):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, mark)]
    origin = getattr(annotation, "__origin__", None)
    mark = {list: "[]", dict: ".NAME"}.get(origin, mark)
    return [found for argument in getattr(annotation, "__args__", ()) for found in nested(argument, mark)]


@pytest.mark.parametrize(
    ("model", "prefix"),
    [(FusionBlock, "fusion."), (CaptureConfig, ""), (SampleConfig, ""), (CutConfig, ""), (ScoreConfig, "")],
)
def test_every_key_has_one_line_with_values_and_meaning(pages, model, prefix):
    lines = [line for line in pages["reference/config.md"].splitlines() if line.startswith("| `")]
    for key in keys_of(model, prefix):
        found = [line.split(" | ") for line in lines if line.startswith(f"| `{key}`")]
        assert found, f"no line for {key}"
        assert all(len(cells) == 4 and all(cell.strip(" |") for cell in cells) for cells in found)


@pytest.mark.parametrize("kind", ["fusion_rules", "aligners", "losses", "pair_rules", "scorers"])
def test_every_registered_name_is_a_legal_value_on_the_page(pages, kind):
    for name in get_registry(kind, get_plugin_manager(load=[])):
        assert f"`{name}`" in pages["reference/config.md"]


def test_values_and_bounds_of_the_merge_methods_are_on_the_page(pages):
    from fusion_plugins.core.merging.sce import VARIANTS
    from fusion_plugins.core.merging.varm import GRANULARITIES, NORMALIZATIONS

    lines = {line.split("`")[1]: line for line in pages["reference/config.md"].splitlines() if line.startswith("| `")}
    expected = {"granularity": GRANULARITIES, "normalize": NORMALIZATIONS, "variant": VARIANTS}
    for name, values in expected.items():
        assert all(f"`{value}`" in lines[f"parameters.{name}"] for value in values)
    assert "at most 1" in lines["parameters.select_topk"]


def test_every_command_and_option_is_on_the_page(pages):
    page = pages["reference/cli.md"]
    done = subprocess.run(
        [Path(sys.executable).with_name("fusion"), "--help"], capture_output=True, text=True, check=True
    )
    commands = set(re.findall(r"^[│|] (\w[\w-]*) ", done.stdout, flags=re.MULTILINE))
    assert len(commands) >= 9
    assert all(f"## fusion {command}" in page for command in commands)
    assert {"`--config`, `-c`", "`--set`", "`--dry-run`", "`--chain`, `--no-chain`", "`SOURCES`"} <= set(
        re.findall(r"^\| (.*?) \|", page, flags=re.MULTILINE)
    )


@pytest.mark.parametrize("suffix", PUBLIC)
def test_every_public_name_is_on_an_interface_page(pages, suffix):
    module = importlib.import_module(f"fusion_plugins{suffix}")
    text = "\n".join(page for name, page in pages.items() if name.startswith("reference/api/"))
    for name in getattr(module, "__all__", ()):
        assert re.search(rf"\b{re.escape(module.__name__)}\.{name}\b", text), name


def test_examples_for_doctest_are_code_on_the_pages(pages):
    assert "```pycon\n>>> from fusion_plugins" in pages["concepts.md"]
    assert all(page.count("\n```") % 2 == 0 for page in pages.values())


def test_pictures_say_what_they_show(pages):
    for name, page in pages.items():
        for text in re.findall(r"!\[([^\]]*)\]\(", page):
            assert len(text) > 20, f"{name}: a picture with the text {text!r}"


def test_recipes_are_a_page_and_links_to_them_lead_there(pages):
    recipes = [*ROOT.glob("axolotl_configs/*.yml"), *ROOT.glob("mergekit_configs/*.yml")]
    assert len(recipes) >= 10
    assert all(path.name in pages["reference/recipes.md"] for path in recipes)
    assert "](../reference/recipes.md)" in pages["tutorials/fusellm.md"]


def test_a_site_that_loads_or_links_amiss_is_found(tmp_path):
    (tmp_path / "index.html").write_text(
        '<h1 id="a">A</h1><p id="a"><script src="https://cdn.example/x.js"></script><img src="gone.png">'
        '<a href="other.html#b"><a href="other.html#none"><a href="https://elsewhere.example">'
    )
    (tmp_path / "other.html").write_text('<h1 id="b">B</h1>')
    assert problems_of(tmp_path) == [
        "index.html: the id 'a' is given twice",
        "index.html: 1 picture(s) without a text for those who do not see them",
        "index.html: loads https://cdn.example/x.js from elsewhere",
        "index.html: the link to gone.png leads nowhere",
        "index.html: other.html#none: the page has no such anchor",
    ]


def test_docstrings_become_markdown():
    def function():
        """Do it.

        Args:
            left, right: :class:`~a.b.Thing` or ``None``,
                on two lines.
            other (int): one.
        """

    assert entries(function) == {
        "left": "`Thing` or `None`, on two lines.",
        "right": "`Thing` or `None`, on two lines.",
        "other": "one.",
    }
    assert as_markdown("As::\n\n    code\n\nsee :func:`f`") == "As:\n\n    code\n\nsee `f`"
