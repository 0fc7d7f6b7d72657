"""What a training leaves for `fusion report`, and that nothing there can end a training."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from axolotl.utils.dict import DictDefault
from transformers import TrainerCallback, TrainerState

from fusion_plugins.axolotl import training_record
from fusion_plugins.axolotl.collator import Fused, TokenChunks
from fusion_plugins.axolotl.training_record import keep_record, kept_entries, teachers
from fusion_plugins.core.fusion.routing import taught_positions
from fusion_plugins.core.fusion.teachers import LABEL, NOTHING, SEVERAL
from fusion_plugins.core.fusion.types import FusedTexts
from fusion_plugins.training_files import MOST_ENTRIES, TRAINING_RECORD


class Trainer:
    """What of a trainer the record looks at."""

    train_dataset = ()
    data_collator = None

    def __init__(self):
        self.callbacks: list[TrainerCallback] = []

    def add_callback(self, callback):
        self.callbacks.append(callback)


@pytest.fixture
def warnings(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(training_record, "LOG", SimpleNamespace(warning=said.append))
    return said


def ended(trainer, *history):
    (callback,) = trainer.callbacks
    callback.on_train_end(None, TrainerState(log_history=list(history)), None)


def test_figures_are_added_at_the_end(tmp_path, warnings):
    trainer = Trainer()
    keep_record(DictDefault({"base_model": "org/name", "output_dir": str(tmp_path / "out")}), trainer)
    before = json.loads((tmp_path / "out" / TRAINING_RECORD).read_text())
    assert (before["base_model"], before["log_history"]) == ("org/name", [])
    ended(trainer, {"step": 1, "loss": 2.0, "train_runtime": 3.0})
    after = json.loads((tmp_path / "out" / TRAINING_RECORD).read_text())
    assert after == before | {"log_history": [{"step": 1, "loss": 2.0}]}
    assert not warnings


@pytest.mark.parametrize("trouble", ["a folder in the way", "no folder", "a figure that is no JSON"])
def test_a_record_that_cannot_be_written_does_not_end_a_training(trouble, tmp_path, warnings):
    """The trainer saves the model after its callbacks have seen the end."""
    trainer = Trainer()
    keep_record(DictDefault({"base_model": "org/name", "output_dir": str(tmp_path / "out")}), trainer)
    (tmp_path / "out" / TRAINING_RECORD).unlink()
    if trouble == "a folder in the way":
        (tmp_path / "out" / TRAINING_RECORD).mkdir()
    elif trouble == "no folder":
        (tmp_path / "out").rmdir()
    ended(trainer, {"step": 1, "loss": object() if "JSON" in trouble else 2.0})
    assert len(warnings) == 1
    assert TRAINING_RECORD in warnings[0]


def test_a_record_that_cannot_be_begun_does_not_keep_a_training_from_starting(tmp_path, warnings):
    (tmp_path / "out").write_text("a file")
    trainer = Trainer()
    keep_record(DictDefault({"base_model": "org/name", "output_dir": str(tmp_path / "out")}), trainer)
    assert trainer.callbacks == []
    assert len(warnings) == 1


@pytest.mark.parametrize("every", [7, 500])
def test_of_a_long_log_no_evaluation_and_not_the_end_is_lost(every):
    history = []
    for step in range(1, 3 * MOST_ENTRIES):
        history.append({"step": step, "loss": 1.0})
        if step % every == 0:
            history.append({"step": step, "eval_loss": 2.0, "eval_runtime": 1.0})
    history.append({"step": 3 * MOST_ENTRIES, "train_loss": 1.5})
    kept = kept_entries(history)
    measured = [entry["step"] for entry in kept if "eval_loss" in entry]
    assert measured == [entry["step"] for entry in history if "eval_loss" in entry]
    assert kept[-1] == history[-1]
    assert len([entry for entry in kept if "loss" in entry]) <= MOST_ENTRIES
    assert [entry["step"] for entry in kept] == sorted(entry["step"] for entry in kept)


def test_tokens_are_said_to_be_taught_as_positions_are_counted():
    """A source, several of them, a fallback, and nobody; the last position has no label and no token after it."""
    ids = np.array([[4], [5], [6], [-1], [-1]], np.int32)
    logprobs = np.where(ids >= 0, 0.0, -np.inf).astype(np.float32)
    kept, source = np.array([0.5, 0.25, 0, 0, 0], np.float16), np.array([1, -1, -1, -1, -1], np.int16)
    said = teachers(Fused(ids, logprobs, kept, source), ["a", "b"])
    assert said == [None, "b", SEVERAL, LABEL, None]
    texts = FusedTexts(
        ids, logprobs, 1 - kept.astype(np.float32), np.array([0, 5]), kept.astype(np.float32), source, np.array([1])
    )
    counts = taught_positions(texts, np.array([True, True, True, True, False]), ["a", "b"], ["math"])
    assert counts == {"math": {"b": 1, SEVERAL: 1, LABEL: 1, NOTHING: 1}}
    chunks = TokenChunks(np.array([1, 2, 0, 1]), np.zeros(4), np.zeros(4), np.array([0, 0, -1, -1]))
    assert teachers(chunks, ["a", "b"]) == [None, "a", "a", None]
    assert teachers(chunks._replace(place=np.array([1, 1, 1, 0])), ["a", "b"]) == [None, "a", "a", SEVERAL]
