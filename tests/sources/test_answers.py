"""Sampled answers as texts: what is kept of them, what is captured, and which of them."""

import copy
import json

import numpy as np
import pytest
import source_checks
import tiny
from source_checks import capture_config, sample_config, write_rows

from fusion_plugins.core.text.chat import generated_spans
from fusion_plugins.core.text.sampled import SampledAnswer, tokenize_answer
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import chat_renderer
from fusion_plugins.errors import ConfigError, DataError, MismatchError
from fusion_plugins.inputs import open_texts, read_texts
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.sources.sample import COLUMNS, sample_prompts
from fusion_plugins.store import RowManifest, RowWriter, open_rows, open_store

SYSTEM = "Answer in one word."


@pytest.fixture(scope="module")
def sampled(models, tmp_path_factory):
    """Responses of two models, one of them with a system prompt, three to each of six prompts."""
    folder = tmp_path_factory.mktemp("sampled")
    sources = [
        {"name": name, "model": str(model), "max_tokens": 6, "system": SYSTEM if name == "llama" else None}
        for name, model in models.items()
    ]
    prompts = source_checks.prompts(folder / "prompts.jsonl")
    settings = sample_config({}, prompts, folder / "out", n=3, sources=sources)
    sample_prompts(settings)
    return folder / "out"


