"""Tokenizers and models of different sizes: an id that the model has no row for never reaches the model."""

import copy

import numpy as np
import pytest
import source_checks
import tiny
from source_checks import capture_config as config

from fusion_plugins.core.text.model_rows import beyond_the_model
from fusion_plugins.errors import DataError
from fusion_plugins.sources import capture as capture_module
from fusion_plugins.sources.backends.base import Refusal, SampleRequest, Sampling, SourceSettings, open_source
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.store import open_store

ROWS = 420
PLAIN = [{"id": "plain", "text": "the theory"}]
ADDED = [{"id": "added", "text": "the <tool> theory"}]


def wide(folder, *tokens, special=False, **changes):
    """A model of 420 rows whose tokenizer has more tokens."""
    tokenizer = copy.deepcopy(tiny.byte_level())
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return source_checks.checkpoint(folder, tokenizer=tokenizer, vocab_size=ROWS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return wide(tmp_path_factory.mktemp("models") / "narrow", "<pad>", "<tool>")


def test_a_text_with_such_an_id_is_refused_before_the_model_is_loaded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(capture_module, "open_source", lambda *_: pytest.fail("the model was loaded"))
    texts = source_checks.write_rows(tmp_path / "texts.jsonl", PLAIN + ADDED)
    expected = (
        r"^.*texts.jsonl:2: text .added.: source .narrow.: token id 421 \(.<tool>.\) has no row in the model: the "
        r"tokenizer has 422 ids, the model's embeddings 420 rows; name the tokenizer .*on_unusable: skip`.*$"
    )
    for backend in ("transformers", "vllm", "ray"):
        with pytest.raises(DataError, match=expected):
            capture_texts(config(model, texts, tmp_path / "store", backend=backend))


def test_such_texts_are_left_out_when_asked_and_the_others_are_right(model, tmp_path):
    texts = source_checks.write_rows(tmp_path / "texts.jsonl", ADDED + PLAIN)
    report = capture_texts(config(model, texts, tmp_path / "store", on_unusable="skip", top_k="all"))
    assert list(report.skipped) == ["added"]
    assert "token id 421 ('<tool>') has no row" in report.skipped["added"]
    (record,) = open_store(tmp_path / "store")
    expected = source_checks.reference_logprobs(model, record.text.input_ids)
    assert record.topk.ids.shape[1] == ROWS + 2
    assert sorted(record.topk.ids[0]) == [-1, -1, *range(ROWS)]
    assert record.topk.ids[0, 0] == expected[0].argmax()
    gold = np.take_along_axis(expected[:-1], record.text.input_ids[1:, None].astype(int), axis=-1)[:, 0]
    np.testing.assert_allclose(record.topk.token_logprobs[:-1], gold, rtol=2e-3, atol=1e-3)


def test_an_end_token_without_a_row_stops_every_text(tmp_path):
    model = wide(tmp_path / "model", "<end>", special=True, eos_token="<end>")
    texts = source_checks.write_rows(tmp_path / "texts.jsonl", PLAIN)
    with pytest.raises(DataError, match=r"text 'plain': .*token id 420 \('<end>'\).*421 ids.*420 rows"):
        capture_texts(config(model, texts, tmp_path / "store"))


def test_a_template_that_writes_a_token_without_a_row_stops_its_chats(tmp_path):
    template = tiny.CHATML.replace("<|im_end|>", "<|turn_end|>")
    model = wide(tmp_path / "model", "<|turn_end|>", special=True, chat_template=template)
    texts = source_checks.chats(tmp_path / "chats.jsonl")
    with pytest.raises(DataError, match=r"text 'c0': .*token id 420 \('<\|turn_end\|>'\)"):
        capture_texts(config(model, texts, tmp_path / "store"))


def test_a_tokenizer_of_a_larger_model_is_named_by_its_id(tmp_path):
    folder = source_checks.checkpoint(tmp_path / "model", vocab_size=300)
    texts = source_checks.texts(tmp_path / "texts.jsonl")
    with pytest.raises(DataError, match=r"text 't0-0': source 'model': token id \d+ .*has 420 ids, .* 300 rows"):
        capture_texts(config(folder, texts, tmp_path / "store"))


def test_prompts_with_such_an_id_are_refused_one_by_one(model):
    source = open_source(SourceSettings(model=str(model)), "sample")
    sampling = Sampling(temperature=0, max_tokens=3, template="plain")
    requests = [SampleRequest(row["text"], sampling, 0) for row in ADDED + PLAIN]
    found = {place: result for place, result in source.sample([requests])}
    assert isinstance(found[0, 0], Refusal)
    assert "token id 421 ('<tool>') has no row" in found[0, 0].reason
    assert found[0, 1].n_tokens > 0


def test_a_model_that_is_as_wide_or_wider_takes_every_id():
    tokenizer = tiny.byte_level()
    assert beyond_the_model(tokenizer, [0, 419], 420) is None
    assert beyond_the_model(tokenizer, [0, 419], 512) is None
    assert beyond_the_model(tokenizer, [0, 419], None) is None
    assert beyond_the_model(tokenizer, [], 1) is None
    assert "token id 419" in beyond_the_model(tokenizer, [0, 419], 419)
