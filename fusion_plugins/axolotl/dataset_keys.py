"""axolotl's keys of a dataset entry, for our types: obeyed with axolotl's meaning, or refused by name.

For datasets of type ``fused`` every key of axolotl's schema is in one of the three lists; a test compares them with the
installed axolotl, so that a key of a later version cannot be ignored silently. The other two types read the columns of
`fusion score` and know only the keys that say where the rows are.
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from fusion_plugins.core.text.messages import REASONING_KEYS

#: what axolotl itself does before or after our rows are made: finding, loading and dividing the files
BY_AXOLOTL = frozenset(
    {
        *("path", "type", "split", "name", "data_files", "ds_type", "revision", "trust_remote_code"),
        *("shards", "shards_idx", "preprocess_shards"),
    }
)
#: what :mod:`fusion_plugins.axolotl.chat_rows` and :mod:`fusion_plugins.axolotl.supervision` obey
OBEYED = frozenset(
    {
        *("field", "field_messages", "field_tools", "field_thinking", "template_thinking_key", "split_thinking"),
        *("message_field_role", "message_field_content", "message_property_mappings", "roles", "drop_system_message"),
        *("roles_to_train", "message_field_training", "train_on_eos", "train_on_eot"),
        *("chat_template", "chat_template_jinja"),
    }
)
#: key -> why it cannot be obeyed and what to do
REFUSED: Mapping[str, str] = {
    "message_field_training_detail": "fused rows are trained on whole turns; use message_field_training",
    "conversation": "axolotl itself no longer uses it; name a template with chat_template",
    "input_transform": "stores are captured from the texts as they are; transform the file before `fusion capture`",
    "input_format": "it is for type user-defined prompts; give `text` or `messages`",
    "field_human": "fused rows are a text or messages; write the turns as messages",
    "field_model": "fused rows are a text or messages; write the turns as messages",
    "logprobs_field": "the distributions are those of fusion.sources; capture them with `fusion capture`",
    "temperature": "use fusion.temperature",
}
#: what axolotl knows for preference pairs of its own
OF_OTHER_TYPES = frozenset({"field_chosen", "field_rejected"})
#: the same as OBEYED for settings of the whole run that change rows
GLOBAL_OBEYED = frozenset(
    {"train_on_inputs", "eot_tokens", "chat_template", "chat_template_jinja", "chat_template_kwargs"}
)
#: what axolotl does to the tokenizer, its template or the packing, whatever the type of the dataset
GLOBAL_BY_AXOLOTL = frozenset(
    {
        *("added_tokens_overrides", "special_tokens", "default_system_message"),
        *("sample_packing_bin_size", "sample_packing_group_size", "sample_packing_sequentially"),
    }
)
_DIVIDES = "the responses to one prompt must be chosen from together; leave shards out"
#: for scored responses: key -> why it cannot be obeyed and what to do
_REFUSED_FOR_SCORED: Mapping[str, str] = {
    **dict.fromkeys(("shards", "shards_idx", "preprocess_shards"), _DIVIDES),
    **dict.fromkeys(("chat_template", "chat_template_jinja"), "set it for the whole run, outside `datasets:`"),
}
_COLUMNS = "the rows have the columns of `fusion score`, and answers alone are trained on; remove it"
_KNOWN = BY_AXOLOTL | OBEYED | {*REFUSED, *OF_OTHER_TYPES}
_ENDS = ("all", "turn", "last", "none")


def problems_of(entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with an entry of type ``fused``, one sentence for each key."""
    for key in _given(entry):
        if key in REFUSED or key in OF_OTHER_TYPES:
            why = REFUSED.get(key, "it is for preference pairs; remove it")
            yield f"datasets: {key} cannot be used with this type: {why}"
    yield from _unknown(entry)
    for key in ("train_on_eos", "train_on_eot"):
        if entry.get(key) is not None and str(entry[key]) not in _ENDS:
            yield f"datasets: {key}: expected one of {', '.join(_ENDS)}, got {entry[key]!r}"
    thinking = entry.get("template_thinking_key")
    if thinking is not None and thinking not in REASONING_KEYS:
        yield f"datasets: template_thinking_key: expected one of {', '.join(REASONING_KEYS)}, got {thinking!r}"


def problems_of_scored(entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with an entry of type ``best_of_sources`` or ``multi_source_dpo``, one sentence per key."""
    for key in _given(entry):
        if key in _REFUSED_FOR_SCORED or (key in _KNOWN - BY_AXOLOTL):
            why = _REFUSED_FOR_SCORED.get(key, _COLUMNS)
            yield f"datasets: {key} cannot be used with `type: {entry.get('type')}`: {why}"
    yield from _unknown(entry)


def _given(entry: Mapping[str, Any]) -> Iterator[str]:
    """The keys that say something, without the stamp of a prepared dataset."""
    for key, value in entry.items():
        if value is not None and value is not False and not str(value).startswith("fusion:"):
            yield str(key)


def _unknown(entry: Mapping[str, Any]) -> Iterator[str]:
    """Keys that axolotl drops without a word."""
    for key in map(str, entry):
        if key not in _KNOWN:
            near = get_close_matches(key, sorted(BY_AXOLOTL | OBEYED), 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            yield f"datasets: {key}: axolotl has no such key of a dataset and would drop it{meant}"