def test_the_drawn_tokens_and_their_log_probabilities_are_those_of_the_model(models, sampled):
    from transformers import AutoTokenizer

    rows = [row for row in open_rows(sampled) if row["index"] == 0]
    for row in rows:
        tokenizer = AutoTokenizer.from_pretrained(models[row["source"]])
        table = TokenTable.from_tokenizer(tokenizer)
        assert row["tokenizer"] == table.fingerprint
        assert len(row["token_ids"]) == len(row["token_logprobs"]) == row["n_tokens"]
        assert tokenizer.decode(row["token_ids"], skip_special_tokens=True) == row["response"]
        assert row["system"] == (SYSTEM if row["source"] == "llama" else None)
        messages = [{"role": "user", "content": row["prompt"]}]
        messages = [{"role": "system", "content": row["system"]}, *messages] if row["system"] else messages
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = np.array(tokenizer(prompt, add_special_tokens=False)["input_ids"] + row["token_ids"])
        expected = source_checks.reference_logprobs(models[row["source"]], ids)[-len(row["token_ids"]) - 1 : -1]
        expected = np.take_along_axis(expected, np.array(row["token_ids"])[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(row["token_logprobs"], expected, rtol=1e-3, atol=1e-4)


def test_a_model_reads_its_own_answers_in_the_tokens_that_it_drew(models, sampled, tmp_path):
    report = capture_texts(capture_config(models["llama"], sampled, tmp_path / "store"))
    store, rows = open_store(tmp_path / "store"), list(open_rows(sampled))
    table = store.table
    drawn = 0
    texts = {text.id: text for text in read_texts(sampled)}
    assert set(store.ids()) == set(texts)
    for id, text in texts.items():
        record, answer = store[id], text.answer
        start, stop = record.text.spans[0, 0], record.text.spans[-1, 1]
        inside = (record.text.ends > start) & (record.text.ends <= stop)
        raw = b"".join(table.tokens[token] for token in record.text.input_ids)
        assert raw.endswith(text.content[-1]["content"].encode() + (b"" if not answer.finished else b"<|im_end|>\n"))
        own = [row for row in rows if row["token_ids"] == list(answer.token_ids) and row["source"] == "llama"]
        if own and "\ufffd" not in own[0]["response"]:  # half a character is not what was drawn
            assert record.text.input_ids[inside].tolist() == own[0]["token_ids"]
            drawn += 1
            # What the sampler kept and what the capture says are the same numbers, up to float16 of the store.
            places = np.flatnonzero(inside) - 1
            np.testing.assert_allclose(
                record.topk.token_logprobs[places], own[0]["token_logprobs"], rtol=3e-3, atol=2e-3
            )
    assert report.answers.sampled >= drawn > 2
    assert report.answers.sampled + report.answers.same + report.answers.other < len(texts)  # the rest is another's


def folder_of(path, rows):
    """Responses as `fusion sample` writes them."""
    with RowWriter(
        path,
        RowManifest(
            stage="responses",
            columns=COLUMNS | {"correct": "bool", "reward": "float64"},
            key=("prompt_id", "source", "index"),
        ),
    ) as writer:
        for row in rows:
            writer.write(
                {"prompt_id": "p", "source": "a", "prompt": "12 + 30?", "index": 0, "finish_reason": "stop"} | row
            )
        writer.finish()
    return path


def spelled(store, id):
    """What the supervised spans of a record hold, and what the tokens behind them are."""
    record, table = store[id], store.table
    raw = b"".join(table.tokens[token] for token in record.text.input_ids)
    return [raw[start:stop].decode() for start, stop in record.text.spans], raw[record.text.spans[-1, 1] :].decode()


def test_other_tokens_than_the_tokenizers_own_are_kept_and_the_end_is_the_templates(model, tmp_path):
    tokenizer = tiny.byte_level()
    table = TokenTable.from_tokenizer(tokenizer)
    letters = [table.tokens.index(bytes([byte])) for byte in b"the apples"]
    assert letters != tokenizer("the apples")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    drawn = {"token_ids": [*letters, end], "tokenizer": table.fingerprint, "n_tokens": len(letters) + 1}
    rows = [
        {"prompt_id": "drawn", "response": "the apples", **drawn},
        {"prompt_id": "cut", "response": "the apples", **drawn, "token_ids": letters, "finish_reason": "length"},
        {"prompt_id": "broken", "response": "the apples", **drawn, "token_ids": letters, "finish_reason": "abort"},
        {"prompt_id": "changed", "response": "The apples", **drawn},
        {"prompt_id": "other", "response": "the apples", **drawn, "tokenizer": "another"},
        {"prompt_id": "counted", "response": "the apples", "model": str(model), "n_tokens": 9},
        {
            "prompt_id": "as many",
            "response": "the",
            "model": str(model),
            "n_tokens": len(tokenizer("the")["input_ids"]) + 1,
        },
        {"prompt_id": "unknown", "response": "the apples", "model": "elsewhere", "n_tokens": 3},
        {"prompt_id": "empty", "response": " "},
    ]
    rows = [{"prompt": f"{row['prompt_id']}?", **row} for row in rows]
    folder = folder_of(tmp_path / "responses", rows)
    report = capture_texts(capture_config(model, folder, tmp_path / "store"))
    store = open_store(tmp_path / "store")
    ids = {text.content[0]["content"][:-1]: text.id for text in read_texts(folder)}
    assert "empty" not in ids
    for name in ("drawn", "cut", "broken"):
        record = store[ids[name]]
        places = np.flatnonzero(np.isin(record.text.input_ids, letters))[-len(letters) :]
        assert record.text.input_ids[places].tolist() == letters
        assert record.text.exact.all()
    assert [spelled(store, ids[name])[1] for name in ("drawn", "cut", "broken", "changed")] == [
        "<|im_end|>\n",
        "",
        "",
        "<|im_end|>\n",
    ]
    assert spelled(store, ids["cut"])[0] == ["", "the apples", ""]
    last = store[ids["cut"]]
    assert (last.topk.ids[-1] == -1).all()
    assert (last.topk.ids[-2] >= 0).any()
    found = report.answers
    assert (found.sampled, found.same, found.other, found.foreign) == (3, 1, 2, 2)
    assert "2 of them (66.7%) have another number of tokens" in found.described()


def test_responses_without_a_text_of_their_own_are_counted(model, tmp_path):
    rows = [{"index": index, "response": text} for index, text in enumerate(["One.", " ", "One.", "", "Two.", "One."])]
    report = capture_texts(capture_config(model, folder_of(tmp_path / "rows", rows), tmp_path / "store"))
    assert (report.captured, report.without_text) == (2, {"empty": 2, "repeated": 2})


@pytest.mark.parametrize(
    ("rows", "where", "message"),
    [
        ([{"response": " "}, {"index": 1, "response": "\n"}], None, "say something, got 2 that say nothing"),
        ([{"response": ""}, {"index": 1, "response": "x", "reward": 1.0}], {"index": 0}, "got 1 that say nothing"),
        ([], None, "expected responses, got a folder that has none yet"),
        ([], {"domain": "math"}, "expected responses, got a folder that has none yet"),
    ],
)
def test_a_folder_without_a_word_is_refused_before_a_model_is_loaded(rows, where, message, tmp_path):
    folder = folder_of(tmp_path / "rows", rows)
    with pytest.raises(DataError, match=message):
        capture_texts(capture_config("nowhere", folder, tmp_path / "store", where=where))


def test_half_a_character_in_a_response_is_told_with_the_cure(tmp_path):
    row = {"prompt_id": "p", "source": "s", "prompt": "1?", "response": "x\ud83d"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"rows.jsonl:1: expected text that UTF-8 can encode.*Remove it from"):
        read_texts(tmp_path / "rows.jsonl")


ASKED = [{"role": "user", "content": "1?"}]
LATER = [*ASKED, {"role": "assistant", "content": "One."}, {"role": "user", "content": "2?"}]
CALLED = [*ASKED, {"role": "assistant", "content": "Ask."}, {"role": "tool", "content": "1"}]


@pytest.mark.parametrize("messages", [ASKED, LATER, CALLED])
def test_a_chat_whose_answer_is_in_another_column_is_refused(messages, tmp_path):
    """Its earlier turns would be captured and trained on in the place of the answer."""
    from fusion_plugins.axolotl.chat_rows import RowReader

    row = {"prompt_id": "p", "source": "s", "messages": messages, "response": "Two."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    for read in (read_texts, open_texts):
        with pytest.raises(DataError, match=r"rows.jsonl:1: .*an answer in the column 'response'.*to 'prompt'"):
            read(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="an answer in the column 'response'"):
        RowReader.of({}).content(row)
    whole = row | {"id": "whole", "messages": [*messages, {"role": "assistant", "content": "Two."}]}
    answered = {"prompt_id": "p", "source": "s", "prompt": messages, "response": "Two."}
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (whole, answered | {"index": 1})))
    assert [text.content[-1]["content"] for text in read_texts(tmp_path / "good.jsonl")] == ["Two."] * 2


def test_only_the_answer_of_a_chat_is_captured_and_the_system_prompt_is_part_of_it(model, tmp_path):
    prompt = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "2?"},
    ]
    folder = folder_of(tmp_path / "responses", [{"prompt": prompt, "response": "Two.", "system": "Be brief."}])
    capture_texts(capture_config(model, folder, tmp_path / "store"))
    store = open_store(tmp_path / "store")
    assert spelled(store, store.ids()[0])[0] == ["", "Two.", ""]
    raw = b"".join(store.table.tokens[token] for token in next(iter(store)).text.input_ids)
    assert raw.startswith(b"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1?")


