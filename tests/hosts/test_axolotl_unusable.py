"""Rows of a fused dataset that cannot be used: an error that names them, or left out by name and counted."""

import json

import axolotl_runs as runs
import numpy as np
import pytest
import tiny
from axolotl_runs import FUSED, config, prepare

from fusion_plugins.errors import DataError
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.sources.capture_config import CaptureConfig

#: refuses a system message, as Gemma's does; writes calls in a syntax of its own, and reasoning of the last turn
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "[{{ m.role }}] {% if m.reasoning_content and loop.last %}(hm) {{ m.reasoning_content }} (/hm) {% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}(call {{ call.function.name }}) "
    "{{ call.function.arguments | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
QUESTION = {"role": "user", "content": "How many apples are 12 and 30?"}
ANSWER = {"role": "assistant", "content": "42 apples, of course."}
THINKING = {"role": "assistant", "content": "<think>\n12 and 30 is 42\n</think>\n\n42 apples, of course."}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"left": 12, "right": 30}'}}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": '{"type": "object"}'}}


def chat(id, *messages, **more):
    return {"id": id, "messages": list(messages), "tools": None, **more}


ROWS = [
    chat("plain", QUESTION, ANSWER),
    chat("thinking", QUESTION, THINKING),
    chat("call", QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}, tools=json.dumps([ADD])),
    chat("system", {"role": "system", "content": "Be brief."}, QUESTION, ANSWER),
    chat("untrained", QUESTION, ANSWER | {"train": False}),
    chat("empty", QUESTION, {"role": "assistant", "content": ""}),
    {"id": "neither", "messages": None, "tools": None},
]


@pytest.fixture(scope="module")
def chats(material, tmp_path_factory):
    """A file of all rows, and a store of those that can be read, of a source with another template that takes all."""
    folder = tmp_path_factory.mktemp("chats")
    (folder / "source.jinja").write_text(
        TEMPLATE.replace("{{ raise_exception('System role not supported') }}", "").replace("(hm) ", "<think>")
    )
    (folder / "target.jinja").write_text(TEMPLATE)
    runs.write_rows(folder / "rows.jsonl", ROWS)
    runs.write_rows(folder / "readable.jsonl", ROWS[:-1])
    report = capture_texts(
        CaptureConfig(
            texts=str(folder / "readable.jsonl"),
            model=str(material.folder / "digits"),
            chat_template=str(folder / "source.jinja"),
            out=str(folder / "store"),
            top_k=16,
        )
    )
    assert report.captured == len(ROWS) - 1
    return folder


def settings(material, chats, run_folder, **changes):
    entry = {"path": str(chats / "rows.jsonl"), "type": FUSED, "message_field_training": "train"}
    block = {"sources": [{"name": "digits", "store": str(chats / "store")}], "on_unusable": "skip"}
    return config(
        material,
        run_folder,
        chat_template_jinja=str(chats / "target.jinja"),
        datasets=[entry | changes.pop("entry", {})],
        fusion=block | changes.pop("fusion", {}),
        curriculum_sampling=True,
        shuffle_merged_datasets=False,
        **changes,
    )


def test_unusable_rows_are_left_out_by_name_and_the_others_teach_what_the_assistant_generated(
    material, chats, run_folder
):
    _, rows = prepare(settings(material, chats, run_folder), run_folder)
    report = json.loads((run_folder / "model" / "fusion_report.json").read_text())
    (report,) = report.values() if "unusable" not in report else [report]
    left_out = {entry["row"].split("id ")[1]: entry for entry in report["unusable"]}
    assert list(left_out) == ["'neither'", "'system'", "'untrained'"]
    path = chats / "rows.jsonl"
    assert left_out["'system'"]["row"] == f"{path}: row 4, id 'system'"
    assert "System role not supported" in left_out["'system'"]["reason"]
    assert "expected at least one supervised token" in left_out["'untrained'"]["reason"]
    assert "expected a row with a text" in left_out["'neither'"]["reason"]
    assert (len(rows), report["texts"]) == (4, 4)
    tokenizer = tiny.sentencepiece_bpe()
    texts = [tokenizer.decode([label for label in row["labels"] if label >= 0]).strip() for row in rows]
    assert texts == [
        "42 apples, of course.</s>",
        "(hm) 12 and 30 is 42 (/hm) 42 apples, of course.</s>",
        '(call add) {"left": 12, "right": 30}</s>',
        "</s>",
    ]
    # The tags of reasoning are other ones in the source's template.
    assert report["sources"]["digits"]["left_out"] > 0
    for row in rows:
        supervised = np.append(np.array(row["labels"])[1:] >= 0, False)
        fused = np.array(row["fused_ids"]).reshape(len(supervised), -1)[:, 0] >= 0
        assert not (fused & ~supervised).any()
        assert fused.sum() > 0.5 * supervised.sum()


def test_an_unusable_row_is_an_error_that_names_it(material, chats, run_folder):
    with pytest.raises(DataError, match=r"rows\.jsonl: row 7, id 'neither': expected a row with a text"):
        prepare(settings(material, chats, run_folder, fusion={"on_unusable": "raise"}), run_folder)


def test_a_dataset_without_a_supervised_token_is_an_error_whatever_the_setting(material, chats, run_folder):
    with pytest.raises(DataError, match=r"7 of 7 rows cannot be used.*expected at least one supervised token"):
        prepare(settings(material, chats, run_folder, entry={"roles_to_train": ["system"]}), run_folder)
