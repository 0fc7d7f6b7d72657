"""`ask_ids`: the source's store also holds what it gives to the target's own most probable tokens."""

import numpy as np
import pytest
import source_checks
from source_checks import capture_config as config

from fusion_plugins.core.fusion.asked import IdsOfTarget
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.errors import ConfigError, MismatchError
from fusion_plugins.sources.asked import Asked, require_answers
from fusion_plugins.sources.backends.topk import topk_and_asked
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.store import open_store


@pytest.fixture(scope="module")
def stores(model, padded_model, tmp_path_factory):
    """The target's store, and that of a source with another tokenizer that was asked for the target's tokens."""
    folder = tmp_path_factory.mktemp("asked")
    texts = source_checks.texts(folder / "texts.jsonl")
    capture_texts(config(model, texts, folder / "target", top_k=6))
    capture_texts(config(padded_model, texts, folder / "source", top_k=4, ask_ids=str(folder / "target")))
    return folder, texts


def test_the_targets_own_tokens_are_among_the_entries_with_the_sources_log_probabilities(stores, padded_model):
    folder, _ = stores
    target, source = open_store(folder / "target"), open_store(folder / "source")
    assert source.manifest.top_k == 4 + 6
    back = {token: place for place, token in enumerate(source.table.tokens) if source.table.ordinary[place]}
    asked = 0
    for record in source:
        known = target[record.id]
        expected = source_checks.reference_logprobs(padded_model, record.text.input_ids)
        ends = known.text.ends.tolist()
        for u in range(len(record.text.ends) - 1):
            held = record.topk.ids[u][record.topk.ids[u] >= 0].tolist()
            assert len(set(held)) == len(held)
            if not held:
                continue
            np.testing.assert_allclose(record.topk.logprobs[u][: len(held)], expected[u, held], rtol=2e-3, atol=1e-3)
            assert (np.diff(record.topk.logprobs[u][: len(held)]) <= 0).all()
            most = np.argsort(-expected[u, : source.table.vocab_size], kind="stable")[:4]
            assert set(most.tolist()) <= set(held)
            if not 0 < record.text.ends[u] < record.text.ends[-1]:
                continue
            if record.text.ends[u] not in ends or not record.text.exact[u]:
                continue
            # The position of the target that has read the same bytes: the last one there.
            t = len(ends) - 1 - ends[::-1].index(record.text.ends[u])
            wanted = {back.get(target.table.tokens[int(token)], -1) for token in known.topk.ids[t] if token >= 0}
            wanted = {token for token in wanted if token >= 0}
            assert wanted <= set(held)
            asked += len(wanted)
    assert asked > 100


def test_a_store_is_not_resumed_with_other_ids(stores, model, padded_model, tmp_path):
    folder, texts = stores
    capture_texts(config(model, texts, tmp_path / "other", top_k=5))
    with pytest.raises(MismatchError, match="top_k|dtype"):
        capture_texts(config(padded_model, texts, folder / "source", top_k=5, ask_ids=str(tmp_path / "other")))
    capture_texts(config(padded_model, texts, folder / "source", top_k=4, ask_ids=str(folder / "target")))


def test_a_store_of_other_texts_is_named(stores, padded_model, tmp_path):
    folder, _ = stores
    other = source_checks.write_rows(tmp_path / "other.jsonl", [{"id": "elsewhere", "text": "Another text."}])
    with pytest.raises(MismatchError, match="lacks text 'elsewhere'"):
        capture_texts(config(padded_model, other, tmp_path / "out", ask_ids=str(folder / "target")))
    changed = source_checks.write_rows(tmp_path / "changed.jsonl", [{"id": "t0-0", "text": "It was changed since."}])
    with pytest.raises(MismatchError, match="ask_ids: .* text 't0-0'"):
        capture_texts(config(padded_model, changed, tmp_path / "out2", ask_ids=str(folder / "target")))


@pytest.mark.parametrize("backend", ["openai", "ray"])
def test_a_backend_that_cannot_be_asked_says_so_before_it_is_opened(stores, padded_model, tmp_path, backend):
    folder, texts = stores
    settings = config(padded_model, texts, tmp_path / "out", ask_ids=str(folder / "target"))
    with pytest.raises(ConfigError, match=f"transformers or vllm, got {backend}"):
        capture_texts(settings.model_copy(update={"backend": backend, "tokenizer": str(padded_model)}))


def test_an_engine_that_cannot_be_asked_is_named_with_the_cure():
    class Engine:
        facts = {"engine": "vllm", "engine_version": "0.31.0"}

    with pytest.raises(ConfigError, match="vllm 0.31.0, which cannot: .*prompt_logprob_token_ids"):
        require_answers(Engine(), "teacher")


def test_ids_are_mapped_back_one_to_one_by_bytes_and_by_role():
    target = TokenTable([b"a", b"b", b"ab", b"</s>"], [None] * 3 + [Role.EOS], {Role.EOS: 3}, False, "byte_level")
    own = TokenTable([b"<end>", b"ab", b"a"], [Role.EOS, None, None], {Role.EOS: 0}, False, "byte_level")
    assert IdsOfTarget.of(own, target).ids.tolist() == [2, -1, 1, 0]


def test_a_source_is_not_asked_for_ids_that_its_model_has_no_row_for(stores):
    folder, _ = stores
    own = open_store(folder / "source").table
    every, some = (Asked.of(str(folder / "target"), own, "transformers", rows).ids.ids for rows in (None, 50))
    assert every.max() >= 50 > some.max() >= 0
    assert np.array_equal(some[every < 50], every[every < 50])


def test_ids_are_not_asked_for_beside_the_whole_vocabulary(stores, padded_model, tmp_path):
    folder, texts = stores
    with pytest.raises(ValueError, match="ask_ids: with top_k: all every token is there already"):
        config(padded_model, texts, tmp_path / "out", top_k="all", ask_ids=str(folder / "target"))


def test_entries_hold_each_id_once_in_the_order_of_their_probability():
    ids, said = np.array([[3, 1]], np.int32), np.array([[-0.5, -2.0]], np.float32)
    asked = np.array([[1, 7, -1, 99]], np.int32), np.array([[-2.0, -1.0, -np.inf, -0.1]], np.float32)
    found = topk_and_asked(ids, said, np.array([-0.5], np.float32), asked, 6, vocab_size=10)
    assert found.ids[0].tolist() == [3, 7, 1, -1, -1, -1]
    assert found.logprobs[0, :3].tolist() == [-0.5, -1.0, -2.0]