WRONG = {"prompt": "1?", "response": "3", "correct": False, "reward": 0.1, "domain": "math", "source": "a"}
RIGHT = {"prompt": "1?", "response": "1", "correct": True, "reward": 0.9, "domain": "math", "source": "b"}
PROSE = {"prompt": "Hi?", "response": "Ho", "reward": 0.5, "domain": "instruction", "source": "a"}


@pytest.mark.parametrize(
    ("where", "answers"),
    [
        ({"verdict": "incorrect"}, {"3"}),
        ({"verdict": ["correct", "incorrect"]}, {"3", "1"}),
        ({"verdict": "unknown"}, {"Ho"}),
        ({"reward": {"min": 0.5}}, {"1", "Ho"}),
        ({"reward": {"min": 0.2, "max": 0.5}}, {"Ho"}),
        ({"source": "a", "domain": ["math", "code"]}, {"3"}),
        ({"index": [7, "0"]}, {"3", "1", "Ho"}),
    ],
)
@pytest.mark.parametrize("form", ["folder", "jsonl"])
def test_conditions_choose_the_answers_that_are_captured(model, tmp_path, where, answers, form):
    rows = [{"prompt_id": str(number), "index": 0, **row} for number, row in enumerate((WRONG, RIGHT, PROSE))]
    texts = folder_of(tmp_path / "rows", rows) if form == "folder" else write_rows(tmp_path / "rows.jsonl", rows)
    config = capture_config(model, texts, tmp_path / "store", where=where)
    from fusion_plugins.inputs import open_texts

    assert {text.content[-1]["content"] for text in open_texts(config.texts, selection=config.selection)} == answers


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ({"domian": "math"}, ConfigError, "expected columns of .*domain.*got domian"),
        ({"domain": "poetry"}, DataError, "expected some rows with domain: poetry, got none"),
    ],
)
def test_conditions_that_no_row_can_meet_are_an_error(model, tmp_path, where, error, message):
    texts = write_rows(tmp_path / "rows.jsonl", [{"prompt_id": "p", **WRONG}])
    with pytest.raises(error, match=message):
        capture_texts(capture_config(model, texts, tmp_path / "store", where=where))


