"""Shared by the tests of scoring: responses, a math scorer that runs, a sandbox, and the processes below another."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import fusion_plugins.scoring.score as score_module
from fusion_plugins.scoring.math_scorer import MathScorer
from fusion_plugins.scoring.sandbox import Limits, Sandbox
from fusion_plugins.store import RowManifest, RowWriter

SHORT = {"cpu_seconds": 1, "wall_seconds": 4, "total_seconds": 30}
COLUMNS = {
    "prompt_id": "string",
    "source": "string",
    "index": "int64",
    "prompt": "json",
    "response": "string",
    "domain": "string",
    "reference": "string",
    "tests": "json",
    "fingerprint": "string",
}
KEY = ("prompt_id", "source", "index", "fingerprint")


@pytest.fixture(scope="session")
def response():
    """A function that makes one row of a folder of responses."""
    return _response


@pytest.fixture(scope="session")
def write_responses():
    """A function that writes rows into a folder of responses and returns its path."""
    return _write_responses


@pytest.fixture(scope="session")
def running_scorer():
    scorer = MathScorer(workers=1, timeout=30)
    yield scorer
    scorer.close()


@pytest.fixture
def one_scorer(running_scorer, monkeypatch):
    """Let all folders of a test be scored by processes that run already: starting them takes seconds."""
    borrowed = SimpleNamespace(domains=running_scorer.domains, facts=running_scorer.facts, score=running_scorer.score)
    borrowed.close = lambda: None
    monkeypatch.setattr(score_module, "lookup", lambda kind, name: lambda **options: borrowed)


@pytest.fixture
def responses(tmp_path):
    rows = [_response("p1", "a", 0, "\\boxed{18}"), _response("p1", "a", 1, "It is 19."), _response("p1", "b", 0, "18")]
    rows += [
        _response("p2", "b", 0, "\\boxed{((((}"),
        _response("zh", "q", 0, "你好", domain="chinese", reference=None),
    ]
    return _write_responses(tmp_path / "responses", rows)


@pytest.fixture(scope="session")
def short_limits():
    return SHORT


@pytest.fixture(scope="session")
def sandbox():
    return Sandbox(Limits(**SHORT))


@pytest.fixture(scope="session")
def descendants():
    """A function from a process id to the ids of all processes below it."""
    return _descendants


@pytest.fixture(scope="session")
def alive():
    """A function that tells whether a process runs; a zombie does not."""
    return _alive


def _descendants(pid):
    found, frontier = [], [pid]
    while frontier:
        parent = frontier.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            children = [int(child) for child in task.read_text().split()]
            found += children
            frontier += children
    return found


def _alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _response(prompt_id, source, index, text, *, domain="math", reference="18", **more):
    return {
        "prompt_id": prompt_id,
        "source": source,
        "index": index,
        "prompt": f"Question {prompt_id}",
        "response": text,
        "domain": domain,
        "reference": reference,
        "fingerprint": "f",
        **more,
    }


def _write_responses(folder, rows, columns=COLUMNS):
    manifest = RowManifest(stage="responses", columns=columns, key=KEY, facts={"prompts_fingerprint": "abc"})
    with RowWriter(folder, manifest) as writer:
        for row in rows:
            writer.write(row)
        writer.finish()
    return str(folder)
