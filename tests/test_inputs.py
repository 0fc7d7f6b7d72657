"""Texts, prompts and rows of JSONL and Parquet files."""

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusion_plugins import text_index
from fusion_plugins.core.preferences.candidates import answer_id, as_candidate
from fusion_plugins.core.text.content_id import content_id, texts_fingerprint
from fusion_plugins.errors import DataError
from fusion_plugins.inputs import open_prompts, open_texts, read_prompts, read_texts
from fusion_plugins.row_files import read_row_file
from fusion_plugins.store import RowManifest, RowWriter
from fusion_plugins.texts import prompt_digest

ROWS = [{"id": "a", "text": "eins"}, {"id": "b", "text": "zwei\n"}]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def fingerprint(texts):
    return texts_fingerprint((text.id, text.content_id) for text in texts)


def prompts_fingerprint(prompts):
    return texts_fingerprint((prompt.text.id, prompt_digest(prompt)) for prompt in prompts)


def test_parquet_and_jsonl_give_the_same_ids_and_fingerprint(tmp_path):
    rows = [{"text": "eins"}, {"text": "Straße 数学"}]
    lines = write(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    left, right = read_texts(lines), read_texts(tmp_path / "b.parquet")
    assert left == right
    assert fingerprint(left) == fingerprint(list(reversed(right)))


def test_a_chat_has_the_same_id_when_a_parquet_file_fills_its_keys_with_nulls(tmp_path):
    named = [{"role": "user", "content": "x", "name": "Ann"}, {"role": "assistant", "content": "y"}]
    lines = write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": named}])
    pq.write_table(pa.Table.from_pylist([{"messages": CHAT}, {"messages": named}]), tmp_path / "b.parquet")
    assert read_texts(lines) == read_texts(tmp_path / "b.parquet")


def test_the_fingerprint_changes_with_a_text_and_with_an_id(tmp_path):
    marks = {
        fingerprint(read_texts(write(tmp_path / f"{number}.jsonl", rows)))
        for number, rows in enumerate([ROWS, [ROWS[0], {"id": "b", "text": "zwei"}], [ROWS[0], {**ROWS[1], "id": "c"}]])
    }
    assert len(marks) == 3


def test_a_folder_is_read_in_the_order_of_its_names_and_limit_stops_early(tmp_path):
    write(tmp_path / "2.jsonl", ROWS[1:])
    write(tmp_path / "1.jsonl", ROWS[:1])
    assert [text.id for text in read_texts(tmp_path)] == ["a", "b"]
    assert [text.id for text in read_texts(tmp_path, limit=1)] == ["a"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], ROWS[0]], r"2: expected an id that no other row has, got 'a', which is also the id of .*:1"),
        ([{"id": "a"}], "expected either a column 'text' or a column 'messages', got id"),
        ([{"text": "a", "messages": CHAT}], "expected either a column 'text' or a column 'messages'"),
        ([{"id": "a", "text": None, "messages": None}], r"text \(null\). Drop the row, .* `on_unusable: skip`"),
        ([{"text": ""}], "a string that is not empty"),
        ([{"text": 5}], "a string that is not empty"),
        ([{"messages": []}], "a list of messages that is not empty"),
        ([{"messages": [{"role": "robot", "content": "x"}]}], "a role out of"),
        ([{"messages": [{"role": "user", "content": None}]}], "text as a message's content"),
        (["text"], "expected a JSON object, got str"),
    ],
)
def test_a_broken_row_is_refused_with_its_place(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_texts(write(tmp_path / "x.jsonl", rows))


def test_what_is_no_json_and_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": \n')
    with pytest.raises(DataError, match=r"x\.jsonl:1: expected one JSON object per line"):
        read_texts(tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl").write_text('{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match="lone surrogate"):
        read_texts(tmp_path / "y.jsonl")
    (tmp_path / "i.jsonl").write_text('{"id": "a\\ud800", "text": "a"}\n')
    with pytest.raises(DataError, match=r"i\.jsonl:1: expected an id that UTF-8 can encode"):
        read_texts(tmp_path / "i.jsonl")
    (tmp_path / "u.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"u\.jsonl:2: expected one JSON object per line, in UTF-8"):
        read_texts(tmp_path / "u.jsonl")
    (tmp_path / "z.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="expected a Parquet file, got other bytes"):
        read_texts(tmp_path / "z.parquet")
    with pytest.raises(DataError, match="or a folder of them, got none"):
        read_texts(tmp_path / "missing.jsonl")


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": "x", "text": "a", "domain": "d\\ud83d"}',
        b'{"id": "x", "text": "a", "reference": "\\udc00"}',
        b'{"id": "x", "text": "a", "tests": ["\\ud83d"]}',
        b'{"id": "x", "text": "a\\ud83d"}',
        b'{"id": "x\\ud83d", "text": "a"}',
        b'{"id": "x", "text": "\xff"}',
        b'{"id": "x", "text": ""}',
        b'{"id": "x", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        f'{{"id": "x", "text": "a", "tests": {nested(100_000)}}}'.encode(),
        f'{{"id": "x", "messages": {nested(100_000)}}}'.encode(),
        f'{{"id": "x", "messages": {nested(900)}}}'.encode(),
        b'{"id": "x", "text": "a", "n": ' + b"9" * 5000 + b"}",
        b'{"id": "good", "text": "another"}',
        b"[1]",
        b'{"id": "x"',
    ],
)
def test_one_bad_row_is_an_error_of_ours_or_left_out_and_the_others_are_read(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"id": "good", "text": "a"}\n' + line + b'\n{"id": "last", "text": "b"}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:2: ") as refusal:
        read_prompts(path)
    str(refusal.value).encode()
    unusable = {}
    assert [prompt.text.id for prompt in read_prompts(path, unusable=unusable)] == ["good", "last"]
    ((name, reason),) = unusable.items()
    assert f"{path}:2: " in reason
    assert name.startswith("x") or name == f"{path}:2"


def test_values_that_are_no_number_are_none_and_large_ids_stay_as_they_are(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"id": NaN, "text": "a", "reference": NaN, "domain": NaN}\n'
        f'{{"id": {2**70}, "text": "b", "reference": 4}}\n{{"id": "2024-01-01", "text": "c"}}\n'
    )
    first, second, third = read_prompts(path)
    assert (first.text.id, first.reference, first.domain) == (first.text.content_id, None, "instruction")
    assert (second.text.id, second.reference, third.text.id) == (str(2**70), "4", "2024-01-01")


def test_columns_that_are_not_used_are_not_read(tmp_path):
    """Bytes that are no UTF-8 in a column of strings, a time in the year 294247, and nanoseconds that Python lacks."""
    bad = pa.array([b"\xff", b"ok"], pa.binary()).view(pa.string())
    late = pa.array([2**63 - 1, 0], pa.timestamp("us"))
    texts = pa.array(["eins", "zwei"])
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "text": texts, "note": bad, "at": late}), path)
    assert [text.id for text in read_texts(path)] == ["a", "b"]
    for name, column in (("text", bad), ("id", late), ("id", bad), ("reference", late), ("tests", late.cast("int64"))):
        used = {"id": ["a", "b"], "text": texts} | {name: column}
        pq.write_table(pa.table(used), path)
        if name == "tests":
            assert [prompt.tests for prompt in read_prompts(path)] == [2**63 - 1, 0]
            continue
        with pytest.raises(DataError, match=r"x\.parquet:1: "):
            read_prompts(path)
        unusable = {}
        assert len(read_prompts(path, unusable=unusable)) == len(unusable) == 1
    pq.write_table(pa.table({"note": ["a"]}), path)
    with pytest.raises(DataError, match="expected some of the columns text, messages, .* got note"):
        read_texts(path)