@pytest.mark.parametrize(
    "where", [{"verdict": "wrong"}, {"reward": {"least": 1}}, {"domain": []}, {"reward": {"min": "x"}}]
)
def test_conditions_of_another_form_are_refused(model, tmp_path, where):
    with pytest.raises(ValueError, match="expected"):
        capture_config(model, "x.jsonl", tmp_path, where=where)


def test_a_store_of_some_answers_is_not_added_to_with_others(model, tmp_path):
    texts = write_rows(tmp_path / "rows.jsonl", [{"prompt_id": "p", **WRONG}, {"prompt_id": "q", **RIGHT}])
    capture_texts(capture_config(model, texts, tmp_path / "store", where={"verdict": "incorrect"}))
    assert open_store(tmp_path / "store").manifest.provenance["where"] == {"verdict": "incorrect"}
    with pytest.raises(MismatchError, match="texts_fingerprint"):
        capture_texts(capture_config(model, texts, tmp_path / "store", where={"verdict": "correct"}))


# What a source reads and the target does not

EXAMPLES = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
CONTEXTS = [
    {"system": "You know that it is {{ reference }}."},
    {"examples": EXAMPLES},
    {"question": "Solution: {{reference}} \\frac{1}{2}\n{{ question }}"},
    {"system": "", "examples": EXAMPLES, "question": "{{ question }} ({{ page }})"},
]


@pytest.mark.parametrize("context", CONTEXTS)
def test_stored_distributions_are_those_of_the_model_with_the_context(model, tmp_path, context):
    from transformers import AutoTokenizer

    rows = [
        {
            "id": f"c{number}",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"{number} + 1?"},
                {"role": "assistant", "content": f"It is {number + 1}, of course."},
            ],
            "reference": f"{number + 1}",
            "page": {"title": "sums"},
        }
        for number in range(3)
    ]
    texts = write_rows(tmp_path / "texts.jsonl", rows)
    capture_texts(capture_config(model, texts, tmp_path / "store", context=context, top_k="all"))
    store = open_store(tmp_path / "store")
    assert store.manifest.provenance["context"] == context
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row in rows:
        system, user, answer = row["messages"]
        if "system" in context:
            system = {"role": "system", "content": context["system"].replace("{{ reference }}", row["reference"])}
        content = context.get("question", "{{ question }}").replace("{{ question }}", user["content"])
        content = content.replace("{{reference}}", row["reference"]).replace("{{ page }}", json.dumps(row["page"]))
        chat = [system] * bool(system["content"]) + context.get("examples", []) + [{**user, "content": content}, answer]
        ids = np.array(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False))
        record = store[row["id"]]
        assert record.text.input_ids.tolist() == ids.tolist()
        # The answer alone is common text: no example is, though it is the assistant's.
        assert spelled(store, row["id"])[0] == ["", answer["content"], ""]
        expected = source_checks.reference_logprobs(model, ids)
        places = np.flatnonzero((record.topk.ids >= 0).any(axis=-1))
        assert places.size >= 5
        found = np.full((len(places), expected.shape[1]), -np.inf)
        np.put_along_axis(found, record.topk.ids[places].astype(np.int64), record.topk.logprobs[places], axis=-1)
        np.testing.assert_allclose(found, expected[places], rtol=3e-3, atol=2e-3)


def test_columns_that_the_responses_keep_are_there_for_conditions_and_contexts(model, tmp_path):
    rows = [{"id": f"p{n}", "text": f"{n}?", "language": "de" if n else "fr", "page": {"n": n}} for n in range(3)]
    prompts = write_rows(tmp_path / "prompts.jsonl", [*rows, {"id": "bare", "text": "?"}])
    source = {"name": "a", "model": str(model), "max_tokens": 4}
    settings = {"n": 1, "sources": [source], "keep_columns": ["language", "page"]}
    sample_prompts(sample_config({}, prompts, tmp_path / "out", **settings))
    kept = {row["prompt_id"]: (row["language"], row["page"]) for row in open_rows(tmp_path / "out")}
    assert kept == {"p0": ("fr", {"n": 0}), "p1": ("de", {"n": 1}), "p2": ("de", {"n": 2}), "bare": (None, None)}
    capture = {"where": {"language": "de"}, "context": {"question": "{{ page }} {{ question }}"}}
    capture_texts(capture_config(model, tmp_path / "out", tmp_path / "store", **capture))
    store = open_store(tmp_path / "store")
    raw = {b"".join(store.table.tokens[token] for token in record.text.input_ids) for record in store}
    assert {one.split(b"user\n")[1].split(b"<|im_end|>")[0] for one in raw} == {b'{"n": 1} 1?', b'{"n": 2} 2?'}
    # Other values, and columns that nothing has, are told before a model is loaded.
    write_rows(prompts, [row | {"language": "en"} for row in rows])
    with pytest.raises(MismatchError, match="prompts_fingerprint"):
        sample_prompts(sample_config({}, prompts, tmp_path / "out", **settings))
    with pytest.raises(ConfigError, match="keep_columns: expected columns of .*got langauge, which no row has"):
        sample_prompts(sample_config({}, prompts, tmp_path / "new", **settings | {"keep_columns": ["langauge"]}))
    with pytest.raises(ValueError, match="got reward, which a response has anyway"):
        sample_config({}, prompts, tmp_path / "new", **settings | {"keep_columns": ["reward"]})


