"""How often source and target tokens are aligned over a dataset, for the vocabulary maps that go by counts."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from datasets import Features, List, Value

from fusion_plugins.core.fusion.align import align_texts
from fusion_plugins.core.fusion.common_text import common_text
from fusion_plugins.core.fusion.counts import AlignmentCounts
from fusion_plugins.core.text.token_bytes import TokenBytes
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, MismatchError
from fusion_plugins.store import Store

Row = Mapping[str, Any]
Read = Callable[[Row], tuple[str, TokenizedText] | None]

#: texts whose counts are handed back together
BATCH = 1000
FEATURES = Features(
    {
        "store": Value("int32"),
        "source_ids": List(Value("int32")),
        "target_ids": List(Value("int32")),
        "counts": List(Value("int64")),
    }
)


def count_alignments(
    dataset: Any,
    read: Read,
    target_bytes: TokenBytes,
    stores: list[Store],
    *,
    process_count: int | None,
    strict: bool = True,
) -> list[AlignmentCounts]:
    """Count over the rows of a dataset, in ``process_count`` processes.

    Args:
        dataset: rows; those that a store lacks are not counted for it.
        read: row -> its id and the target's tokens; None for a row that is left out.
        target_bytes: the target's vocabulary.
        stores: the sources.
        process_count: as for ``dataset.map``.
        strict: whether a row that was captured from another text is an error; it is left out otherwise.

    Raises:
        MismatchError: a store was captured from other texts.
    """
    parts = dataset.map(
        _Count(read, target_bytes, stores, strict),
        batched=True,
        batch_size=BATCH,
        num_proc=process_count,
        remove_columns=dataset.column_names,
        features=FEATURES,
        load_from_cache_file=False,
        desc="Counting aligned tokens",
    )
    counts = [AlignmentCounts() for _ in stores]
    for part in parts:
        counts[part["store"]].merge(AlignmentCounts.from_pairs(part["source_ids"], part["target_ids"], part["counts"]))
    return counts


def count_texts(
    texts: Iterable[tuple[str, TokenizedText]],
    target_bytes: TokenBytes,
    stores: list[Store],
    *,
    strict: bool = True,
) -> list[AlignmentCounts]:
    """Count over texts, given by id and in the target's tokens; see :func:`count_alignments`."""
    counts = [AlignmentCounts() for _ in stores]
    source_bytes = [store.table.packed for store in stores]
    for id, tokens in texts:
        for store, own_bytes, found in zip(stores, source_bytes, counts, strict=True):
            said = store.get(id)
            if said is None:  # a text that other sources teach
                continue
            try:
                # What only one side's template or maximum length left out is not counted.
                record, text = common_text(said, tokens, own_bytes, target_bytes)
            except AlignmentError as error:
                if not strict:
                    continue
                raise MismatchError(f"{store.path}: {error}") from error
            matched = align_texts(record.text, text).target_to_source
            found.add(record.text.input_ids.tolist(), text.input_ids.tolist(), matched)
    return counts


def rows_of(batch: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Return the rows of a batch of columns."""
    names = list(batch)
    return [dict(zip(names, values, strict=True)) for values in zip(*(batch[name] for name in names), strict=True)]


class _Count:
    """What runs in each worker: a batch of rows in, one row of counts per store out."""

    def __init__(self, read: Read, target_bytes: TokenBytes, stores: list[Store], strict: bool) -> None:
        self._read, self._target_bytes, self._stores, self._strict = read, target_bytes, stores, strict

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        texts = (text for text in map(self._read, rows_of(batch)) if text is not None)
        counts = count_texts(texts, self._target_bytes, self._stores, strict=self._strict)
        source_ids, target_ids, numbers = zip(*(found.pairs() for found in counts), strict=True)
        return {
            "store": list(range(len(counts))),
            "source_ids": list(source_ids),
            "target_ids": list(target_ids),
            "counts": list(numbers),
        }
