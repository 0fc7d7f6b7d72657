"""axolotl's preference trainers for rows that are tokenized already: `prompt_ids`, `chosen_ids` and `rejected_ids`.

TRL tokenizes a prompt alone and with its answer, and cuts the second at the length of the first. Where prompt and
answer share a token, that is not where the answer begins; and it adds special tokens that the chat template has written
itself. Our rows are cut in the tokens of the whole text. Rows of other dataset types are prepared as ever.
"""

from typing import Any

from axolotl.core.trainers import AxolotlCPOTrainer, AxolotlORPOTrainer
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.utils.collators.dpo import AxolotlDPODataCollatorWithPadding
from datasets import Dataset, concatenate_datasets

#: the columns of a tokenized row
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


class TokenizedDPOTrainer(AxolotlDPOTrainer):
    """DPO and IPO."""

    def __init__(self, *args: Any, data_collator: Any = None, **kwargs: Any) -> None:
        # What axolotl brings for `pad_to_multiple_of` knows the columns of earlier versions of TRL alone.
        if isinstance(data_collator, AxolotlDPODataCollatorWithPadding):
            kwargs["args"].pad_to_multiple_of = data_collator.pad_to_multiple_of
            data_collator = None
        super().__init__(*args, data_collator=data_collator, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Leave tokenized rows as they are, and let TRL tokenize the others."""
        if not isinstance(dataset, Dataset) or not set(IDS) <= set(dataset.column_names):
            return super()._prepare_dataset(dataset, *args, **kwargs)
        tokenized = [ids is not None for ids in dataset["prompt_ids"]]
        ours = dataset.select([row for row, found in enumerate(tokenized) if found]).select_columns(list(IDS))
        if all(tokenized):
            return ours
        others = dataset.select([row for row, found in enumerate(tokenized) if not found]).remove_columns(list(IDS))
        prepared = super()._prepare_dataset(others, *args, **kwargs).select_columns(list(IDS))
        return concatenate_datasets([ours, prepared.cast(ours.features)])


class _TokenizedRows:
    """What CPO and ORPO have in common: they tokenize row by row."""

    def tokenize_row(self, feature: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return ids, mask and labels of both conversations and of their prompt."""
        if feature.get("prompt_ids") is None:
            row: dict[str, Any] = super().tokenize_row(feature, *args, **kwargs)  # type: ignore[misc]
            return row
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            answer = feature[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt + answer
            row[f"{side}_attention_mask"] = [1] * len(prompt + answer)
            row[f"{side}_labels"] = [-100] * len(prompt) + answer
        return row


class TokenizedCPOTrainer(_TokenizedRows, AxolotlCPOTrainer):
    """SimPO."""


class TokenizedORPOTrainer(_TokenizedRows, AxolotlORPOTrainer):
    """ORPO."""
