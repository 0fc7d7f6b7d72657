"""axolotl's keys of chats: the same labels as axolotl's own type `chat_template`, and no key is ignored."""

import copy

import numpy as np
import pytest
import tiny
from axolotl.prompt_strategies.chat_template import StrategyLoader
from axolotl.utils.data.shared import DATASET_HASH_CONFIG_EXTRA_FIELDS, DATASET_HASH_DATASET_EXTRA_FIELDS
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.datasets import SFTDataset

from fusion_plugins.axolotl import dataset_keys
from fusion_plugins.axolotl.chat_rows import RowReader
from fusion_plugins.axolotl.supervision import Supervision
from fusion_plugins.axolotl.target_tokenizer import IGNORED, TargetTokenizer
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.errors import ConfigError, DataError

SYSTEM = {"role": "system", "content": "Answer briefly."}
CHAT = [SYSTEM, *tiny.CHAT]
#: with reasoning and calls, as Qwen's templates have them
TOOLS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content and loop.last %}[hm]{{ message.reasoning_content }}[/hm]{% endif %}"
    "{{ message.content }}{% if message.tool_calls %}{% for call in message.tool_calls %}"
    "[call]{{ call.function.name }} {{ call.function.arguments | tojson }}[/call]{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def both(row, template=tiny.CHATML, run=None, **entry):
    """The labels of axolotl's own type and ours, for one row."""
    tokenizer = copy.copy(tiny.byte_level())
    tokenizer.chat_template = template
    cfg = DictDefault({"sequence_len": 512, "eot_tokens": ["<|im_end|>"], **(run or {})})
    settings = SFTDataset(**{"path": "x", "type": "chat_template", **entry}).model_dump(exclude_none=True)
    theirs = StrategyLoader()(tokenizer, cfg, DictDefault(settings)).tokenize_prompt(copy.deepcopy(row))
    ours = encode(tokenizer, cfg, settings, row)
    assert ours.tokens.input_ids.tolist() == theirs["input_ids"]
    return theirs["labels"], ours.labels.tolist()


def encode(tokenizer, cfg, entry, row):
    content = RowReader.of(entry).content(row)
    target = TargetTokenizer(tokenizer, TokenTable.from_tokenizer(tokenizer), {})
    supervision = Supervision.of(tokenizer, cfg, entry)
    return target.encode(content.messages, tools=content.tools, supervision=supervision)


def flagged(*flags):
    return [{**message, "train": flag} for message, flag in zip(tiny.CHAT, flags, strict=True)]


@pytest.mark.parametrize(("messages", "settings"), [
    (CHAT, {}),
    (CHAT, {"roles_to_train": ["user"]}),
    (CHAT, {"roles_to_train": ["assistant", "user", "system"]}),
    (CHAT, {"run": {"train_on_inputs": True}}),
    (CHAT, {"train_on_eos": "none", "train_on_eot": "none"}),
    (CHAT, {"train_on_eos": "all"}),
    (CHAT, {"train_on_eot": "last", "train_on_eos": "turn"}),
    (CHAT, {"train_on_eot": "none"}),
    (CHAT, {"drop_system_message": True}),
    (flagged(None, False, None, None), {"message_field_training": "train"}),
    (flagged(True, None, False, False), {"message_field_training": "train"}),
    (flagged(True, True, True, True), {"message_field_training": "train", "roles_to_train": []}),
], ids=repr)  # fmt: skip
def test_labels_are_those_of_axolotl(messages, settings):
    theirs, ours = both({"messages": messages}, **settings)
    assert ours == theirs
    assert any(label != IGNORED for label in ours)


