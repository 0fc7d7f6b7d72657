"""What the workers do that prepare a dataset for fusion: rows of the dataset in, columns of prepared rows out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from datasets import Features, List, Value

from fusion_plugins.axolotl.chat_rows import Content, RowReader
from fusion_plugins.axolotl.collator import (
    CHUNK_LOGPROB,
    CHUNK_PLACE,
    FILLS,
    FUSED_IDS,
    FUSED_KEPT,
    FUSED_LOGPROBS,
    FUSED_SOURCE,
    FUSED_TEXT,
    LOGPROB_TYPE,
    SAMPLED_LOGPROB,
    Fused,
    TokenChunks,
)
from fusion_plugins.axolotl.counting import Row, rows_of
from fusion_plugins.axolotl.supervision import Supervision
from fusion_plugins.axolotl.target_tokenizer import IGNORED, EncodedText, TargetTokenizer
from fusion_plugins.axolotl.text_rows import TextFuser, pack_text
from fusion_plugins.core.fusion.routing import Route
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, DataError, MismatchError, TokenizerError
from fusion_plugins.model_names import is_same_model

#: columns that only the preparation sees
COUNTERS, REASON, NAME, ID = "fusion_counters", "fusion_reason", "fusion_name", "fusion_id"
ROUTE, HOW = "fusion_route", "fusion_how"
_TOKENS = {"input_ids": Value("int32"), "attention_mask": Value("int8"), "labels": Value("int32")}


class FusedReader:
    """Reads the rows of the dataset: id, content, and the content in the target's tokens."""

    def __init__(self, target: TargetTokenizer, rows: RowReader, supervision: Supervision, base_model: str) -> None:
        self.target, self._rows, self._supervision, self._base_model = target, rows, supervision, base_model

    def content(self, row: Row) -> Content:
        """Return the id and the text or chat of a row."""
        return self._rows.content(row)

    def value(self, column: str, value: Any) -> Any:
        """Return what a row holds in a column."""
        return self._rows.value(column, value)

    def encoded(self, row: Row) -> EncodedText:
        """Return the text or chat of a row as the target reads it.

        Raises:
            DataError: the template refuses it, the tokenizer does, or no token of it is supervised.
        """
        content = self.content(row)
        try:
            found = self.target.encode(
                content.messages if content.text is None else content.text,
                tools=content.tools,
                supervision=self._supervision,
                answer=content.answer,
                own=content.answer is not None and is_same_model(content.answer.model, self._base_model),
            )
        except TokenizerError as error:
            raise DataError(str(error)) from error
        if not (found.labels != IGNORED).any():
            raise DataError(
                "expected at least one supervised token, got none: the turns are empty, or roles_to_train, "
                "message_field_training or the like leave them all out. Leave the row out."
            )
        ids, logprobs = row.get("token_ids"), row.get("token_logprobs")
        if content.answer is None or ids is None or logprobs is None:
            return found
        return found.with_sampled(ids, logprobs)

    def tokens(self, row: Row) -> tuple[str, TokenizedText] | None:
        """Return the id of a row and its tokens; None for a row that cannot be used."""
        try:
            return row[ID], self.encoded(row).tokens
        except DataError:
            return None