def test_prompts_have_a_domain_a_reference_and_tests(tmp_path):
    rows = [
        {"id": "1", "text": "2+2", "domain": "math", "reference": 4},
        {"id": "2", "messages": CHAT[:1], "domain": "code", "tests": ["assert f() == 1"]},
        {"id": "3", "text": "hello"},
    ]
    first, second, third = read_prompts(write(tmp_path / "p.jsonl", rows))
    assert (first.domain, first.reference, first.tests) == ("math", "4", None)
    assert (second.domain, second.tests) == ("code", ["assert f() == 1"])
    assert third.domain == "instruction"


def test_a_prompt_that_ends_with_an_answer_is_refused(tmp_path):
    with pytest.raises(DataError, match="Drop the last message"):
        read_prompts(write(tmp_path / "p.jsonl", [{"messages": CHAT}]))


@pytest.mark.parametrize("gold", [["18", "19"], ["18"], {"answer": 18}])
def test_a_gold_answer_that_is_no_text_and_no_number_is_refused(tmp_path, gold):
    row = {"id": "p", "text": "What is 6 * 3?", "domain": "math", "reference": gold}
    with pytest.raises(
        DataError, match=r"p\.jsonl:1: expected a text or a number as the gold answer in 'reference', got"
    ):
        read_prompts(write(tmp_path / "p.jsonl", [row]))


