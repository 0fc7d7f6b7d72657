"""Dataset type ``fusion_plugins.axolotl.fused``: texts or chats with fused distributions, as axolotl prepares datasets.

axolotl imports this module by the name of the type and calls :func:`load`. A row has ``text``, or ``messages`` and
perhaps ``tools`` (rendered with the target's own chat template), and usually ``id``; or it is a response, scored or
not, of which the answer is trained on. Stores are joined by id, and every text is compared with what the store was
captured from. A row that cannot be used (the template refuses it, it is of another text, nothing in it is supervised)
is an error that names it, or is left out and counted. A prepared row has ``input_ids``, ``attention_mask``, ``labels``
and either the columns of :mod:`fusion_plugins.axolotl.collator`, with distributions or chunks, or the one of
:mod:`fusion_plugins.axolotl.text_rows`; :mod:`fusion_plugins.axolotl.fused_rows` makes it.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow.compute as pc
from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from axolotl.utils.logging import get_logger
from datasets import Dataset

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.chat_rows import RowReader
from fusion_plugins.axolotl.counting import count_alignments
from fusion_plugins.axolotl.fingerprint import store_content
from fusion_plugins.axolotl.fused_rows import COUNTERS, HOW, ID, NAME, REASON, ROUTE, FusedReader, PrepareBatch
from fusion_plugins.axolotl.fusion_losses import cuts_chunks
from fusion_plugins.axolotl.guards import FUSED, require_plugin
from fusion_plugins.axolotl.plan import make_plan
from fusion_plugins.axolotl.preference_rows import Unusable, leave_out
from fusion_plugins.axolotl.prepared import keep_report
from fusion_plugins.axolotl.report import read_counters, report_content, show_report
from fusion_plugins.axolotl.routes import Routes, Table, columns_needed, make_routes
from fusion_plugins.axolotl.row_ids import with_written_ids
from fusion_plugins.axolotl.supervision import Supervision
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer
from fusion_plugins.axolotl.text_rows import TextFuser
from fusion_plugins.core.fusion.pipeline import warm_up
from fusion_plugins.core.fusion.routing import Route
from fusion_plugins.core.text.content_id import content_id
from fusion_plugins.core.text.round_trip import text_changes
from fusion_plugins.core.text.sampled import AnswerCounts
from fusion_plugins.errors import DataError
from fusion_plugins.response_texts import is_table_of_responses
from fusion_plugins.store import Store, open_store
from fusion_plugins.store.packed import warm_up as warm_up_store
from fusion_plugins.where import columns_of, require_columns, selected

LOG = get_logger(__name__)
CONTENT = "fusion_content"
#: most texts, and about most tokens, of which all sources are projected for the report
REPORTED, REPORTED_TOKENS = 1000, 1 << 18
UNFINISHED = "were cut (a length limit, or an interruption): they have no end of turn to learn"
#: rows per call; bounds the memory of a worker
BATCH = 32
#: with axolotl's deduplication, tokenizer of a run -> stores -> a text and its route -> id of the first such row
_FIRST_IDS: WeakKeyDictionary[Any, dict[tuple[str, ...], dict[tuple[str, Route], str]]] = WeakKeyDictionary()


class FusedStrategy(DatasetWrappingStrategy):
    """Prepares one dataset.

    Args:
        tokenizer: the target's, as axolotl loaded it.
        cfg: the validated configuration.
        ds_cfg: the entry of this dataset; :mod:`~fusion_plugins.axolotl.dataset_keys` lists the keys that are obeyed.
        block: the ``fusion:`` block.
    """

    def __init__(self, tokenizer: Any, cfg: Any, ds_cfg: Any, block: FusionBlock) -> None:
        names = tuple(source.store for source in block.sources)
        self._first_ids = _FIRST_IDS.setdefault(tokenizer, {}).setdefault(names, {})
        tokenizer = _with_template(tokenizer, cfg, ds_cfg)
        target, supervision = TargetTokenizer.of(tokenizer, cfg), Supervision.of(tokenizer, cfg, ds_cfg)
        self._path, self._base_model = str(ds_cfg.get("path")), str(cfg.get("base_model"))
        self._reader = FusedReader(target, RowReader.of(ds_cfg), supervision, self._base_model)
        self._block = block
        self._sequence_len = int(cfg.sequence_len)
        self._cfg, self._entry = cfg, ds_cfg

    def wrap_dataset(
        self, dataset: Any, process_count: int | None = None, keep_in_memory: bool | None = False, **kwargs: Any
    ) -> Dataset:
        """Fuse every row.

        Raises:
            MismatchError: the target's own store is of another model, or a store lacks a row or was captured from
                another text (with ``on_unusable: raise``).
            StoreError: a store is damaged.
            DataError: a row cannot be used (with ``on_unusable: raise``), or no row is left.
        """
        stores = [open_store(source.store) for source in self._block.sources]
        dataset, places = self._selected(dataset)
        total = len(dataset)
        dataset, unusable, of_answers = self._readable(with_written_ids(dataset, stores, self._path), places)
        dataset, routes = self._routed(dataset, stores)
        dataset = self._with_first_ids(dataset, routes)
        warm_up()
        warm_up_store()
        target = self._reader.target
        if changes := text_changes(target.tokenizer, target.table.spell).known:
            LOG.info(f"fusion: the target's tokenizer changes texts, which is known: {'; '.join(changes)}")
        strict = self._block.on_unusable == "raise"
        count = partial(
            count_alignments,
            dataset,
            self._reader.tokens,
            target.table.packed,
            process_count=process_count,
            strict=strict,
        )
        fuser = TextFuser(make_plan(self._block, stores, target, count), stores, cuts_chunks(self._block))
        by_reference = self._block.prepared == "stores"
        step = _counting_step(len(dataset), stores)
        make = PrepareBatch(self._reader, fuser, routes.distinct, strict=strict, by_reference=by_reference, step=step)
        rows = dataset.map(
            make,
            with_indices=True,
            batched=True,
            batch_size=BATCH,
            num_proc=process_count,
            remove_columns=dataset.column_names,
            features=make.features,
            keep_in_memory=bool(keep_in_memory),
            # axolotl keeps the prepared dataset; a second cache could be stale.
            load_from_cache_file=False,
            desc="Fusing sources",
        )
        report, reasons, names = read_counters(rows[COUNTERS][:]), rows[REASON][:], dataset[NAME][:]
        answers = AnswerCounts(**Counter(how for how in rows[HOW][:] if how))
        unusable += [Unusable(name, reason) for name, reason in zip(names, reasons, strict=True) if reason]
        left_out = leave_out(unusable, total, self._block.on_unusable)
        if left_out:
            LOG.warning(f"fusion: left out {len(left_out)} of {total} rows of {self._path} that cannot be used")
            rows = rows.select([place for place, reason in enumerate(reasons) if not reason])
        too_long = _longer_than(rows, self._sequence_len)
        if step > 1:
            LOG.info(_counted_part(by_reference, report.texts, len(rows), step))
        show_report(report, too_long, self._sequence_len, left_out)
        if described := answers.described():
            LOG.info(f"fusion: {self._path}: {described}")
        contents = {source.store: store_content(self._cfg, source.store) for source in self._block.sources}
        content = report_content(report, too_long, left_out, [asdict(each) for each in routes.missing])
        content |= {
            "without_source": [asdict(each) for each in routes.untaught],
            "texts_of_sources": routes.texts,
            "sources_left_out": routes.without,
            "empty_answers": of_answers["empty"],
            "unfinished_answers": of_answers["unfinished"],
            "answers": asdict(answers),
        }
        keep_report(self._cfg, self._entry, "fusion_report.json", content, contents)
        return rows.remove_columns([COUNTERS, REASON, HOW])

    def _selected(self, dataset: Any) -> tuple[Any, Sequence[int]]:
        """Return the rows that meet ``fusion.where``, and their places in the dataset."""
        where = self._block.where
        if not where:
            return dataset, range(len(dataset))
        require_columns(where, dataset.column_names, self._path)
        columns = self._columns(dataset, columns_of(where))
        kept = np.flatnonzero(selected(where, columns, len(dataset)))
        if not kept.size:
            raise DataError(
                f"fusion.where: expected some rows of {self._path} with {where}, got none. Change the conditions."
            )
        LOG.info(f"fusion: {len(kept)} of {len(dataset)} rows of {self._path} meet fusion.where")
        return dataset.select(kept), kept.tolist()

    def _columns(self, dataset: Any, names: Iterable[str]) -> dict[str, list[Any]]:
        return {name: [self._reader.value(name, value) for value in dataset[name][:]] for name in names}

    def _readable(self, dataset: Any, places: Sequence[int]) -> tuple[Any, list[Unusable], Counter[str]]:
        """Return the rows that hold a text or a chat, with ids and names, those that do not, and counts of answers."""
        ids, names, contents, kept, answers = [], [], [], [], Counter[str]()
        unusable: list[Unusable] = []
        for place, row in enumerate(dataset):
            name = f"{self._path}: row {places[place] + 1}"
            try:
                content = self._reader.content(row)
            except (DataError, UnicodeEncodeError) as error:
                given = "" if row.get("id") is None else f", id {row['id']!r}"
                unusable.append(Unusable(name + given, str(error)))
                continue
            if content.empty:
                answers["empty"] += 1
                continue
            answers["unfinished"] += content.answer is not None and not content.answer.finished
            ids.append(content.id)
            names.append(f"{name}, id {content.id!r}")
            if self._cfg.get("dataset_exact_deduplication"):
                said = content.messages if content.text is None else content.text
                # That an answer was cut is in its id alone.
                contents.append(content_id(said, content.tools) if content.answer is None else content.id)
            kept.append(place)
        for count, what in ((answers["empty"], "say nothing and are left out"), (answers["unfinished"], UNFINISHED)):
            if count:
                LOG.info(f"fusion: {count} of {len(dataset)} responses of {self._path} {what}")
        leave_out(unusable, len(dataset), self._block.on_unusable)
        if len(kept) < len(dataset):
            dataset = dataset.select(kept)
        dataset = dataset.add_column(NAME, names).add_column(ID, ids)
        return dataset.add_column(CONTENT, contents) if contents else dataset, unusable, answers

    def _with_first_ids(self, dataset: Any, routes: Routes) -> Any:
        """With axolotl's deduplication: a text under the id of the first row of the run that holds it, of one route.

        axolotl compares whole prepared rows. A row that refers to the stores holds its id, and two captures of one text
        may differ in the last bits.
        """
        if CONTENT not in dataset.column_names:
            return dataset
        columns = (dataset[name][:] for name in (CONTENT, ROUTE, ID))
        ids = [
            self._first_ids.setdefault((content, routes.distinct[route]), id)
            for content, route, id in zip(*columns, strict=True)
        ]
        return dataset.remove_columns([ID, CONTENT]).add_column(ID, ids)

    def _routed(self, dataset: Any, stores: list[Store]) -> tuple[Any, Routes]:
        """Return the rows that are used, with the numbers of their routes, and the routes."""
        columns = self._columns(dataset, columns_needed(self._block, dataset.column_names))
        answers = is_table_of_responses(dataset.column_names)
        given = [name for name in dataset.column_names if name not in (ID, NAME, CONTENT)]
        table = Table(self._path, dataset[ID][:], dataset[NAME][:], columns, answers, given)
        routes = make_routes(table, self._block, stores, self._base_model)
        dataset = dataset.add_column(ROUTE, routes.numbers.tolist())
        if routes.missing:
            LOG.warning(f"fusion: skipped {len(routes.missing)} of {len(dataset)} rows, which are missing in a store")
        for name, count in routes.without.items():
            LOG.warning(f"fusion: {count} of {len(dataset)} rows are taught without {name}, whose store lacks them")
        kept = np.flatnonzero(routes.numbers >= 0)
        return dataset if len(kept) == len(dataset) else dataset.select(kept), routes


def load(tokenizer: Any, cfg: Any, ds_cfg: Any = None) -> FusedStrategy:
    """Return the strategy that prepares one dataset.

    Raises:
        PluginError: the plugin is not configured or not loaded.
        ConfigError: the ``fusion:`` block or the entry of the dataset is wrong.
    """
    return FusedStrategy(tokenizer, cfg, ds_cfg or {}, require_plugin(cfg, FUSED))


def _with_template(tokenizer: Any, cfg: Any, entry: Any) -> Any:
    """Return the tokenizer with the chat template that the entry of the dataset names."""
    if not entry.get("chat_template") and not entry.get("chat_template_jinja"):
        return tokenizer
    from axolotl.utils.chat_templates import get_chat_template_from_config

    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = get_chat_template_from_config(cfg=cfg, ds_cfg=entry, tokenizer=tokenizer)
    return tokenizer


def _longer_than(rows: Any, length: int) -> int:
    """Return how many rows have more tokens; without making Python objects of the tokens."""
    parts = rows.select_columns("input_ids").with_format("arrow").iter(BATCH)
    return sum(int((pc.list_value_length(part["input_ids"]).to_numpy() > length).sum()) for part in parts)


def _counting_step(texts: int, stores: Sequence[Store]) -> int:
    """Return n where every n-th text is counted in the report."""
    per_text = max((store.manifest.tokens / max(1, len(store)) for store in stores), default=0.0)
    return math.ceil(texts / min(REPORTED, max(1.0, REPORTED_TOKENS / max(1.0, per_text))))


def _counted_part(by_reference: bool, counted: int, total: int, step: int) -> str:
    if by_reference:
        return f"fusion: the report counts {counted} of {total} texts; all are fused while training"
    return (
        f"fusion: the figures of each source are of one text in {step} where the rule takes one source per text; all "
        "others are of all texts"
    )
