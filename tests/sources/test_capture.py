"""Capture with the transformers backend: what a store holds, resuming, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import source_checks
import tiny
from source_checks import capture_config as config

from fusion_plugins.config import validate
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.errors import ConfigError, DataError, MismatchError, SourceError, StoreError
from fusion_plugins.sources import capture as capture_module
from fusion_plugins.sources.backends.base import Refusal, open_source
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.sources.capture_estimate import estimate_capture
from fusion_plugins.store import open_store
from fusion_plugins.store.files import FolderLock


def test_the_store_holds_the_models_own_log_probabilities(model, texts, tmp_path):
    report = capture_texts(config(model, texts, tmp_path / "store"))
    store = open_store(tmp_path / "store")
    assert report.captured == len(store) == len(tiny.TEXTS)
    assert store.manifest.complete
    for record in store:
        expected = source_checks.reference_logprobs(model, record.text.input_ids)
        order = np.argsort(-expected, axis=-1, kind="stable")[:, :8]
        # The format may round; the first entries must agree, and all values within its error.
        values = np.take_along_axis(expected, np.maximum(record.topk.ids, 0), axis=-1)
        np.testing.assert_array_equal(record.topk.ids[:-1, 0], order[:-1, 0])
        np.testing.assert_allclose(record.topk.logprobs[:-1], values[:-1], rtol=2e-3, atol=1e-3)
        gold = np.take_along_axis(expected[:-1], record.text.input_ids[1:, None].astype(int), axis=-1)[:, 0]
        np.testing.assert_allclose(record.topk.token_logprobs[:-1], gold, rtol=2e-3, atol=1e-3)
        tail = 1 - np.exp(np.take_along_axis(expected, order, axis=-1)).sum(axis=-1)
        np.testing.assert_allclose(record.tail[:-1], tail[:-1], rtol=2e-3, atol=1e-3)
        assert (record.topk.ids[-1] == -1).all()
        assert np.isnan(record.topk.token_logprobs[-1])


def test_cross_entropies_are_per_supervised_token_and_byte(model, texts, tmp_path):
    capture_texts(config(model, texts, tmp_path / "store"))
    record = open_store(tmp_path / "store")["t0-5"]
    text = (tiny.TEXTS[5] + " 0").encode()
    # Byte-level, no BOS: token 0 is not predicted, the EOS at the end carries no bytes.
    nats = -record.topk.token_logprobs[:-2].astype(float).sum()
    assert record.ce_per_token == pytest.approx(nats / (len(record.text.input_ids) - 2), rel=1e-4)
    assert record.ce_per_byte == pytest.approx(nats / (len(text) - record.text.ends[0]), rel=1e-4)


def test_batching_and_padding_change_nothing_but_rounding(model, texts, tmp_path):
    alone = config(model, texts, tmp_path / "alone", options={"batch_tokens": 1})
    together = config(model, texts, tmp_path / "together", options={"batch_tokens": 100_000})
    capture_texts(alone)
    capture_texts(together)
    for record, other in zip(open_store(tmp_path / "alone"), open_store(tmp_path / "together"), strict=True):
        assert record.id == other.id
        np.testing.assert_allclose(record.topk.token_logprobs, other.topk.token_logprobs, rtol=2e-3, atol=1e-3)


def test_ids_of_a_padded_output_are_never_stored_but_keep_their_mass(padded_model, texts, tmp_path):
    capture_texts(config(padded_model, texts, tmp_path / "store", top_k="all"))
    store = open_store(tmp_path / "store")
    vocab_size = len(tiny.sentencepiece_bpe())
    assert (store.manifest.vocab_size, store.manifest.logits_width) == (vocab_size, vocab_size + 16)
    record = store["t0-0"]
    assert record.topk.ids.shape[1] == store.manifest.top_k == vocab_size
    assert record.topk.ids.max() < vocab_size
    expected = source_checks.reference_logprobs(padded_model, record.text.input_ids)
    padding = np.exp(expected[:, vocab_size:]).sum(axis=-1)
    assert padding[:-1].min() > 0.001
    np.testing.assert_allclose(record.tail[:-1], padding[:-1], rtol=2e-3, atol=1e-3)


def test_chats_keep_only_positions_of_the_assistants_messages(padded_model, tmp_path):
    chats = source_checks.chats(tmp_path / "chats.jsonl")
    capture_texts(config(padded_model, chats, tmp_path / "store"))
    store = open_store(tmp_path / "store")
    record = store["c1"]
    tokenizer = tiny.sentencepiece_bpe()
    messages = [*tiny.CHAT[:-1], {"role": "assistant", "content": "1!"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False).encode()
    contents = [rendered[start:stop].decode() for start, stop in record.text.spans[1::3]]
    assert contents == [tiny.CHAT[1]["content"], "1!"]
    inside = np.zeros(len(record.text.input_ids), bool)
    for start, stop in record.text.spans:
        inside |= (record.text.ends >= start) & (record.text.ends <= stop)
    inside[-1] = False
    np.testing.assert_array_equal((record.topk.ids >= 0).any(axis=-1), inside)
    assert 0 < inside.sum() < len(inside) - 1
    assert store.manifest.template_hash is not None


def test_a_chat_without_a_template_is_refused_and_a_template_file_helps(model, tmp_path):
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    chats = source_checks.chats(tmp_path / "chats.jsonl")
    with pytest.raises(ConfigError, match="has no chat template. Name a file"):
        capture_texts(config(bare, chats, tmp_path / "store"))
    template = tmp_path / "chatml.jinja"
    template.write_text(tiny.CHATML)
    capture_texts(config(bare, chats, tmp_path / "store", chat_template=str(template)))
    assert len(open_store(tmp_path / "store")) == 3


def test_a_run_that_stops_half_way_is_resumed_and_ends_with_the_same_bytes(model, texts, tmp_path, monkeypatch):
    settings = config(model, texts, tmp_path / "store", batch_bytes=200)
    capture_texts(config(model, texts, tmp_path / "whole", batch_bytes=200))
    build, calls = capture_module.build_record, []

    def failing(*arguments):
        calls.append(arguments[0])
        if len(calls) == 5:
            raise SourceError("the engine died")
        return build(*arguments)

    monkeypatch.setattr(capture_module, "build_record", failing)
    with pytest.raises(SourceError, match="the engine died"):
        capture_texts(settings)
    assert 0 < len(open_store(tmp_path / "store")) <= 4
    monkeypatch.setattr(capture_module, "build_record", build)
    report = capture_texts(settings)
    assert report.present + report.captured == len(tiny.TEXTS)
    assert report.present > 0
    whole, resumed = open_store(tmp_path / "whole"), open_store(tmp_path / "store")
    assert source_checks.contents(whole) == source_checks.contents(resumed)
    assert capture_texts(settings).captured == 0


def test_limit_takes_the_first_texts_and_the_next_run_the_others(model, texts, tmp_path):
    capture_texts(config(model, texts, tmp_path / "store", limit=3))
    store = open_store(tmp_path / "store")
    assert store.ids() == ["t0-0", "t0-1", "t0-2"]
    assert not store.manifest.complete
    report = capture_texts(config(model, texts, tmp_path / "store"))
    assert (report.present, report.captured) == (3, len(tiny.TEXTS) - 3)


def test_other_texts_another_k_another_model_and_another_template_are_refused_by_name(
    model, padded_model, texts, tmp_path
):
    chats = source_checks.chats(tmp_path / "chats.jsonl")
    capture_texts(config(model, texts, tmp_path / "store"))
    capture_texts(config(model, chats, tmp_path / "chat_store"))
    with pytest.raises(MismatchError, match="top_k: the folder has 8, expected 9"):
        capture_texts(config(model, texts, tmp_path / "store", top_k=9))
    with pytest.raises(MismatchError, match="tokenizer_fingerprint"):
        capture_texts(config(padded_model, texts, tmp_path / "store"))
    with pytest.raises(MismatchError, match="texts_fingerprint"):
        capture_texts(config(model, source_checks.texts(tmp_path / "more.jsonl", repeat=2), tmp_path / "store"))
    template = tmp_path / "other.jinja"
    template.write_text(tiny.CHATML + " ")
    with pytest.raises(MismatchError, match="template_hash"):
        capture_texts(config(model, chats, tmp_path / "chat_store", chat_template=str(template)))


def test_a_model_that_was_trained_on_in_its_folder_is_refused(model, texts, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    capture_texts(config(folder, texts, tmp_path / "store"))
    tiny.llama_checkpoint(folder, base=folder, moved=0.01)
    with pytest.raises(MismatchError, match="revision: the folder has 'weights:"):
        capture_texts(config(folder, texts, tmp_path / "store"))


def test_a_text_that_is_too_long_stops_the_run_before_it_starts_or_is_left_out(model, texts, tmp_path):
    with texts.open("a") as lines:
        lines.write(json.dumps({"id": "long", "text": "z" * 300}) + "\n")
    with pytest.raises(DataError, match=r"text 'long': expected at most 256 tokens of source 'llama', got 30\d"):
        capture_texts(config(model, texts, tmp_path / "store"))
    assert not (tmp_path / "store").exists()
    report = capture_texts(config(model, texts, tmp_path / "store", on_unusable="skip"))
    assert list(report.skipped) == ["long"]
    assert "long" not in open_store(tmp_path / "store")


def test_the_shorter_of_the_setting_and_the_context_is_the_limit(model, texts, tmp_path):
    with texts.open("a") as lines:
        lines.write(json.dumps({"id": "long", "text": "z" * 300}) + "\n")
    for asked, limit in ((4096, 256), (200, 200)):
        with pytest.raises(DataError, match=f"text 'long': expected at most {limit} tokens"):
            capture_texts(config(model, texts, tmp_path / "store", max_length=asked))


def test_a_text_that_the_source_refuses_is_named_or_left_out(model, texts, tmp_path, monkeypatch):
    class Refusing:
        def __init__(self, source):
            self.source = source

        def __getattr__(self, name):
            return getattr(self.source, name)

        def capture(self, batches, top_k):
            for place, topk in self.source.capture(batches, top_k):
                yield place, Refusal("the engine does not take it") if place == (0, 3) else topk

    monkeypatch.setattr(capture_module, "open_source", lambda s, p: Refusing(open_source(s, p)))
    with pytest.raises(SourceError, match="text 't0-3': the engine does not take it. .*`on_unusable: skip`"):
        capture_texts(config(model, texts, tmp_path / "store"))
    report = capture_texts(config(model, texts, tmp_path / "other", on_unusable="skip"))
    assert report.skipped == {"t0-3": "the engine does not take it"}
    assert report.captured == len(open_store(tmp_path / "other")) == len(tiny.TEXTS) - 1


def test_what_can_be_refused_without_the_model_is_refused_before_it_is_loaded(model, texts, tmp_path, monkeypatch):
    capture_texts(config(model, texts, tmp_path / "store"))
    chats = source_checks.chats(tmp_path / "chats.jsonl")
    opened = []
    monkeypatch.setattr(capture_module, "open_source", lambda s, p: opened.append(s))
    with pytest.raises(MismatchError, match="top_k: the folder has 8, expected 9"):
        capture_texts(config(model, texts, tmp_path / "store", top_k=9))
    with pytest.raises(MismatchError, match="texts_fingerprint"):
        capture_texts(config(model, chats, tmp_path / "store"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="out: expected a folder, got .*file"):
        capture_texts(config(model, texts, tmp_path / "file"))
    lock = FolderLock(tmp_path / "store")
    with pytest.raises(StoreError, match="is being written by"):
        capture_texts(config(model, texts, tmp_path / "store"))
    lock.close()
    assert opened == []


@pytest.mark.parametrize("top_k", [0, -1])
def test_k_is_at_least_one(top_k):
    with pytest.raises(ConfigError, match=f"top_k: .*at least 1, or 'all', got {top_k}"):
        validate(CaptureConfig, {"model": "m", "texts": "t", "out": "o", "top_k": top_k}, where="here")


def test_what_changes_the_numbers_of_an_engine_is_recorded_beside_the_dtype(model, texts, tmp_path, monkeypatch):
    capture_texts(config(model, texts, tmp_path / "store"))
    assert open_store(tmp_path / "store").manifest.dtype == "float32"

    def open_quantized(settings, purpose):
        source = open_source(settings, purpose)
        source.facts["options"] = {"quantization": "fp8"}
        return source

    monkeypatch.setattr(capture_module, "open_source", open_quantized)
    with pytest.raises(MismatchError, match="dtype: the folder has 'float32', expected 'float32 quantization=fp8'"):
        capture_texts(config(model, texts, tmp_path / "store"))


def test_a_dry_run_measures_and_writes_nothing(model, tmp_path):
    texts = source_checks.texts(tmp_path / "texts.jsonl", repeat=40)
    estimate = estimate_capture(config(model, texts, tmp_path / "store"))
    assert not (tmp_path / "store").exists()
    table = TokenTable.from_tokenizer(tiny.byte_level())
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    tokens = sum(len(tokenize(tiny.byte_level(), table, row).input_ids) for row in rows)
    assert estimate["texts"] == 400
    assert estimate["tokens"] == pytest.approx(tokens, rel=0.1)
    capture_texts(config(model, texts, tmp_path / "store"))
    assert estimate["bytes"] == pytest.approx(
        open_store(tmp_path / "store").manifest.bytes, rel=0.5
    )  # repeated texts compress well


GEMMA = tiny.CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
    1,
)


def write_chats(path, *chats):
    lines = (json.dumps({"id": f"c{number}", "messages": chat}) for number, chat in enumerate(chats))
    path.write_text("\n".join(lines))
    return path


def test_a_chat_that_the_template_refuses_is_named_or_left_out(model, tmp_path):
    template = tmp_path / "gemma.jinja"
    template.write_text(GEMMA)
    system = [{"role": "system", "content": "Be brief."}, *tiny.CHAT]
    unread = [tiny.CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}]
    chats = write_chats(tmp_path / "chats.jsonl", tiny.CHAT, system, unread)
    settings = {"chat_template": str(template)}
    with pytest.raises(DataError, match=r"chats\.jsonl:2: text 'c1': the chat template refuses the chat: System role"):
        capture_texts(config(model, chats, tmp_path / "store", **settings))
    report = capture_texts(config(model, chats, tmp_path / "store", on_unusable="skip", **settings))
    assert list(report.skipped) == ["c1", "c2"]
    assert "the call of f in message 1 is not in the text" in report.skipped["c2"]
    assert [record.id for record in open_store(tmp_path / "store")] == ["c0"]


def test_tools_and_arguments_of_the_template_reach_it_and_the_identity_of_the_store(model, tmp_path):
    template = tmp_path / "tools.jinja"
    template.write_text(
        "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{{ date }}{% for m in messages %}"
        "[{{ m.role }}]{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }} "
        "{{ call.function.arguments | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    calls = [{"function": {"name": "add", "arguments": '{"left": 12}'}}]
    row = {"id": "c", "messages": [tiny.CHAT[0], {"role": "assistant", "content": None, "tool_calls": calls}]}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    texts = tmp_path / "chats.jsonl"
    texts.write_text(json.dumps(row | {"tools": json.dumps(tools)}))
    settings = {"chat_template": str(template), "chat_template_kwargs": {"date": "1 May"}}
    capture_texts(config(model, texts, tmp_path / "store", **settings))
    (record,) = open_store(tmp_path / "store")
    table = open_store(tmp_path / "store").table
    text = b"".join(table.bytes_of(int(token)) for token in record.text.input_ids)
    assert text.lstrip().startswith(b"[add]1 May[user]")
    (start, _), (_, stop) = record.text.spans[0], record.text.spans[-1]
    shift = len(text) - len(text.lstrip())
    assert text[start + shift : stop + shift] == b'add {"left": 12}'
    assert not np.isnan(record.ce_per_byte)
    settings["chat_template_kwargs"] = {"date": "2 May"}
    with pytest.raises(MismatchError, match="template_hash"):
        capture_texts(config(model, texts, tmp_path / "store", **settings))
    texts.write_text(json.dumps(row))
    with pytest.raises(MismatchError, match="texts_fingerprint"):
        capture_texts(config(model, texts, tmp_path / "store", **settings))