def test_a_prompt_may_end_with_the_empty_result_of_a_tool(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    chat = [*CHAT[:1], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": ""}]
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", [{"messages": chat}]))
    assert prompt.text.content[-1]["role"] == "tool"


def test_messages_that_are_nested_too_deeply_are_left_out(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"id": "deep", "messages": "[" * 100_000}, {"id": "some", "text": "Hi"}])
    unusable = {}
    assert [text.id for text in open_texts(path, unusable=unusable)] == ["some"]
    assert [*unusable] == ["deep"]


@pytest.mark.parametrize("content", [{"text": " \n"}, {"messages": [{"role": "user", "content": ""}]}])
def test_a_prompt_that_asks_nothing_is_refused_or_left_out(tmp_path, content):
    path = write(tmp_path / "p.jsonl", [{"id": "none", **content}, {"id": "some", "text": "Hi"}])
    with pytest.raises(DataError, match=r"p\.jsonl:1: expected a prompt that asks something"):
        read_prompts(path)
    assert [prompt.text.id for prompt in read_prompts(path, unusable={})] == ["some"]


def test_the_fingerprint_of_prompts_covers_what_responses_are_scored_by_and_not_their_order(tmp_path):
    row = {"id": "1", "text": "2+2", "domain": "math", "reference": "4"}
    other = {"id": "2", "text": "3+3"}
    variants = [[row], [row | {"reference": "5"}], [row | {"domain": "code"}], [row | {"tests": ["assert True"]}]]
    marks = [prompts_fingerprint(read_prompts(write(tmp_path / "p.jsonl", rows))) for rows in variants]
    assert len(set(marks)) == 4
    # Folders of responses of earlier versions hold this one.
    assert marks[0] == "6971c87163bd327adcd40e38d28d0056ec387f7ccc1d147ff87f8d3562628fab"
    orders = [read_prompts(write(tmp_path / "p.jsonl", rows)) for rows in ([row, other], [other, row])]
    assert prompts_fingerprint(orders[0]) == prompts_fingerprint(orders[1])


def test_rows_of_a_file_come_with_their_places_and_empty_lines_and_a_byte_order_mark_do_no_harm(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\n')
    assert list(read_row_file(tmp_path / "x.jsonl")) == [
        (f"{tmp_path / 'x.jsonl'}:1", {"a": 1}),
        (f"{tmp_path / 'x.jsonl'}:3", {"a": 2}),
    ]
    pq.write_table(pa.Table.from_pylist([{"a": 1}, {"a": 2}]), tmp_path / "x.parquet")
    assert list(read_row_file(str(tmp_path / "x.parquet"))) == [
        (f"{tmp_path / 'x.parquet'}:1", {"a": 1}),
        (f"{tmp_path / 'x.parquet'}:2", {"a": 2}),
    ]
    with pytest.raises(DataError, match=r"x\.csv: expected a \.jsonl or \.parquet file, got "):
        list(read_row_file(tmp_path / "x.csv"))


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"left": 1}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
]


