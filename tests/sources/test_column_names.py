"""`columns`: files whose texts and chats stand under other names, as axolotl's dataset entries name them."""

import doctest
import json

import pytest
import tiny
from source_checks import capture_config, sample_config, write_rows
from store_contents import content

from fusion_plugins import column_names
from fusion_plugins.column_names import ColumnNames, PromptColumns
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.inputs import Selection, open_prompts, open_texts
from fusion_plugins.scoring.clean import CleanConfig, clean
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.sources.cut import CutConfig, cut_texts
from fusion_plugins.sources.sample import sample_prompts
from fusion_plugins.store import open_rows, open_store

CHATS = [
    [{"role": "system", "content": "Be short."}, *tiny.CHAT[:1], {"role": "assistant", "content": f"{number}!"}]
    for number in range(3)
]
NAMES = {"user": "human", "assistant": "bot"}
KEYS = {
    "field_messages": "conversations",
    "message_property_mappings": {"role": "from", "content": "value"},
    "roles": {"user": ["human"], "assistant": ["bot"]},
}


def other_names(chat):
    return [{"from": NAMES.get(turn["role"], turn["role"]), "value": turn["content"]} for turn in chat]


def test_the_example_runs():
    assert doctest.testmod(column_names).failed == 0


def test_chats_under_other_names_fill_the_same_store(model, tmp_path):
    usual = write_rows(tmp_path / "usual.jsonl", [{"messages": chat, "domain": "talk"} for chat in CHATS])
    # A column of the usual name means something else here.
    rows = [{"conversations": other_names(chat), "domain": "talk", "text": "of another tool"} for chat in CHATS]
    rows[1]["conversations"] = json.dumps(rows[1]["conversations"])
    others = write_rows(tmp_path / "others.jsonl", rows)
    capture_texts(capture_config(model, usual, tmp_path / "usual"))
    with pytest.raises(DataError, match="columns: {field: ..., field_messages: ...}"):
        capture_texts(capture_config(model, others, tmp_path / "none", columns={"field": "plain"}))
    given = {"columns": KEYS | {"field": "plain"}}
    capture_texts(capture_config(model, others, tmp_path / "others", where={"domain": "talk"}, **given))
    ours, theirs = open_store(tmp_path / "others"), open_store(tmp_path / "usual")
    assert list(ours.ids()) == list(theirs.ids())
    assert ours.manifest.texts_fingerprint == theirs.manifest.texts_fingerprint
    assert content(tmp_path / "others") == content(tmp_path / "usual")
    assert ours.manifest.provenance["columns"] == given["columns"]
    # A later run of the same texts under the usual names finds all of it there.
    report = capture_texts(capture_config(model, usual, tmp_path / "others"))
    assert (report.present, report.captured) == (3, 0)


def test_the_training_reads_what_was_captured_with_the_same_keys(model, tmp_path):
    rows = [{"conversations": other_names(chat)} for chat in CHATS]
    capture_texts(capture_config(model, write_rows(tmp_path / "t.jsonl", rows), tmp_path / "store", columns=KEYS))
    chat_rows = pytest.importorskip("fusion_plugins.axolotl.chat_rows")
    reader = chat_rows.RowReader.of({"path": "t.jsonl", **KEYS})
    found = [reader.content(row) for row in rows]
    assert [content.id for content in found] == list(open_store(tmp_path / "store").ids())
    assert [content.messages for content in found] == CHATS


def test_roles_of_other_tools_are_known_without_a_word(model, tmp_path):
    roles = {"user": "human", "assistant": "gpt"}
    chats = [[turn | {"role": roles.get(turn["role"], turn["role"])} for turn in chat] for chat in CHATS]
    for name, messages in (("usual", CHATS), ("others", chats)):
        rows = [{"messages": chat} for chat in messages]
        capture_texts(capture_config(model, write_rows(tmp_path / f"{name}.jsonl", rows), tmp_path / name))
    assert content(tmp_path / "others") == content(tmp_path / "usual")


