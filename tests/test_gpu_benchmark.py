"""The benchmark for a GPU runs without one, at a small shape, and its figures are what they say."""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
EXPECTED = {
    "loss": {"plain cross-entropy", "fusion", "fusion, capped", "fusion, jsd", "fusion from the logits"},
    "step": {"axolotl", "axolotl with fusion"},
    "capture": {"transformers: prefill", "transformers: capture"},
}


@pytest.fixture(scope="module")
def gpu():
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules[spec.name]


@pytest.fixture(autouse=True)
def handlers_as_before(capsys):
    """axolotl's log goes to the output of one test, which is closed after it."""
    before = {logger: list(logger.handlers) for logger in loggers()}
    yield
    for logger in loggers():
        logger.handlers[:] = before.get(logger, [])


def loggers():
    return [one for one in (logging.root, *logging.root.manager.loggerDict.values()) if isinstance(one, logging.Logger)]


def run(gpu, monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, "--json", str(tmp_path / "numbers.json")])
    status = gpu.main()
    return status, json.loads((tmp_path / "numbers.json").read_text())


@pytest.mark.parametrize("part", ["loss", "capture", pytest.param("step", marks=pytest.mark.slow)])
def test_every_part_runs_at_a_small_shape(gpu, part, monkeypatch, tmp_path, capsys):
    import transformers.loss.loss_utils as losses

    # axolotl puts a cross-entropy by chunks in their place, for the whole process
    monkeypatch.setattr(losses, "ForCausalLMLoss", losses.ForCausalLMLoss)
    monkeypatch.setitem(losses.LOSS_MAPPING, "ForCausalLM", losses.LOSS_MAPPING["ForCausalLM"])
    status, numbers = run(gpu, monkeypatch, tmp_path, "--parts", part)
    assert status == 0, "at this shape nothing is judged"
    lines = {line["name"]: line for line in numbers["lines"]}
    assert lines.keys() >= EXPECTED[part]
    assert all(line["seconds"] > 0 and line["bytes"] > 0 for line in lines.values())
    assert numbers["goals"]
    out = capsys.readouterr().out
    assert "not judged at this shape" in out
    if part == "loss":
        assert lines["fusion"]["bytes"] < lines["fusion from the logits"]["bytes"]


def test_a_missed_goal_ends_with_status_1(gpu, monkeypatch, tmp_path, capsys):
    """At a given shape goals are judged; one chunk of all positions holds as much as the plain way."""
    shape = ("--tokens", "32", "--chunk", "32", "--hidden", "8", "--turns", "1")
    status, numbers = run(gpu, monkeypatch, tmp_path, "--parts", "loss", *shape)
    met = {goal["name"]: goal["met"] for goal in numbers["goals"]}
    assert not met["fusion / plain, memory"]
    assert status == 1
    assert "MISSED" in capsys.readouterr().out
