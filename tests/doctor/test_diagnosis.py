"""The counts of one source, from records whose probabilities are known."""

import numpy as np
import pytest
import tiny
from records import record_of

from fusion_plugins.core.fusion.project import ProjectionOptions
from fusion_plugins.core.fusion.types import VocabularyMap
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.doctor.advice import advice, verdict
from fusion_plugins.doctor.diagnosis import ClassCount, diagnose, figures

TEXT = "Ann has 12 apples and buys 345 more. She has 357 apples."


def _certain(probability, id="0", text=TEXT):
    """A record of top_k 1 that gives every next token the same probability."""
    tokenizer = tiny.byte_level()
    tokens = tokenize(tokenizer, TokenTable.from_tokenizer(tokenizer), text)
    n = len(tokens.input_ids)
    logprobs = np.full(n, np.log(probability), np.float32)
    return record_of(id, tokens, np.append(tokens.input_ids[1:], 0)[:, None], logprobs[:, None], logprobs)


def _diagnose(pairs, **options):
    table = TokenTable.from_tokenizer(tiny.byte_level())
    ids = np.arange(table.vocab_size, dtype=np.int32)
    return diagnose("a", pairs, (table, table), VocabularyMap(ids, np.zeros_like(ids), "identity"), **options)


def test_equal_distributions_give_the_label_equal_probability():
    found = _diagnose([(_certain(0.3), _certain(0.3))])
    assert found.total.used > 0
    assert found.total.label == pytest.approx(found.total.target_label)
    assert found.total.label == pytest.approx(0.3 * found.total.used)


def test_figures_of_known_probabilities():
    found = _diagnose([(_certain(0.3), _certain(0.2))])
    values = figures(found)
    assert values["label probability"] == pytest.approx(0.3)
    assert values["label probability, target"] == pytest.approx(0.2)
    assert values["label is top 1"] == values["coverage"] == values["texts won"] == values["vocabulary overlap"] == 1.0
    assert values["without a distribution"] == values["vocabulary unmapped"] == 0.0
    kinds = ("one-to-one", "one-to-many", "many-to-one", "crossing", "special")
    assert sum(values[f"positions {kind}"] for kind in kinds) == pytest.approx(1.0)
    assert values["mass kept"] + values["mass outside top k"] == pytest.approx(1.0)
    # With one tokenizer every token is a chunk.
    assert values["chunks, tokens in each"] == values["chunks, tokens that are one"] == 1.0
    assert values["chunks, bytes in none"] == 0.0
    assert found.chunks.positions == found.chunks.chunks


def test_a_target_that_knows_the_labels_better_is_reported_at_a_top_k_of_one():
    texts = [(_certain(0.1), _certain(0.5))] * 19 + [(_certain(0.6), _certain(0.5))]
    found = _diagnose(texts)
    assert found.wins == 1
    assert any("the target itself gives" in line for line in advice(found, ProjectionOptions()))


def test_another_model_with_the_tokenizer_of_the_target_is_a_source_that_needs_no_map():
    found = _diagnose([(_certain(0.3), _certain(0.2))])
    assert not found.is_target
    assert found.vocabulary_map == "identity"
    assert verdict(found, advice(found, ProjectionOptions())) != "own"


def test_progress_counts_texts_and_the_source_tokens_of_each():
    seen, record = [], _certain(0.3)
    _diagnose([(record, record)] * 2, advance=lambda *counts: seen.append(counts))
    assert seen == [(1, len(record.text.input_ids))] * 2


def test_counts_of_a_class_add_up():
    added = ClassCount(3, 2, 0.5, 0.25, 1) + ClassCount(1, 1, 0.25, 0.5, 0)
    assert added == ClassCount(4, 3, 0.75, 0.75, 1)