def test_prompts_and_texts_to_cut_under_other_names_are_read(model, tmp_path, capfd):
    rows = [
        # The level is a column of another name, and the id one that means something else.
        {"question": f"What is {n} + 30?", "answer": n + 30, "uid": f"q{n}", "subject": "math", "level": n, "id": "all"}
        for n in range(3)
    ]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    with pytest.raises(DataError, match="got answer, id, level, question, .* `columns: "):
        sample_prompts(sample_config({"a": model}, prompts, tmp_path / "none"))
    names = {"field": "question", "reference": "answer", "id": "uid", "domain": "subject"}
    sample_prompts(sample_config({"a": model}, prompts, tmp_path / "out", n=1, columns=names))
    said = capfd.readouterr().err
    assert "columns that are not read: level" in said
    answered = list(open_rows(tmp_path / "out"))
    assert [row["prompt"] for row in answered] == [row["question"] for row in rows]
    assert [row["reference"] for row in answered] == ["30", "31", "32"]
    assert [row["prompt_id"] for row in answered] == ["q0", "q1", "q2"]
    assert {row["domain"] for row in answered} == {"math"}
    texts = write_rows(tmp_path / "texts.jsonl", [{"question": row["question"]} for row in rows])
    config = {"texts": str(texts), "tokenizers": [str(model)], "max_length": 64, "columns": {"field": "question"}}
    assert cut_texts(CutConfig(**config, out=str(tmp_path / "cut.jsonl"))).texts == 3


def test_the_name_of_a_column_that_no_row_has_is_refused(model, tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"text": "1 + 30?", "answer": 31}])
    with pytest.raises(ConfigError, match=r"prompts.jsonl, got reference: anser, which no row has"):
        sample_prompts(sample_config({"a": model}, prompts, tmp_path / "out", columns={"reference": "anser"}))
    with pytest.raises(ConfigError, match=r"got field_tools: functions, which no row has"):
        capture_texts(capture_config(model, prompts, tmp_path / "store", columns={"field_tools": "functions"}))


def test_prompts_under_other_names_are_cleaned_and_keep_the_names_of_the_file(tmp_path):
    rows = [{"turns": [{"from": "human", "value": word}], "answer": 1} for word in ("One?", "One?", "Two?")]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    names = {"field_messages": "turns", "message_property_mappings": {"role": "from", "content": "value"}}
    report = clean(CleanConfig(prompts=str(path), out=str(tmp_path / "clean"), columns=names))
    assert (report.read, report.kept) == (3, 2)
    assert [json.loads(line) for line in report.out.read_text().splitlines()] == [rows[0], rows[2]]


def test_the_column_in_the_name_of_a_dataset_wins(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    rows = [{"conversations": other_names(chat), "level": 1, "answer": "x"} for chat in CHATS]
    write_rows(tmp_path / "set" / "train.jsonl", rows)
    name = f"hf:{tmp_path}/set:train:conversations"
    texts = open_texts(name, selection=Selection(names=ColumnNames.of(KEYS)))
    assert [text.content for text in texts] == CHATS
    rows = [{"question": f"{n} + 1?", "level": 1, "answer": "x"} for n in range(3)]
    write_rows(tmp_path / "set" / "train.jsonl", rows)
    name = f"hf:{tmp_path}/set:train:question"
    prompts = open_prompts(name, names=PromptColumns(field="question"))
    assert [prompt.text.content for prompt in prompts] == [row["question"] for row in rows]
    # A dataset of the hub reads fewer columns; what it leaves unread is known all the same.
    assert prompts.unread == ("answer", "level")
    assert [prompt.reference for prompt in open_prompts(name, names=PromptColumns(reference="answer"))] == ["x"] * 3


def test_a_message_without_a_role_and_an_unknown_key_are_errors(model, tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"conversations": [{"value": "Hi"}]}])
    with pytest.raises(DataError, match="t.jsonl:1: expected messages with a role"):
        capture_texts(capture_config(model, path, tmp_path / "store", columns=KEYS))
    from fusion_plugins.config import validate

    with pytest.raises(ConfigError, match="field_message"):
        validate(ColumnNames, {"field_message": "conversations"}, where="columns")
