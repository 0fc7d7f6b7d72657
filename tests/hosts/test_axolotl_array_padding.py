"""Rows as arrays are padded as axolotl's own collators pad rows as lists."""

import copy
import pickle

import numpy as np
import pytest
import tiny
import torch
from axolotl.utils.collators import (
    BatchSamplerDataCollatorForSeq2Seq,
    DataCollatorForSeq2Seq,
    V2BatchSamplerDataCollatorForSeq2Seq,
)

from fusion_plugins.axolotl.array_padding import ArrayPadding


def rows(lengths=(3, 7, 1), **more):
    rng = np.random.default_rng(0)
    made = []
    for length in lengths:
        ids = rng.integers(0, 200, length, np.int32)
        labels = np.where(rng.random(length) < 0.5, -100, ids).astype(np.int32)
        row = {"input_ids": ids, "attention_mask": np.ones(length, np.int8), "labels": labels}
        made.append(row | {name: make(length) for name, make in more.items()})
    return made


def as_lists(given):
    if isinstance(given, dict):
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in given.items()}
    return [as_lists(each) for each in given]


class Counting:
    """A tokenizer that counts how often its own `pad` is asked."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def pad(self, *args, **settings):
        self.calls += 1
        return self.tokenizer.pad(*args, **settings)


def padding_tokenizer(side="right"):
    tokenizer = copy.deepcopy(tiny.sentencepiece_bpe())
    tokenizer.pad_token, tokenizer.padding_side = "<unk>", side
    return tokenizer


def both(given, tokenizer, collator=DataCollatorForSeq2Seq, **settings):
    """Return the batch of rows as arrays, that of axolotl alone, and how often the tokenizer had to pad."""
    counting = Counting(tokenizer)
    found = collator(ArrayPadding(counting), **settings)(copy.deepcopy(given))
    return found, collator(tokenizer, **settings)(as_lists(given)), counting.calls


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "settings", [{}, {"pad_to_multiple_of": 8}, {"pad_to_multiple_of": 7}, {"max_length": 4}, {"padding": "longest"}]
)
def test_rows_as_arrays_become_the_batch_of_axolotl(side, settings):
    positions = {"position_ids": lambda length: np.arange(length, dtype=np.int64)}
    for given in (rows(), rows((5,)), rows((4, 4)), rows(**positions)):
        found, wanted, asked = both(given, padding_tokenizer(side), **settings)
        assert_same(found, wanted)
        assert asked == ("padding" in settings)


@pytest.mark.parametrize("collator", [BatchSamplerDataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq])
def test_packed_sequences_become_the_batch_of_axolotl(collator):
    positions = {"position_ids": lambda length: np.arange(length, dtype=np.int64)}
    given = [rows(**positions), rows((2, 2), **positions)]
    found, wanted, asked = both(given, padding_tokenizer(), collator, pad_to_multiple_of=16)
    assert_same(found, wanted)
    assert not asked


@pytest.mark.parametrize(
    "given",
    [
        as_lists(rows()),
        [{**row, "token_type_ids": np.zeros(len(row["labels"]), np.int8)} for row in rows()],
        [{**row, "score": np.ones(7, np.float32)} for row in rows()],
        [{name: row[name] for name in ("input_ids", "labels")} for row in rows()],
        [{**row, "number": 3} for row in rows()],
    ],
    ids=["lists", "token types", "fractions", "no mask", "numbers"],
)
def test_the_tokenizer_pads_all_other_rows(given):
    found, wanted, asked = both(given, padding_tokenizer())
    assert_same(found, wanted)
    assert asked == 1


def test_a_column_that_fits_no_row_is_refused_as_by_the_tokenizer():
    given = [row | {"other": row["input_ids"]} for row in rows()]
    messages = []
    for tokenizer in (padding_tokenizer(), ArrayPadding(padding_tokenizer())):
        with pytest.raises(ValueError, match="other") as error:
            DataCollatorForSeq2Seq(tokenizer)(copy.deepcopy(given))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_tokenizer_without_a_pad_token_is_refused_as_before():
    tokenizer = copy.deepcopy(tiny.sentencepiece_bpe())
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="padding token"):
        DataCollatorForSeq2Seq(ArrayPadding(tokenizer))(rows())


def test_it_follows_the_tokenizer_and_can_be_pickled():
    tokenizer = padding_tokenizer()
    padding = ArrayPadding(tokenizer)
    tokenizer.padding_side = "left"
    assert padding.padding_side == "left"
    again = pickle.loads(pickle.dumps(padding))
    assert_same(DataCollatorForSeq2Seq(again)(rows()), DataCollatorForSeq2Seq(tokenizer)(as_lists(rows())))
