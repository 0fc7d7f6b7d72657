"""Padding of rows that are arrays, without a Python number per token.

axolotl's collators end in ``tokenizer.pad`` of transformers, which makes lists of arrays and tensors of lists: a
microsecond per token, as much as it takes to read and fuse the distributions of ten entries.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchEncoding


class ArrayPadding:
    """A tokenizer for a collator: :meth:`pad` takes rows of whole numbers as arrays; all else is the tokenizer's.

    Args:
        tokenizer: a tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_tokenizer":  # as long as it is being unpickled, it has no tokenizer
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def pad(
        self,
        encoded_inputs: Any,
        padding: Any = True,
        *,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        **settings: Any,
    ) -> Any:
        """Return what the tokenizer's own ``pad`` returns, which is asked where the rows are something else."""
        # With this padding the tokenizer does not look at `max_length`, and the other settings are as by default.
        usual = padding is True and return_tensors == "pt" and settings.keys() <= {"max_length"}
        columns = _columns(encoded_inputs) if usual else None
        padded = columns and self._padded(columns, pad_to_multiple_of or 1)
        if not padded:
            settings |= {"pad_to_multiple_of": pad_to_multiple_of, "return_tensors": return_tensors}
            return self._tokenizer.pad(encoded_inputs, padding=padding, **settings)
        return BatchEncoding({name: torch.from_numpy(values) for name, values in padded.items()})

    def _padded(
        self, columns: Mapping[str, Sequence[Any]], multiple: int
    ) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]] | None:
        """Return each column as (B, T) int64; None where the tokenizer has to say what becomes of one."""
        first = self._tokenizer.model_input_names[0]
        fills = {first: self._tokenizer.pad_token_id, "attention_mask": 0}
        unknown = {"token_type_ids", "special_tokens_mask"} & columns.keys()
        if not fills.keys() <= {*columns} & {*self._tokenizer.model_input_names} or unknown or fills[first] is None:
            return None
        lengths = [len(row) for row in columns[first]]
        longest = -(-max(lengths) // multiple) * multiple
        left = self._tokenizer.padding_side == "left"
        found = {}
        for name, rows in columns.items():
            # axolotl has padded all other columns.
            if [len(row) for row in rows] != (lengths if name in fills else [longest] * len(rows)):
                return None
            found[name] = np.full((len(rows), longest), fills.get(name, 0), np.int64)
            for place, row in enumerate(rows):
                found[name][place, longest - len(row) if left else 0 :][: len(row)] = row
        return found


def _columns(rows: Any) -> dict[str, list[Any]] | None:
    """Return the columns of rows of which every value is a row of whole numbers as an array; None for other rows."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        return None
    if any(row.keys() != rows[0].keys() for row in rows):
        return None
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    whole = all(
        isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu"
        for column in columns.values()
        for value in column
    )
    return columns if whole else None