class PrepareBatch:
    """What runs in each worker: a batch of rows in, columns out.

    Args:
        reader: reads rows.
        fuser: fuses texts.
        routes: the routes that the numbers in the rows mean.
        strict: a text that differs from that of a store is an error.
        by_reference: rows get the reference to their text in place of its fused distributions.
        step: every how many-th text is counted in the report. With references, the others are only compared; without,
            only the source that is taken is projected.
    """

    def __init__(
        self,
        reader: FusedReader,
        fuser: TextFuser,
        routes: Sequence[Route],
        *,
        strict: bool,
        by_reference: bool,
        step: int,
    ) -> None:
        self._reader, self._fuser, self._routes, self._strict = reader, fuser, routes, strict
        self._by_reference, self._step = by_reference, step
        self._ids = "int16" if reader.target.table.vocab_size <= np.iinfo(np.int16).max else "int32"
        own = {FUSED_IDS: self._ids, FUSED_LOGPROBS: LOGPROB_TYPE, FUSED_KEPT: "float16", FUSED_SOURCE: "int16"}
        if fuser.chunks:
            # Not in fewer bits: an advantage is the difference of two log-probabilities.
            own = {CHUNK_PLACE: "int32", CHUNK_LOGPROB: "float32", SAMPLED_LOGPROB: "float32", FUSED_SOURCE: "int16"}
        if by_reference:
            # The sampler's log-probabilities are in no store.
            own = {FUSED_TEXT: "uint8"} | ({SAMPLED_LOGPROB: "float32"} if fuser.chunks else {})
        self._types = _TOKENS | {name: Value(kind) for name, kind in own.items()}

    @property
    def features(self) -> Features:
        """The columns that a call returns."""
        lists = {name: List(kind) for name, kind in self._types.items()}
        return Features({**lists, **dict.fromkeys((COUNTERS, REASON, HOW), Value("string"))})

    def __call__(self, batch: Mapping[str, list[Any]], places: Sequence[int]) -> dict[str, list[Any]]:
        """Return the columns of a batch of rows, given as columns; ``places`` are theirs in the dataset.

        Raises:
            MismatchError: a text differs from that of a store (where that is strict).
        """
        rows = rows_of(batch)
        texts: dict[int, EncodedText] = {}
        reasons: dict[int, str] = {}
        for number, row in enumerate(rows):
            try:
                texts[number] = self._reader.encoded(row)
            except DataError as error:
                reasons[number] = str(error)
        counted = [number for number in texts if places[number] % self._step == 0]
        chosen = counted if self._by_reference else list(texts)
        ids, routes = [str(row[ID]) for row in rows], [self._routes[row[ROUTE]] for row in rows]
        fused, unusable, report = self._fuser.fuse(
            [ids[number] for number in chosen],
            [texts[number] for number in chosen],
            [routes[number] for number in chosen],
            counted=[places[number] % self._step == 0 for number in chosen],
            on_unusable="skip",
            types=(self._ids, LOGPROB_TYPE),
        )
        errors = {chosen[place]: error for place, error in unusable.items()}
        for number in texts.keys() - set(chosen):
            try:
                self._fuser.compare(ids[number], texts[number], routes[number])
            except AlignmentError as error:
                errors[number] = error
        if errors and self._strict:
            first = min(errors)
            raise MismatchError(f"{rows[first][NAME]}: {errors[first]}") from errors[first]
        reasons |= {number: str(error) for number, error in errors.items()}
        distributions: dict[int, Fused | TokenChunks] = dict(zip(chosen, fused, strict=True))
        made = [
            dict.fromkeys(self._types, ())
            if number in reasons
            else self._columns(ids[number], texts[number], routes[number], distributions.get(number))
            for number in range(len(rows))
        ]
        columns: dict[str, list[Any]] = {
            name: [np.asarray(row[name], kind.dtype).ravel() for row in made] for name, kind in self._types.items()
        }
        columns[HOW] = [texts[number].how or "" if number in texts else "" for number in range(len(rows))]
        columns[REASON] = [reasons.get(number, "") for number in range(len(rows))]
        # One report per batch, on its first row: a string per row would be larger than the distributions.
        columns[COUNTERS] = [json.dumps(asdict(report)), *[""] * (len(rows) - 1)]
        return columns

    def _columns(self, id: str, text: EncodedText, route: Route, fused: Fused | TokenChunks | None) -> dict[str, Any]:
        own: dict[str, Any] = {}
        if fused is not None and not self._by_reference:
            own = dict(zip(FILLS[type(fused)], fused, strict=True))
        elif self._by_reference:
            own[FUSED_TEXT] = pack_text(id, text, route)
            if self._fuser.chunks:
                own[SAMPLED_LOGPROB] = text.sampled_or_unknown
        return {
            "input_ids": text.tokens.input_ids,
            "attention_mask": np.ones(len(text.labels), np.int8),
            "labels": text.labels,
            **own,
        }