def test_chats_with_calls_reasoning_and_tools_have_the_same_id_in_every_form(tmp_path):
    """Parquet fills messages, calls and schemas with nulls; datasets give lists as JSON."""
    calls = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    other = {"id": "2", "type": "function", "function": {"name": "cut", "arguments": {"text": "x"}}}
    rows = [
        {"messages": calls, "tools": TOOLS},
        {"messages": [*calls[:1], {**calls[1], "tool_calls": [other]}], "tools": None},
    ]
    lines = write(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    as_json = write(
        tmp_path / "c.jsonl",
        [{"messages": json.dumps(row["messages"]), "tools": json.dumps(row["tools"])} for row in rows],
    )
    texts = read_texts(lines)
    assert texts == read_texts(tmp_path / "b.parquet") == read_texts(as_json)
    assert [text.tools for text in texts] == [TOOLS, None]
    assert texts[0].content[1]["tool_calls"] == [CALL]
    assert texts[0].where.endswith("a.jsonl:1")
    without = read_texts(write(tmp_path / "d.jsonl", [{"messages": calls}]))
    assert without[0].content_id != texts[0].content_id


def test_contents_in_parts_and_results_that_are_no_text_become_texts(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": {"degrees": 18}},
    ]
    (text,) = read_texts(write(tmp_path / "a.jsonl", [{"messages": chat}]))
    assert [message["content"] for message in text.content] == ["ab", "c", '{"degrees": 18}']


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "assistant", "content": None}]}, "tool_calls or reasoning beside it"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "expected text as a message's content"),
        ({"messages": "x"}, "a list or its JSON"),
        ({"messages": CHAT, "tools": "x"}, "x.jsonl:1: expected tools as JSON"),
        ({"messages": CHAT, "tools": [1]}, "expected tools as a list of schemas"),
        ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "x.jsonl:1: expected tool_calls as JSON"),
    ],
)
def test_chats_of_another_form_are_refused_with_the_row(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_texts(write(tmp_path / "x.jsonl", [row]))


# Responses as texts


def response(prompt_id, source, text, **more):
    return {"prompt_id": prompt_id, "source": source, "index": 0, "prompt": f"{prompt_id}?", "response": text} | more


def chat(prompt_id, text):
    return [{"role": "user", "content": f"{prompt_id}?"}, {"role": "assistant", "content": text}]


def test_responses_are_texts_that_are_named_by_their_content(tmp_path):
    rows = [response("p", "a", "one"), response("p", "b", "two", reward=0.5), response("q", "a", "one")]
    texts = read_texts(write(tmp_path / "scored.jsonl", rows))
    assert [text.content for text in texts] == [chat("p", "one"), chat("p", "two"), chat("q", "one")]
    for row, text in zip(rows, texts, strict=True):
        assert text.id == text.content_id == answer_id(as_candidate(row, 0)) == content_id(text.content)
    assert texts[1].where.endswith("scored.jsonl:2")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_reasoning_of_responses_is_part_of_the_text_whatever_its_column_is_called(tmp_path, name, ending):
    row = response("p", "a", "five", **{name: "hm"})
    file = tmp_path / f"scored.{ending}"
    if ending == "jsonl":
        write(file, [row])
    else:
        pq.write_table(pa.Table.from_pylist([row]), file)
    [text] = read_texts(file)
    assert text.content[-1]["reasoning_content"] == "hm"
    assert text.id == answer_id(as_candidate(row, 0))


def test_equal_answers_are_one_text_and_empty_ones_none(tmp_path):
    rows = [response("p", "a", "one"), response("p", "b", "one"), response("p", "c", " \n"), response("p", "d", "two")]
    texts = read_texts(write(tmp_path / "scored.jsonl", rows))
    assert [text.content[-1]["content"] for text in texts] == ["one", "two"]


@pytest.mark.parametrize("form", ["folder", "jsonl", "parquet"])
def test_responses_have_the_same_ids_in_every_form(tmp_path, form):
    rows = [
        response("p", "a", "one", tool_calls=None, reasoning_content=None, tools=None),
        response("q", "a", "", tool_calls=[{"function": {"name": "f", "arguments": {"a": 1}}}]),
        response("r", "a", "five", reasoning_content="hm", prompt=[{"role": "user", "content": "2 + 3?"}]),
        response(
            "s", "a", "5", tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
        ),
    ]
    if form == "folder":
        columns = dict.fromkeys(("prompt_id", "source", "response", "reasoning_content"), "string") | {"index": "int64"}
        columns |= dict.fromkeys(("prompt", "tool_calls", "tools"), "json")
        manifest = RowManifest(stage="scored", columns=columns, key=("prompt_id", "source", "index"))
        with RowWriter(tmp_path / "scored", manifest) as writer:
            for row in rows:
                writer.write(row)
            writer.finish()
        texts = read_texts([tmp_path / "scored"])
    elif form == "jsonl":
        texts = read_texts(write(tmp_path / "scored.jsonl", rows))
    else:
        rows = [row for row in rows if isinstance(row["prompt"], str)]  # a column of one type
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "scored.parquet")
        texts = read_texts(tmp_path / "scored.parquet")
    assert [text.id for text in texts] == [answer_id(as_candidate(row, 0)) for row in rows]


def test_a_response_that_cannot_be_used_is_an_error_or_left_out(tmp_path):
    rows = [response("p", "a", "one"), response("p", None, "two"), response("q", "a", "\ud83d"), response("q", "a", 5)]
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"scored.jsonl:2: .*expected a value for source"):
        read_texts(path)
    unusable = {}
    assert len(read_texts(path, unusable=unusable)) == 1
    assert [name.rpartition(":")[2] for name in unusable] == ["2", "3", "4"]


