"""The shapes in which models write programs, and the program that each of them means."""

import contextlib
import doctest
import io
import subprocess
import sys
from pathlib import Path

import pytest
from program_shapes import FROM_THE_FUTURE, GOOD, SHAPES, WHOLE_PROGRAMS, fenced

from fusion_plugins.scoring import code_blocks, programs
from fusion_plugins.scoring.programs import extract_code


@pytest.mark.parametrize("shape", SHAPES)
def test_the_program_of_every_shape_is_found(shape):
    code = extract_code(SHAPES[shape], {"f"})
    namespace = {"__name__": "solution"}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, shape, "exec", dont_inherit=True), namespace)
    assert namespace["f"](4) == 8, code


def test_the_table_of_the_documentation_is_the_one_that_the_script_makes():
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "tools/extraction_table.py"], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout in (root / "docs" / "responses.md").read_text()
    rows = [line.split(" | ") for line in run.stdout.splitlines()[2:]]
    assert all(right.split(" of ")[0] == right.split(" of ")[1] for _, right, *_ in rows)
    assert len(SHAPES) >= 40


@pytest.mark.parametrize("shape", WHOLE_PROGRAMS)
def test_a_whole_program_is_the_last_that_reads_its_input(shape, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("17 25\n"))
    exec(compile(extract_code(WHOLE_PROGRAMS[shape]), shape, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == "42\n"


def test_a_response_may_continue_the_program_of_its_prompt():
    prompt = 'from typing import List\n\ndef f(x: int) -> int:\n    """Return the double."""\n'
    for body in ("    return x * 2\n", "```python\n    return x * 2\n```", "    return x * 2\n```\nDone."):
        namespace = {}
        exec(extract_code(body, {"f"}, prompt), namespace)
        assert namespace["f"](4) == 8
    # What the prompt imports is there for a response that does not import it.
    assert extract_code(GOOD, {"f"}, prompt) == f"from typing import List\n{GOOD}"
    future = extract_code(FROM_THE_FUTURE, {"f"}, prompt)
    assert future.startswith("from __future__ import annotations\nfrom typing import List\n")
    assert extract_code(f"from os import List\n{GOOD}", {"f"}, prompt) == f"from os import List\n{GOOD}"


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("```bash\nls\n```", ""),
        ("", ""),
        ("<think>\n" + fenced(GOOD), ""),
        ("<think>hm</think>", ""),
        ("```python\ncut = off", "cut = off\n"),
        ("```python\ndef f(x:\n```", "def f(x:\n"),
    ],
)
def test_what_is_no_program_stays_none(response, code):
    assert extract_code(response, {"f"}) == code


@pytest.mark.parametrize(
    "text", ["-" * 100_000, "(" * 10_000, "f" + "()" * 20_000, "1" + "+1" * 20_000, "```" * 10_000]
)
def test_text_that_is_nested_too_deeply_ends_no_run(text):
    for response in (text, fenced(text), f"def f():\n{text}"):
        assert isinstance(extract_code(response, {"f"}), str)


def test_examples_in_docstrings_run():
    for module in (programs, code_blocks):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0
