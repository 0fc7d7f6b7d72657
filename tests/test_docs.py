"""The examples in the documents and docstrings run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import fusion_plugins.core

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")])
CORE = sorted(module.name for module in pkgutil.walk_packages(fusion_plugins.core.__path__, "fusion_plugins.core."))


def test_there_are_documents_and_core_modules():
    assert len(DOCUMENTS) >= 4
    assert len(CORE) >= 8


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
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
