import copy
from dataclasses import replace

import numpy as np
import pytest
import tiny
from records import record_of

from fusion_plugins.core.fusion.common_text import _same_texts, common_text, common_texts, comparable
from fusion_plugins.core.fusion.flat import Texts
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize, tokenize_content
from fusion_plugins.errors import AlignmentError


def sides(source_text, target_text, *, source="byte_level", target="sentencepiece_bpe", spans=(None, None), **options):
    """A record of the source and the target's tokens, and the vocabularies of both."""
    vocabularies, texts = [], {}
    for side, name, text, span in (
        ("source", source, source_text, spans[0]),
        ("target", target, target_text, spans[1]),
    ):
        tokenizer = getattr(tiny, name)()
        table = TokenTable.from_tokenizer(tokenizer)
        vocabularies.append(table.packed)
        extra = options if side == "target" else {}
        texts[side] = tokenize(tokenizer, table, text, spans=span, **extra)
    n = len(texts["source"].input_ids)
    zeros = np.zeros(n, np.float32)
    return (
        record_of("r", texts["source"], np.zeros((n, 1), np.int32), zeros[:, None], zeros),
        texts["target"],
        vocabularies,
    )


def contents(record, target):
    return [
        (record.text.spans[:, 1] - record.text.spans[:, 0]).tolist(),
        (target.spans[:, 1] - target.spans[:, 0]).tolist(),
    ]


def test_equal_texts_come_back_as_they_are():
    record, target, vocabularies = sides("café 12 数学", "café 12 数学")
    same_record, same_target = common_text(record, target, *vocabularies)
    assert same_record is record
    assert same_target is target


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("kept", "stripped", "inner_kept", "inner_stripped"),
    [
        ("<  12 apples  >", "<12 apples>", (3, 12), (1, 10)),
        ("<\u3000数学\n>", "<数学>", (4, 10), (1, 7)),
        ("<\n\n>", "<>", (3, 3), (1, 1)),
    ],
)
def test_white_space_that_one_template_strips_is_narrowed_away(kept, stripped, inner_kept, inner_stripped, swapped):
    """Each text is one message between < and >."""
    texts, inner = (kept, stripped), (inner_kept, inner_stripped)
    if swapped:
        texts, inner = texts[::-1], inner[::-1]
    record, target, vocabularies = sides(*texts, spans=[[(1, len(text.encode()) - 1)] for text in texts])
    narrow, narrow_target = common_text(record, target, *vocabularies)
    assert (tuple(narrow.text.spans[0]), tuple(narrow_target.spans[0])) == inner


def test_a_cut_text_is_used_as_far_as_it_goes():
    record, target, vocabularies = sides("The 12 apples and more", "The 12 apples and more", max_length=7)
    narrow, narrow_target = common_text(record, target, *vocabularies)
    assert contents(narrow, narrow_target) == [[int(target.ends[-1])]] * 2


def test_characters_that_a_normaliser_writes_otherwise_are_not_another_text():
    text = "ＡＢ ﬁne\ttab 株式会社 ㈱ Ω"
    record, target, vocabularies = sides(text, text, target="unigram")
    assert contents(*common_text(record, target, *vocabularies)) == [[len(text.encode())]] * 2


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ("He has 12 apples", "He has 13 apples", "at byte 8 of supervised span 0 .* 'He has 12 apples'"),
        ("He has 12 apples", "He has 12 apples today", "at byte 16 of supervised span 0"),
        ("Anna has 12", "Bert has 12", "at byte 0 of supervised span 0"),
    ],
)
def test_another_text_is_refused_with_the_place(left, right, message):
    record, target, vocabularies = sides(left, right)
    with pytest.raises(AlignmentError, match=message):
        common_text(record, target, *vocabularies)


def test_another_number_of_messages_is_refused():
    record, target, vocabularies = sides("ab cd", "ab cd", spans=([(0, 2)], [(0, 2), (3, 5)]))
    with pytest.raises(AlignmentError, match="has 1 supervised spans, the target's text 2"):
        common_text(record, target, *vocabularies)