def test_other_names_of_roles_and_keys_are_read_as_axolotl_reads_them():
    chat = [{"from": "human", "value": "Hi"}, {"from": "bot", "value": "Ho, ho."}]
    theirs, ours = both(
        {"conversations": chat},
        field_messages="conversations",
        message_property_mappings={"role": "from", "content": "value"},
        roles={"user": ["human"], "assistant": ["bot"]},
        roles_to_train=["bot"],
    )
    assert ours == theirs
    theirs, ours = both(
        {"messages": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Ho"}]}, roles_to_train=["gpt"]
    )
    assert ours == theirs


def test_reasoning_and_calls_have_the_labels_of_axolotl():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 12}}}
    chat = [
        {"role": "user", "content": "12 + 30?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42.", "reasoning_content": "hm, 42"},
    ]
    theirs, ours = both({"messages": chat}, TOOLS)
    text = tiny.byte_level().decode([label for label in ours if label != IGNORED])
    assert text == '[call]add {"a": 12}[/call]<|im_end|>[hm]hm, 42[/hm]It is 42.<|im_end|>'
    assert ours == theirs


def test_reasoning_under_another_key_is_read():
    row = {"messages": [*tiny.CHAT[:1], {"role": "assistant", "content": "42", "thoughts": "hm"}]}
    (message,) = RowReader.of({"field_thinking": "thoughts"}).content(row).messages[1:]
    assert message == {"role": "assistant", "content": "42", "reasoning_content": "hm"}


def test_turns_that_are_not_trained_on_are_not_fused_either():
    tokenizer = tiny.byte_level()
    found = encode(tokenizer, {}, {"message_field_training": "train"}, {"messages": flagged(None, False, None, None)})
    assert found.trained.shape == (1, 2)
    assert found.tokens.spans.shape == (6, 2)
    start, stop = found.trained[0]
    supervised = found.tokens.ends[np.flatnonzero(found.labels != IGNORED)]
    assert start < supervised.min() <= stop
    assert encode(tokenizer, {}, {}, {"messages": tiny.CHAT}).trained is None


def test_every_key_of_axolotl_is_obeyed_or_refused():
    known = dataset_keys.BY_AXOLOTL | dataset_keys.OBEYED | {*dataset_keys.REFUSED}
    assert set(SFTDataset.model_fields) == known
    assert not dataset_keys.OBEYED & {*dataset_keys.REFUSED}
    assert not dataset_keys.BY_AXOLOTL & (dataset_keys.OBEYED | {*dataset_keys.REFUSED})
    # The keys of other kinds of runs have another schema, which has no type of ours but preference pairs.
    others = {"field_chosen", "field_rejected", "max_completion_length", "step_separator", "text_column"}
    assert set(DATASET_HASH_DATASET_EXTRA_FIELDS) - known == others | {"train_on_last_step_only"}
    assert set(DATASET_HASH_CONFIG_EXTRA_FIELDS) == dataset_keys.GLOBAL_OBEYED | dataset_keys.GLOBAL_BY_AXOLOTL


@pytest.mark.parametrize("key", sorted(dataset_keys.REFUSED))
def test_refused_keys_are_refused_by_name(key):
    assert list(dataset_keys.problems_of({"path": "x", key: None})) == []
    (problem,) = dataset_keys.problems_of({"path": "x", key: "something"})
    assert key in problem


def test_wrong_values_are_refused():
    assert "train_on_eos: expected one of" in next(dataset_keys.problems_of({"train_on_eos": "some"}))
    assert "template_thinking_key" in next(dataset_keys.problems_of({"template_thinking_key": "thoughts"}))
    with pytest.raises(ConfigError, match="'not a token' is"):
        Supervision.of(tiny.byte_level(), {"eot_tokens": ["not a token"]}, {})


@pytest.mark.parametrize(("row", "message"), [
    ({"messages": [], "id": 1}, "expected a row with a text"),
    ({"messages": tiny.CHAT, "text": "x"}, "and not both"),
    ({"messages": "no JSON"}, "a list or as JSON"),
    ({"messages": ["x"]}, "expected a list of messages"),
    ({"messages": [{"content": "x"}]}, "a message with a role"),
    ({"messages": tiny.CHAT, "tools": "x"}, "expected tools as JSON"),
    ({"messages": tiny.CHAT, "tools": {"a": 1}}, "tools as a list"),
    ({"messages": [{"role": "assistant", "content": "<reasoning>a</reasoning>b"}]}, "split_thinking"),
])  # fmt: skip
def test_rows_of_another_form_are_refused(row, message):
    with pytest.raises(DataError, match=message):
        RowReader.of({"split_thinking": True}).content(row)
