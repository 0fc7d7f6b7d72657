"""Answers and pairs of answers as rows of token ids, the same ids for the same conversation in both stages.

A conversation is tokenized as one text and then cut, so that what comes before the answer, what the answer is and where
it ends do not depend on the stage.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset, Features, List, Value

from fusion_plugins.axolotl.target_tokenizer import Answer
from fusion_plugins.core.preferences.candidates import Candidate, Pair, reply_of, tools_of
from fusion_plugins.errors import DataError

Row = dict[str, Any]

_TEXT, _IDS = Value("string"), List(Value("int32"))
SUPERVISED = {"input_ids": _IDS, "attention_mask": List(Value("int8")), "labels": List(Value("int64"))}
"""The columns of :func:`supervised_row`, of the types that axolotl's own datasets have."""
ANSWERS = ("chosen_ids", "rejected_ids")
PREFERENCE = {
    **dict.fromkeys(("prompt", "chosen", "rejected"), _TEXT),
    **dict.fromkeys(("prompt_ids", *ANSWERS), _IDS),
}
"""The columns of :func:`preference_row`."""
SOURCE_ANSWER = {"source_ids": _IDS}
"""The column that a third answer has, for WRPO."""
REFERENCE = dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), Value("float64"))
"""The columns of a reference that was computed before, for InfiFPO; the names are TRL's."""
WEIGHT = {"weight": Value("float64")}
"""The column of the weight of a row, for FuseSFT and FusePO."""
_SHOWN = 3
"""Unusable rows that an error names."""


@dataclass(frozen=True)
class Unusable:
    """A row that is left out.

    Attributes:
        row: what identifies it.
        reason: a sentence.
    """

    row: str
    reason: str


def candidate_name(candidate: Candidate) -> str:
    """Return what identifies an answer."""
    return f"prompt {candidate.prompt_id!r}, source {candidate.source!r}, sample {candidate.index}"


def pair_name(pair: Pair) -> str:
    """Return what identifies a pair."""
    return f"{candidate_name(pair.chosen)} before source {pair.rejected.source!r}, sample {pair.rejected.index}"


def conversation(candidate: Candidate) -> Row:
    """Return what :meth:`~fusion_plugins.axolotl.target_tokenizer.TargetTokenizer.answer` takes, as JSON can write it.

    The columns ``tool_calls`` and ``reasoning_content`` belong to the answer, ``tools`` to the prompt.
    """
    return {"prompt": candidate.prompt, "reply": reply_of(candidate), "tools": tools_of(candidate)}


def supervised_row(answer: Answer) -> Row:
    """Return the row of supervised fine-tuning."""
    ids = answer.input_ids
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": answer.labels}


def preference_row(chosen: Answer, rejected: Answer, source: Answer | None = None) -> Row:
    """Return the row of a pair: three texts and their ids, with the same prompt for all answers.

    The prompt ends before the first token that holds a byte of an answer, in all conversations. Where the end of the
    prompt merges with only one of the answers, the others' ids begin with the prompt's last letters.

    Args:
        chosen: the better answer.
        rejected: the worse answer.
        source: for WRPO, the best answer of a source; ``chosen`` and ``rejected`` are the target's own.

    Raises:
        DataError: the conversations differ before their answers.
    """
    answers = {"chosen_ids": chosen, "rejected_ids": rejected} | ({"source_ids": source} if source else {})
    prompts = [answer.prompt_ids for answer in answers.values()]
    shared = next((place for place, ids in enumerate(zip(*prompts, strict=False)) if len({*ids}) > 1), None)
    if shared is None:
        shared = min(map(len, prompts))
    other = next((answer for answer in answers.values() if answer.prompt != chosen.prompt), rejected)
    if other.prompt != chosen.prompt or not shared:
        raise DataError(
            "expected the chat template to write the same text before both answers of a pair, got "
            f"{chosen.prompt[-80:]!r} and {other.prompt[-80:]!r}. Leave the pair out, or use a template in "
            "which the prompt does not depend on the answer."
        )
    return {
        "prompt": chosen.prompt,
        "chosen": chosen.text,
        "rejected": rejected.text,
        "prompt_ids": chosen.prompt_ids[:shared],
        **{name: answer.input_ids[shared:] for name, answer in answers.items()},
    }


def make_rows(
    items: Sequence[tuple[str, Any]], make: Callable[[Any], Row], features: dict[str, Any], **options: Any
) -> tuple[Dataset, list[Unusable]]:
    """Make a row of each item, in several processes.

    Args:
        items: what identifies the row, and what it is made of, which JSON can write.
        make: the function; it may raise DataError.
        features: the columns of its rows.
        options: of the `map` of datasets: ``num_proc``, ``desc`` and so on.

    Returns:
        The rows, in order, with what identifies each in the column ``name``; and the items that gave none.
    """

    def row(entry: Row) -> Row:
        try:
            return make(json.loads(entry["item"])) | {"reason": None}
        except (DataError, UnicodeEncodeError) as error:  # half of a surrogate pair, which models can write
            return dict.fromkeys(features) | {"reason": str(error)}

    # As JSON, because an Arrow column holds either texts or chats, and gives all messages the same keys.
    table = Dataset.from_list([{"name": name, "item": json.dumps(item)} for name, item in items])
    types = Features({**features, "name": _TEXT, "reason": _TEXT})
    made = table.map(row, remove_columns=["item"], features=types, load_from_cache_file=False, **options)
    reasons = list(zip(made["name"], made["reason"], strict=True))
    kept = made.select([place for place, (_, reason) in enumerate(reasons) if reason is None])
    if len(kept) < len(made):
        # axolotl measures the lengths in the table itself, in which a selection still has all rows.
        kept = kept.flatten_indices()
    unusable = [Unusable(name, reason) for name, reason in reasons if reason is not None]
    return kept.remove_columns("reason"), unusable


def leave_out(unusable: Sequence[Unusable], of: int, on_unusable: str) -> list[Row]:
    """Return what the report says about unusable rows, or raise an error that names them.

    Args:
        unusable: the rows.
        of: how many rows there were.
        on_unusable: ``raise`` or ``skip``.

    Raises:
        DataError: there are unusable rows and they are to raise, or not one row is left.
    """
    if unusable and (on_unusable == "raise" or len(unusable) == of):
        named = "; ".join(f"{each.row}: {each.reason.rstrip('.')}" for each in unusable[:_SHOWN])
        more = f"; and {len(unusable) - _SHOWN} more" if len(unusable) > _SHOWN else ""
        cure = (
            "Correct them" if on_unusable == "skip" else "Correct them, or leave them out with fusion.on_unusable: skip"
        )
        raise DataError(f"{len(unusable)} of {of} rows cannot be used. {named}{more}. {cure}.")
    return [asdict(each) for each in unusable]