def test_cross_entropies_are_those_of_the_bytes_that_every_source_has_read():
    tokenizer, text = tiny.byte_level(), "the quick fox 12 the lazy dog"
    table = TokenTable.from_tokenizer(tokenizer)
    target = tokenize(tokenizer, table, text)

    def read(max_length):
        tokens = tokenize(tokenizer, table, text, max_length=max_length)
        gold = -np.arange(len(tokens.input_ids), dtype=np.float32)
        return record_of("r", tokens, np.zeros((len(gold), 1), np.int32), gold[:, None], gold)

    records = [read(length) for length in (None, 6, 9)]
    common = [common_text(record, target, table.packed, table.packed) for record in records]
    found = comparable(records, common)
    assert found[1] is records[1]
    assert [r.ce_per_byte for r in found] == [pytest.approx(records[1].ce_per_byte)] * 3
    assert [r.ce_per_token for r in found] == [pytest.approx(records[1].ce_per_token)] * 3
    assert comparable(records[:1], common[:1])[0] is records[0]


THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.reasoning_content %}(analysis){{ m.reasoning_content }}"
    "(end)(start){% endif %}(final){{ m.content }}{% for call in m.tool_calls or [] %}"
    "(to={{ call.function.name }}){{ call.function.arguments | tojson }}(call){% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
