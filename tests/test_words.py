"""One vocabulary: docs/concepts.md defines the words, and lists those that are not used anywhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONCEPTS = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
GLOSSARY, BANNED = CONCEPTS.split("## Glossary", 1)[1].split("### Words that are not used", 1)
DOCUMENTS = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.md")])
MODULES = sorted((ROOT / "fusion_plugins").rglob("*.py"))


def cells(text):
    """The first cell of every row of the table, without its head."""
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")][2:]


def banned():
    """Each phrase that is not used, as a pattern; a cell may hold several."""
    phrases = [re.sub(r"\s*\(.*?\)", "", phrase).strip() for cell in cells(BANNED) for phrase in cell.split(",")]
    # "came" and "comes" are refused only where an error says what it got: after a comma or semicolon.
    spelled = {"came": r"[;,] came\b", "comes": r"[;,] comes\b"}
    return {phrase: re.compile(spelled.get(phrase, rf"\b{re.escape(phrase)}\b"), re.IGNORECASE) for phrase in phrases}


def prose_of(path):
    """Line number -> prose: all of a document, the strings and comments of a module."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = text.replace(BANNED, "\n" * BANNED.count("\n")) if path.name == "concepts.md" else text
        return list(enumerate(text.splitlines(), start=1))
    found = [(i, line.partition("#")[2]) for i, line in enumerate(text.splitlines(), start=1) if "#" in line]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append((node.lineno, re.sub(r"\s+", " ", node.value)))
    return found


def test_the_glossary_has_at_most_25_words_and_none_twice():
    words = cells(GLOSSARY.split("Fusion rules:")[0])
    assert 15 < len(words) <= 25
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("path", [*DOCUMENTS, *MODULES], ids=lambda path: str(path.relative_to(ROOT)))
def test_words_that_are_not_used_are_not_used(path):
    patterns = banned()
    assert len(patterns) > 12
    found = [
        f"{path.relative_to(ROOT)}:{number}: {phrase!r}: {line.strip()[:100]}"
        for number, line in prose_of(path)
        for phrase, pattern in patterns.items()
        if pattern.search(line)
    ]
    assert found == []


def test_the_check_finds_a_word(tmp_path):
    module = tmp_path / "module.py"
    module.write_text('x = 1  # a data set\nraise ValueError(f"expected 1, came {x}")\n', encoding="utf-8")
    found = {phrase for _, line in prose_of(module) for phrase, pattern in banned().items() if pattern.search(line)}
    assert found == {"data set", "came"}