def test_texts_keep_other_columns_that_are_called_like_those_of_a_response(tmp_path):
    rows = [{"text": "eins", "prompt": "p", "response": "r"}, {"messages": CHAT, "response": "r"}]
    assert [text.content for text in read_texts(write(tmp_path / "a.jsonl", rows))] == ["eins", CHAT]


def sets_of(path):
    """A set of texts by both readers: what they make of it, and what they leave out."""
    found = []
    for read in (open_texts, lambda path, unusable: read_texts(path, unusable=unusable)):
        unusable = {}
        texts = read(path, unusable=unusable)
        found.append((list(texts), unusable))
    return found


MIXED = [
    [{"id": "b", "text": "1"}, {"text": "2"}, {"id": "ä", "text": "3"}, {"id": "a", "messages": CHAT}, {"text": "x"}],
    [{"id": "b", "text": "1"}, {"id": "b", "text": "2"}, {"text": "3"}, {"text": "3"}, {"id": "c", "text": "4"}],
    [
        {"id": "b"},
        {"id": "b", "text": "1"},
        {"id": "b", "text": ""},
        {"id": "c", "text": "4"},
        {"id": "c", "text": "4"},
    ],
    [{"text": "2"}, {"id": content_id("2"), "text": "other"}, {"id": content_id("3"), "text": "9"}, {"text": "3"}],
    [{"id": f"t{number % 700}", "text": f"{number}"} for number in range(1000)],
    [{"id": "b", "text": ""}, {"id": "b"}, {"id": "b", "text": ""}, {"text": "1"}],
    [],
]


@pytest.mark.parametrize("rows", MIXED)
def test_a_set_that_is_read_anew_holds_what_a_list_holds_and_names_the_same_rows(tmp_path, rows):
    path = write(tmp_path / "x.jsonl", rows)
    (texts, left_out), (listed, also_left_out) = sets_of(path)
    assert texts == listed
    assert left_out == also_left_out
    assert len(texts) + len(left_out) == len(rows)
    found = open_texts(path, unusable={})
    assert found.fingerprint == texts_fingerprint((text.id, text.content_id) for text in listed)
    assert (len(found), found.n_bytes) == (len(listed), sum(text.n_bytes for text in listed))
    assert found.has_chats == any(not isinstance(text.content, str) for text in listed)
    assert list(found) == list(found)


@pytest.mark.parametrize("rows", MIXED[1:4])
def test_the_first_row_that_cannot_be_used_is_an_error_of_a_set_too(tmp_path, rows):
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=r"x\.jsonl:\d: expected") as refusal:
        open_texts(path)
    if all("text" in row and row["text"] for row in rows):
        with pytest.raises(DataError) as other:
            read_texts(path)
        assert str(refusal.value) == str(other.value)


def test_prompts_that_are_read_anew_have_the_fingerprint_of_a_list(tmp_path):
    rows = [{"id": "1", "text": "2+2", "domain": "math", "reference": 4}, {"text": "hello"}, {"id": "0", "text": "x"}]
    path = write(tmp_path / "p.jsonl", rows)
    assert open_prompts(path).fingerprint == prompts_fingerprint(read_prompts(path))
    assert list(open_prompts(path)) == read_prompts(path)


@pytest.mark.parametrize("change", ["longer", "other", "gone"])
def test_files_that_change_while_a_run_reads_them_are_an_error(tmp_path, change):
    path = write(tmp_path / "x.jsonl", [{"id": "a", "text": "1"}, {"id": "b", "text": "2"}])
    texts = open_texts(path)
    if change == "gone":
        path.unlink()
    else:
        write(path, [{"id": "a", "text": "1"}, {"id": "b", "text": "2" if change == "longer" else "3"}, {"text": "c"}])
    with pytest.raises(DataError, match=r"x\.jsonl: expected (the file as it was|a \.jsonl)"):
        list(texts)


@pytest.mark.parametrize("named", [True, False])
def test_a_set_takes_less_than_a_hundred_bytes_per_text(tmp_path, named, monkeypatch):
    monkeypatch.setattr(text_index, "SORTED_AT_ONCE", 500)

    def peak(count):
        rows = [{"text": f"{number}" * 50} | ({"id": f"text-{number}"} if named else {}) for number in range(count)]
        path = write(tmp_path / f"{count}.jsonl", rows)
        del rows
        tracemalloc.start()
        try:
            open_texts(path)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = 2000, 6000  # more than what is sorted at a time
    assert (peak(many) - peak(few)) / (many - few) < 100
