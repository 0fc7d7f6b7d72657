"""Dataset type ``fusion_plugins.axolotl.fused``: texts or chats with fused distributions, as axolotl prepares datasets.

axolotl imports this module by the name of the type and calls :func:`load`. A row has ``text``, or ``messages``
(rendered with the target's own chat template), and usually ``id``. Stores are joined by id, and every text is compared
with what the store was captured from. A prepared row has ``input_ids``, ``attention_mask``, ``labels`` and the two flat
columns of :mod:`fusion_plugins.axolotl.collator`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from axolotl.utils.logging import get_logger
from datasets import Dataset, Features, List, Value

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.collator import FUSED_IDS, FUSED_LOGPROBS
from fusion_plugins.axolotl.counting import Row, count_alignments, rows_of
from fusion_plugins.axolotl.fingerprint import store_content
from fusion_plugins.axolotl.guards import FUSED, require_plugin
from fusion_plugins.axolotl.plan import make_plan
from fusion_plugins.axolotl.prepared import keep_report
from fusion_plugins.axolotl.report import read_counters, report_content, show_report
from fusion_plugins.axolotl.target_tokenizer import EncodedText, TargetTokenizer
from fusion_plugins.core.fusion.accounting import FusionReport
from fusion_plugins.core.fusion.pipeline import FusionPlan, fuse_text, warm_up
from fusion_plugins.core.text.content_id import content_id
from fusion_plugins.core.text.messages import as_messages
from fusion_plugins.core.text.round_trip import text_changes
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, DataError, MismatchError
from fusion_plugins.store import Store, open_store

LOG = get_logger(__name__)
COUNTERS = "fusion_counters"
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "attention_mask": List(Value("int8")),
        "labels": List(Value("int32")),
        FUSED_IDS: List(Value("int32")),
        FUSED_LOGPROBS: List(Value("float32")),
        COUNTERS: Value("string"),
    }
)
#: rows per call; bounds the memory of a worker
BATCH = 32


class FusedStrategy(DatasetWrappingStrategy):
    """Prepares one dataset.

    Args:
        tokenizer: the target's, as axolotl loaded it.
        cfg: the validated configuration.
        ds_cfg: the entry of this dataset; ``field`` and ``field_messages`` name other columns.
        block: the ``fusion:`` block.
    """

    def __init__(self, tokenizer: Any, cfg: Any, ds_cfg: Any, block: FusionBlock) -> None:
        self._reader = _Reader(
            TargetTokenizer.of(tokenizer, cfg),
            ds_cfg.get("field") or "text",
            ds_cfg.get("field_messages") or "messages",
        )
        self._block = block
        self._sequence_len = int(cfg.sequence_len)
        self._path = str(ds_cfg.get("path"))
        self._cfg, self._entry = cfg, ds_cfg

    def wrap_dataset(
        self, dataset: Any, process_count: int | None = None, keep_in_memory: bool | None = False, **kwargs: Any
    ) -> Dataset:
        """Fuse every row.

        Raises:
            MismatchError: a store was captured from other texts, or the target's own store from another model.
            StoreError: a store is damaged.
            DataError: a row is neither a text nor a chat.
        """
        stores = [open_store(source.store) for source in self._block.sources]
        dataset = self._joined(dataset, stores)
        warm_up()
        target = self._reader.target
        if changes := text_changes(target.tokenizer, target.table.spell).known:
            LOG.info(f"fusion: the target's tokenizer changes texts, which is known: {'; '.join(changes)}")
        count = partial(
            count_alignments, dataset, self._reader.tokens, target.table.packed, process_count=process_count
        )
        plan = make_plan(self._block, stores, target, count)
        rows = dataset.map(
            _Fuse(self._reader, plan, stores),
            batched=True,
            batch_size=BATCH,
            num_proc=process_count,
            remove_columns=dataset.column_names,
            features=FEATURES,
            keep_in_memory=bool(keep_in_memory),
            # axolotl keeps the prepared dataset; a second cache could be stale.
            load_from_cache_file=False,
            desc="Fusing sources",
        )
        report = read_counters(rows[COUNTERS])
        too_long = sum(len(ids) > self._sequence_len for ids in rows["input_ids"])
        show_report(report, too_long, self._sequence_len)
        contents = {source.store: store_content(self._cfg, source.store) for source in self._block.sources}
        keep_report(self._cfg, self._entry, "fusion_report.json", report_content(report, too_long), contents)
        return rows.remove_columns(COUNTERS)

    def _joined(self, dataset: Any, stores: list[Store]) -> Any:
        """Return the rows that all stores have."""
        ids = [self._reader.id(row) for row in dataset]
        kept = set(range(len(ids)))
        for store in stores:
            absent = [index for index, id in enumerate(ids) if id not in store]
            kept -= set(absent)
            if absent and (self._block.on_missing_text == "raise" or not kept):
                raise MismatchError(
                    f"expected every row of {self._path} in the store {store.path}; {len(absent)} of {len(ids)} are "
                    f"missing, the first of them {ids[absent[0]]!r}. The store ({len(store)} texts) was captured from "
                    f"other texts, or not to the end (complete: {store.manifest.complete}). Capture it from the texts "
                    "that you train on, or set fusion.on_missing_text: skip."
                )
        if len(kept) == len(ids):
            return dataset
        LOG.warning(f"fusion: skipped {len(ids) - len(kept)} of {len(ids)} rows, which are missing in a store")
        return dataset.select(sorted(kept))


def load(tokenizer: Any, cfg: Any, ds_cfg: Any = None) -> FusedStrategy:
    """Return the strategy that prepares one dataset.

    Raises:
        PluginError: the plugin is not configured or not loaded.
        ConfigError: the ``fusion:`` block is missing or wrong.
    """
    return FusedStrategy(tokenizer, cfg, ds_cfg or {}, require_plugin(cfg, FUSED))


class _Reader:
    """Reads the rows of the dataset: id, content, and the content in the target's tokens."""

    def __init__(self, target: TargetTokenizer, text: str, messages: str) -> None:
        self.target, self._text, self._messages = target, text, messages

    def content(self, row: Row) -> Any:
        """Return the text or the messages of a row."""
        text, messages = row.get(self._text), row.get(self._messages)
        if isinstance(text, str) and text and messages is None:
            return text
        if messages and text is None:
            return as_messages(messages)
        raise DataError(
            f"expected a row with a text in {self._text!r} or a chat in {self._messages!r}, and not both; the row's "
            f"columns are {', '.join(row)}. Name other columns with `field:` or `field_messages:` in the entry."
        )

    def id(self, row: Row) -> str:
        """Return the id of a row: its own, or that of its content."""
        # Also where there is an id: a row without content is another error than an id that no store knows.
        content = self.content(row)
        return str(row["id"]) if row.get("id") is not None else content_id(content)

    def encoded(self, row: Row) -> EncodedText:
        """Return the text or chat of a row as the target reads it."""
        return self.target.encode(self.content(row))

    def tokens(self, row: Row) -> tuple[str, TokenizedText]:
        """Return the id of a row and its tokens."""
        return self.id(row), self.encoded(row).tokens


class _Fuse:
    """What runs in each worker: a batch of rows in, columns out."""

    def __init__(self, reader: _Reader, plan: FusionPlan, stores: list[Store]) -> None:
        self._reader, self._plan, self._stores = reader, plan, stores

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        rows = rows_of(batch)
        columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
        total = FusionReport()
        for row in rows:
            fused, report = self._row(row)
            total = total + report
            for name, value in fused.items():
                columns[name].append(value)
        # One report per batch, on its first row: a string per row would be larger than the distributions.
        columns[COUNTERS] = [json.dumps(asdict(total)), *[""] * (len(rows) - 1)]
        return columns

    def _row(self, row: Row) -> tuple[dict[str, Any], FusionReport]:
        text = self._reader.encoded(row)
        records = [store[self._reader.id(row)] for store in self._stores]
        try:
            fused, report = fuse_text(self._plan, text.tokens, records)
        except AlignmentError as error:
            raise MismatchError(str(error)) from error
        return {
            "input_ids": text.tokens.input_ids,
            "attention_mask": np.ones(len(text.labels), np.int8),
            "labels": text.labels,
            FUSED_IDS: fused.ids.ravel(),
            FUSED_LOGPROBS: fused.logprobs.ravel(),
        }, report