def test_another_context_or_other_values_of_its_columns_are_another_store(model, tmp_path):
    row = {"id": "a", "messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "One."}]}
    texts, context = tmp_path / "texts.jsonl", {"question": "{{ question }} {{ reference }}"}
    write_rows(texts, [row | {"reference": "1"}])
    capture_texts(capture_config(model, texts, tmp_path / "store", context=context))
    for changed in (None, {"system": "x"}):
        with pytest.raises(MismatchError, match="template_hash"):
            capture_texts(capture_config(model, texts, tmp_path / "store", context=changed))
    write_rows(texts, [row | {"reference": "2"}])
    with pytest.raises(MismatchError, match="texts_fingerprint"):
        capture_texts(capture_config(model, texts, tmp_path / "store", context=context))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "plain"}, "expected a chat, got a plain text"),
        ({"messages": tiny.CHAT}, "expected a value in column 'reference'"),
        ({"messages": tiny.CHAT[1:2], "reference": "1"}, "expected a message of the user"),
    ],
)
def test_rows_without_what_the_context_needs_are_refused_or_left_out(model, tmp_path, row, message):
    good = {"id": "good", "messages": tiny.CHAT, "reference": "42"}
    texts = write_rows(tmp_path / "texts.jsonl", [good, {"id": "bad", **row}])
    context = {"question": "{{ question }} {{ reference }}"}
    with pytest.raises(DataError, match=rf"texts\.jsonl:2: .*{message}"):
        capture_texts(capture_config(model, texts, tmp_path / "store", context=context))
    report = capture_texts(capture_config(model, texts, tmp_path / "store", context=context, on_unusable="skip"))
    assert (report.captured, list(report.skipped)) == (1, ["bad"])


@pytest.mark.parametrize(
    "context", [{}, {"question": "no question"}, {"examples": [{"role": "user"}]}, {"sytem": "x"}, {"examples": "x"}]
)
def test_a_context_that_says_nothing_or_something_else_is_refused(context, tmp_path):
    with pytest.raises(ValueError, match="context"):
        capture_config("m", "x.jsonl", tmp_path, context=context)


def test_a_model_that_has_got_a_pad_token_since_reads_its_own_answers_in_the_tokens_that_it_drew():
    tokenizer = tiny.byte_level()
    before = TokenTable.from_tokenizer(tokenizer)
    tokenizer = copy.deepcopy(tokenizer)  # all tests share it
    tokenizer.add_special_tokens({"pad_token": "<|a new pad|>"})
    table = TokenTable.from_tokenizer(tokenizer)
    assert table.fingerprint != before.fingerprint
    letters = [table.tokens.index(bytes([byte])) for byte in b"the apples"]
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "the apples"}]
    chat = generated_spans(chat_renderer(tokenizer), messages)
    answer = SampledAnswer(False, tuple(letters), before.fingerprint, "m", len(letters))
    for own, how in ((True, "sampled"), (False, "foreign")):
        tokens, _, found = tokenize_answer(tokenizer, table, chat, answer, own=own)
        assert found == how
        assert (tokens.input_ids[-len(letters) :].tolist() == letters) is own


@pytest.mark.parametrize("ids", ["[5, 6]", [5, "6"], [5, None], [5, -1], [5.0], 5])
def test_token_ids_that_are_none_are_refused_with_their_row(tmp_path, ids):
    row = {"prompt_id": "p", "source": "a", "prompt": "12 + 30?", "response": "42", "token_ids": ids}
    with pytest.raises(DataError, match=r"answers.jsonl:1: .*token_ids as a list of ids"):
        list(read_texts(write_rows(tmp_path / "answers.jsonl", [row])))
