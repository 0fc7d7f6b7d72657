"""A real language model, captured: its log-probabilities, perplexity and fused distributions are right."""

import math

import numpy as np
import pytest
import real_assets
import real_store_size
import source_checks
import tiny
import torch
from transformers import AutoModelForCausalLM

from fusion_plugins.core.fusion.align import align_texts
from fusion_plugins.core.fusion.common_text import common_text
from fusion_plugins.core.fusion.project import ProjectionOptions, Projector
from fusion_plugins.core.fusion.vocabulary_map import map_vocabulary
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.store import open_store

pytestmark = [pytest.mark.real, pytest.mark.slow]
TEXT = (
    "The river rises in the mountains and flows west for three hundred kilometres before it reaches the sea. In 1848 "
    "a flood destroyed the old bridge; the new one, built of stone, still stands. Question: how many arches has it?\n\n"
    "def arches(length, span):\n    return length // span  # 120 // 15 == 8\n"
)
#: float32 on the CPU; the stores round log-probabilities to about three digits
TOLERANCE = {"rtol": 2e-3, "atol": 2e-3}


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """The text and the tiny texts in a store, and the network that it was captured from."""
    folder = tmp_path_factory.mktemp("smollm2")
    texts = [TEXT, *tiny.TEXTS]
    rows = [{"id": str(index), "text": text} for index, text in enumerate(texts)]
    path = source_checks.write_rows(folder / "texts.jsonl", rows)
    capture_texts(source_checks.capture_config(real_assets.model_folder(), path, folder / "store", top_k=64))
    network = AutoModelForCausalLM.from_pretrained(real_assets.model_folder(), dtype=torch.float32).eval()
    return open_store(folder / "store"), network, texts


def logprobs_of(network, ids):
    with torch.inference_mode():
        logits = network(torch.tensor(ids, dtype=torch.long)[None]).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def test_perplexity_is_that_of_transformers_own_loss(captured):
    store, network, texts = captured
    for index, text in enumerate(texts[:4]):
        ids = real_assets.tokenizer("smollm2")(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            loss = float(network(ids, labels=ids).loss)
        assert store[str(index)].ce_per_token == pytest.approx(loss, rel=2e-3)
    assert 2 < math.exp(store["0"].ce_per_token) < 40  # it has learned English


def test_stored_log_probabilities_are_the_models(captured):
    store, network, texts = captured
    for index in (0, 6, 8):  # English, Chinese, a list of words
        record = store[str(index)]
        expected = logprobs_of(network, record.text.input_ids.tolist())
        values = np.take_along_axis(expected, np.maximum(record.topk.ids, 0), axis=-1)
        np.testing.assert_allclose(record.topk.logprobs[:-1], values[:-1], **TOLERANCE)
        largest = np.sort(expected, axis=-1)[:, ::-1][:, :64]
        np.testing.assert_allclose(values[:-1], largest[:-1], rtol=2e-3, atol=5e-3)
        gold = np.take_along_axis(expected[:-1], record.text.input_ids[1:, None].astype(int), axis=-1)[:, 0]
        np.testing.assert_allclose(record.topk.token_logprobs[:-1], gold, **TOLERANCE)


@pytest.mark.parametrize("target", ["qwen3", "llama2"])
def test_projected_distributions_are_right_against_the_full_distribution(captured, target):
    """Where both tokenizers have the same next token, each target token gets what its equal has; else, the chain."""
    store, network, _ = captured
    source = TokenTable.from_tokenizer(real_assets.tokenizer("smollm2"))
    tokenizer = real_assets.tokenizer(target)
    table = TokenTable.from_tokenizer(tokenizer)
    vocabulary = map_vocabulary(source, table, method="exact")
    projector = Projector.of(source, table, vocabulary, ProjectionOptions(renormalize=False, min_mass=0))
    record, aim = common_text(store["0"], tokenize(tokenizer, table, TEXT), source.packed, table.packed)
    found = projector(record, align_texts(record.text, aim), aim)
    ids = record.text.input_ids.tolist()
    full = logprobs_of(network, ids)
    source_at = {int(end): at for at, end in enumerate(record.text.ends.tolist())}
    equal = {token: index for index, token in reversed(list(enumerate(source.tokens)))}
    direct = chained = 0
    for t in np.flatnonzero(found.distributions.present[:-1]).tolist():
        u, label = source_at[int(aim.ends[t])], int(aim.input_ids[t + 1])
        pieces = [v for v in range(u + 1, len(ids)) if record.text.ends[v] <= aim.ends[t + 1]]
        if table.role_of(label) or not pieces or record.text.ends[pieces[-1]] != aim.ends[t + 1]:
            continue
        chain = sum(full[v - 1, ids[v]] for v in pieces)
        if len(pieces) > 1:
            chained += 1
            assert found.label_logprobs[t] >= chain - 0.01  # the chain, and entries that begin with the label
            continue
        direct += 1
        entries = zip(found.distributions.ids[t].tolist(), found.distributions.logprobs[t].tolist(), strict=True)
        for token, value in entries:
            if token >= 0 and token != label and not table.role_of(token) and math.exp(value) > 1e-3:
                assert value == pytest.approx(full[u, equal[table.tokens[token]]], abs=5e-3)
        assert found.label_logprobs[t] >= chain - 0.01
        # What came on top is the mass of entries that begin with the label, and nothing else.
        begins = [i for i in record.topk.ids[u].tolist() if source.tokens[i].startswith(table.tokens[label])]
        assert math.exp(found.label_logprobs[t]) <= np.exp(full[u, begins]).sum() + math.exp(chain) + 1e-3
    assert direct > 60
    assert chained > 0 or target == "qwen3"


#: entries per position -> most bytes per token that docs/store.md promises
PROMISED = {10: 40, 64: 180}


def test_a_store_of_a_real_model_takes_no_more_than_the_documents_say(tmp_path):
    texts = real_store_size.write_texts(tmp_path / "texts.jsonl", tokens=1500)
    for top_k, most in PROMISED.items():
        tokens, size = real_store_size.measure(tmp_path / str(top_k), texts, top_k)
        assert tokens > 1000
        assert size <= most
