"""The log-probability of a whole answer, over the tokens that supervised training takes."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import tiny

from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer
from fusion_plugins.core.fusion.answers import answer_logprob
from fusion_plugins.core.fusion.record import build_record
from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.text.tokenize import tokenize_content
from fusion_plugins.store.packed import PackedRecord, pack

QUESTION = {"role": "user", "content": "How much?"}
EARLIER = [QUESTION, {"role": "assistant", "content": "Five."}, {"role": "user", "content": "Sure?"}]


def record_of(target, chat):
    tokens, _ = tokenize_content(target.tokenizer, target.table, chat)
    size = len(tokens.input_ids)
    logprobs = -np.random.default_rng(size).random(size).astype(np.float32) * 9
    none = np.full((size, 1), -1, np.int32), np.full((size, 1), -np.inf, np.float32)
    return build_record("x", tokens, TopK(*none, logprobs))


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_bpe", "digit_splitting", "mistral_v1"])
@pytest.mark.parametrize("before", [[QUESTION], EARLIER], ids=["one turn", "three turns"])
@pytest.mark.parametrize("text", ["It is 12, of course.", "use </s> to end", "\n a", "数学 👩‍👩‍👧", "<|im_end|> q"])
def test_the_answer_has_the_tokens_that_training_learns(name, before, text):
    target = TargetTokenizer.of(getattr(tiny, name)(), {})
    record = record_of(target, [*before, {"role": "assistant", "content": text}])
    answer = target.answer(before, text)
    first, tokens = len(answer.prompt_ids), len(answer.answer_ids)
    assert record.text.input_ids.tolist()[: first + tokens] == answer.input_ids
    expected = record.topk.token_logprobs[first - 1 : first - 1 + tokens].astype(np.float64).sum()
    assert answer_logprob(record, target.table) == (pytest.approx(expected, abs=1e-9), tokens)


@pytest.mark.parametrize("name", ["byte_level", "mistral_v1"])
@pytest.mark.parametrize("before", [[QUESTION], EARLIER], ids=["one turn", "three turns"])
def test_a_store_keeps_the_log_probability_of_an_answer_exactly(name, before):
    target = TargetTokenizer.of(getattr(tiny, name)(), {})
    chats = [[*before, {"role": "assistant", "content": "It is 12. " * times}] for times in (1, 7, 30, 31, 32)]
    for chat in chats:
        record = record_of(target, chat)
        exact, tokens = answer_logprob(record, target.table)
        for table, tolerance in ((target.table, 1e-5), (None, 1.0)):
            kept = PackedRecord("x", pa.py_buffer(pack(record, table)), 1).unpack()
            assert np.isnan(kept.topk.token_logprobs[-1])
            assert answer_logprob(kept, target.table) == (pytest.approx(exact, abs=tolerance, rel=0), tokens)
        again = PackedRecord("x", pa.py_buffer(pack(kept, target.table)), 1).unpack()
        assert answer_logprob(again, target.table) == answer_logprob(kept, target.table)
    assert abs(exact) > 300
    assert kept.answer_rest == 0  # as in stores of earlier versions


def test_a_chat_without_an_answer_has_none():
    target = TargetTokenizer.of(tiny.byte_level(), {})
    record = record_of(target, [QUESTION, {"role": "assistant", "content": "Five."}])
    for spans in ([], [[3, 3]]):
        text = replace(record.text, spans=np.array(spans, np.int32).reshape(-1, 2))
        assert answer_logprob(replace(record, text=text), target.table) == (0.0, 0)
