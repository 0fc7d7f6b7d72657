"""The benchmark of memory and time runs, step by step, and every step does all of its work."""

import json

import bench_size
import pytest
import source_checks

from fusion_plugins.sources.backends import base
from fusion_plugins.store import open_rows, open_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("size")
    source_checks.checkpoint(folder / "model")
    bench_size.make_inputs(folder, 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(base.BACKENDS, "transformers", "counting_source")
        for step, _ in bench_size.STEPS.values():
            step(folder)
    return folder


def test_every_text_is_captured_once_by_each_source(folder):
    expected = [f"text-{number}" for number in range(1000)]
    for name in ("a", "b", "merged"):
        store = open_store(folder / "stores" / name)
        assert store.ids() == expected
        assert store.manifest.complete


def test_every_prompt_is_answered_and_scored_as_often_as_asked(folder):
    keys = [(f"prompt-{number}", index) for number in range(1000) for index in range(2)]
    for name in ("responses", "scored"):
        rows = open_rows(folder / name)
        assert [(row["prompt_id"], row["index"]) for row in rows] == keys
        assert rows.manifest.complete


def test_texts_that_are_there_are_not_tokenized_again(folder, monkeypatch):
    from fusion_plugins.sources import CaptureConfig, capture_texts, capture_tokens

    asked = []
    tokenize = capture_tokens.tokenize_many
    monkeypatch.setattr(capture_tokens, "tokenize_many", lambda *rest: asked.extend(rest[2]) or tokenize(*rest))
    monkeypatch.setitem(base.BACKENDS, "transformers", "counting_source")
    settings = {"model": str(folder / "model"), "out": str(folder / "stores" / "c"), "max_length": 200, "top_k": 8}
    few = {**settings, "texts": str(folder / "texts.jsonl"), "limit": 300, "batch_bytes": 4000}
    capture_texts(CaptureConfig(**few))
    assert len(set(asked)) == 300
    asked.clear()
    report = capture_texts(CaptureConfig(**{**few, "limit": 310}))
    assert (report.present, report.captured) == (300, 10)
    # The batch in which the first run has stopped is done again as a whole; nothing before it is.
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").open()]
    assert set(texts[300:310]) <= set(asked)
    assert not set(texts[:190]) & set(asked)