XML = THINK.replace("{{ call.function.arguments | tojson }}", "{% for k, v in call.function.arguments.items() %}"
                    "<arg>{{ k }}={{ v }}</arg>{% endfor %}")  # fmt: skip
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"left": 12, "right": 30}}}
REASONED = [
    {"role": "user", "content": "12 + 30?"},
    {"role": "assistant", "content": "42 apples", "reasoning_content": "12 and 30"},
    {"role": "user", "content": "Again?"},
    {"role": "assistant", "content": "So 42 apples", "reasoning_content": "the same: 42 apples"},
]
CALLED = [
    {"role": "user", "content": "12 + 30?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "42 apples"},
]


def rendered(template, messages, make):
    tokenizer = copy.copy(make())
    tokenizer.chat_template = template
    table = TokenTable.from_tokenizer(tokenizer)
    tokens, text = tokenize_content(tokenizer, table, messages)
    return tokens, text.encode(), table


def shared(source_template, target_template, messages):
    """The texts that two templates have in common, as the narrowed spans of both sides hold them."""
    source, source_text, source_table = rendered(source_template, messages, tiny.digit_splitting)
    target, target_text, target_table = rendered(target_template, messages, tiny.byte_level)
    n = len(source.input_ids)
    zeros = np.zeros(n, np.float32)
    record = record_of("r", source, np.zeros((n, 1), np.int32), zeros[:, None], zeros)
    own, other = common_text(record, target, source_table.packed, target_table.packed)
    texts = [source_text[start:stop].decode() for start, stop in own.text.spans]
    assert texts == [target_text[start:stop].decode() for start, stop in other.spans]
    return texts


@pytest.mark.parametrize(
    ("source", "target", "messages", "expected"),
    [
        (THINK, THINK, REASONED, ["42 apples", "<think>\nthe same: 42 apples\n</think>\n\nSo 42 apples"]),
        (THINK, CHANNELS, REASONED, ["42 apples", "the same: 42 apples", "So 42 apples"]),
        (PLAIN, THINK, REASONED, ["42 apples", "So 42 apples"]),
        (CHANNELS, PLAIN, REASONED, ["42 apples", "So 42 apples"]),
        (THINK, THINK, CALLED, ['<tool_call>\n{"name": "add", "arguments": {"left": 12, "right": 30}}\n</tool_call>',
                                "42 apples"]),
        (THINK, CHANNELS, CALLED, ["add", '{"left": 12, "right": 30}', "42 apples"]),
        (XML, CHANNELS, CALLED, ["add", "42 apples"]),
        (XML, THINK, CALLED, ['<tool_call>\n{"name": "add', "42 apples"]),
    ],
)  # fmt: skip
def test_turns_in_other_syntax_have_their_parts_in_common(source, target, messages, expected):
    assert shared(source, target, messages) == expected


def test_another_answer_is_refused_whatever_the_syntax():
    other = [*CALLED[:-1], {"role": "assistant", "content": "43 apples"}]
    source, _, table = rendered(THINK, other, tiny.digit_splitting)
    target, _, target_table = rendered(CHANNELS, CALLED, tiny.byte_level)
    n = len(source.input_ids)
    zeros = np.zeros(n, np.float32)
    record = record_of("r", source, np.zeros((n, 1), np.int32), zeros[:, None], zeros)
    with pytest.raises(AlignmentError, match="the source continues '43 apples', the target '42 apples'"):
        common_text(record, target, table.packed, target_table.packed)


def test_a_store_that_holds_the_answers_alone_is_still_used():
    source, _, table = rendered(PLAIN, tiny.CHAT, tiny.digit_splitting)
    source = replace(source, spans=source.spans[1::3])
    target, text, target_table = rendered(THINK, tiny.CHAT, tiny.byte_level)
    n = len(source.input_ids)
    zeros = np.zeros(n, np.float32)
    record = record_of("r", source, np.zeros((n, 1), np.int32), zeros[:, None], zeros)
    _, other = common_text(record, target, table.packed, target_table.packed)
    answers = [message["content"] for message in tiny.CHAT if message["role"] == "assistant"]
    assert [text[start:stop].decode() for start, stop in other.spans] == answers


def random_chats(count, seed):
    """Turns of syntax and parts on both sides: the same, another, empty, apart, or without a counterpart."""
    rng = np.random.default_rng(seed)

    def piece(*given):
        return str(rng.choice(given))

    for _ in range(count):
        texts, spans = ["", ""], [[], []]
        for _ in range(int(rng.integers(1, 4))):
            question = piece("Q", "12 cats?", "")
            texts = [text + question for text in texts]
            for place in range(int(rng.choice([1, 3, 5]))):
                own = (
                    piece("The 12 cats.", "数学", " it is", "", "  x  ")
                    if place % 2
                    else piece("<a>", "\n", "", "</a>\n")
                )
                likely = 0.6 if place % 2 == 0 else 0.15
                other = own if rng.random() > likely else piece("<b>", own.strip(), "", "</a>", f" {own}", "cats")
                for side, written in enumerate((own, other)):
                    start = len(texts[side].encode())
                    texts[side] += written
                    spans[side].append((start, len(texts[side].encode())))
                if rng.random() < 0.1:
                    texts[int(rng.integers(2))] += "|"
        yield texts, spans


def test_a_batch_is_narrowed_as_its_texts_are_one_by_one():
    tables = {}
    for name in ("byte_level", "sentencepiece_bpe"):
        tokenizer = getattr(tiny, name)()
        tables[name] = tokenizer, TokenTable.from_tokenizer(tokenizer)
    records, targets = [], []
    for texts, spans in random_chats(400, seed=3):
        source, target = (
            tokenize(*tables[name], text, spans=span) for name, text, span in zip(tables, texts, spans, strict=True)
        )
        zeros = np.zeros(len(source.input_ids), np.float32)
        records.append(record_of("r", source, np.zeros((len(zeros), 1), np.int32), zeros[:, None], zeros))
        targets.append(target)
    vocabularies = [table.packed for _, table in tables.values()]
    batch = Texts.of([record.text for record in records]), Texts.of(targets)
    source, target, errors = common_texts(*batch, records, targets, tuple(vocabularies))
    settled, _, _ = _same_texts(*batch, *vocabularies)
    seen, expected = {"parts": 0, "syntax left out": 0}, {}
    for b, (record, text) in enumerate(zip(records, targets, strict=True)):
        try:
            narrow, narrow_text = common_text(record, text, *vocabularies)
        except AlignmentError as error:
            expected[b] = str(error)
            continue
        assert source.spans_of(b).tolist() == narrow.text.spans.tolist()
        assert target.spans_of(b).tolist() == narrow_text.spans.tolist()
        less = np.diff(narrow_text.spans).sum() < np.diff(text.spans).sum()
        seen["syntax left out" if settled[b] and less else "parts"] += 1
    assert {b: str(error) for b, error in errors.items()} == expected
    assert min(*seen.values(), len(expected)) > 40, (seen, len(expected))


@pytest.mark.parametrize(
    ("said", "read"), [("Anna has 12", "Emma has 12"), ("12", "34"), (" x", "yx"), ("数学", "答案")]
)
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("sentencepiece_bpe", "byte_level"),
        ("byte_level", "sentencepiece_bpe"),
        ("sentencepiece_bpe", "sentencepiece_bpe"),
        ("byte_level", "mistral_v1"),
        ("byte_level", "unigram"),
    ],
)
def test_another_first_word_is_seen_though_the_tokenizer_put_a_space_before_it(source, target, said, read):
    assert common_text(*_parts(read, read, source, target))
    with pytest.raises(AlignmentError, match="of another text"):
        common_text(*_parts(said, read, source, target))


def _parts(said, read, source, target):
    record, text, vocabularies = sides(said, read, source=source, target=target)
    return record, text, *vocabularies
