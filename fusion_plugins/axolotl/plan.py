"""From the ``fusion:`` block and the stores to core's plan, after checking that they belong together."""

from collections.abc import Iterable

import numpy as np

from fusion_plugins.axolotl.args import FusionBlock, SourceArgs
from fusion_plugins.axolotl.rows import EncodedText, TargetTokenizer
from fusion_plugins.core.align import ALIGNERS, align_texts
from fusion_plugins.core.counts import AlignmentCounts
from fusion_plugins.core.fuse import RULES
from fusion_plugins.core.pipeline import FusionPlan, SourcePlan
from fusion_plugins.core.token_table import Role
from fusion_plugins.core.types import Record, TokenizedText, VocabularyMap
from fusion_plugins.errors import MismatchError
from fusion_plugins.plugins import lookup
from fusion_plugins.store import Store
from fusion_plugins.store.map_cache import cached_map

__all__ = ["check_text", "make_plan"]

#: (id, the target's tokens) of every text, for the maps that need statistics
Texts = Iterable[tuple[str, TokenizedText]]


def make_plan(block: FusionBlock, stores: list[Store], target: TargetTokenizer, texts: Texts) -> FusionPlan:
    """Return core's plan; ``texts`` is read only for ``vocabulary: statistics``.

    Raises:
        MismatchError: the store that is said to be the target's own has another tokenizer.
    """
    sources = tuple(
        SourcePlan(source.name, store.table, _vocabulary(block, source, store, target, texts))
        for source, store in zip(block.sources, stores, strict=True)
    )
    method = block.alignment.method
    return FusionPlan(
        target_table=target.table,
        sources=sources,
        rule=block.rule if block.rule in RULES else lookup("fusion_rules", block.rule),
        rule_options=block.rule_options,
        metric=block.metric,
        width=block.top_k,
        alignment=method if method in ALIGNERS else lookup("aligners", method),
        projection=block.alignment.projection(),
    )


def check_text(record: Record, store: Store, text: EncodedText) -> None:
    """Refuse a record of another text.

    Args:
        record: what the store holds under the text's id.
        store: where it comes from.
        text: the text in the target's tokens.

    Raises:
        MismatchError: the two texts differ.
    """
    spans = text.tokens.spans
    if len(record.spans) != len(spans):
        raise MismatchError(
            f"{store.path}: record {record.id!r} has {len(record.spans)} supervised piece(s), the data set's text of "
            f"that id has {len(spans)}. Capture the store again from the texts that you train on."
        )
    begins = np.concatenate([record.offsets[:1] * 0, record.offsets[:-1]])
    for (start, stop), (t_start, t_stop) in zip(record.spans.tolist(), spans.tolist(), strict=True):
        inside = np.flatnonzero((begins >= start) & (record.offsets <= stop) & (record.offsets > begins))
        if not inside.size or not record.exact[inside].all():
            continue
        widths = record.offsets[inside] - begins[inside]
        tokens = zip(record.input_ids[inside].tolist(), widths.tolist(), strict=True)
        found = b"".join(store.table.tokens[id][-width:] for id, width in tokens)
        offset = int(begins[inside[0]]) - start
        wanted = text.raw[t_start:t_stop][offset : offset + len(found)]
        if found != wanted:
            at = next((i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), len(wanted))
            raise MismatchError(
                f"{store.path}: record {record.id!r} is of another text than the data set's row of that id; at byte "
                f"{at} of a supervised piece the store has {found[at : at + 40]!r}, the data set "
                f"{wanted[at : at + 40]!r}. Capture the store again from the texts that you train on."
            )


def _vocabulary(
    block: FusionBlock, source: SourceArgs, store: Store, target: TargetTokenizer, texts: Texts
) -> VocabularyMap:
    same = store.table.fingerprint == target.table.fingerprint
    if source.is_target and not same:
        raise MismatchError(
            f"source {source.name!r} is said to be the target model's own (is_target: true), but the store "
            f"{store.path} was captured with tokenizer {store.table.fingerprint[:16]} ({store.manifest.model}), and "
            f"the target's is {target.table.fingerprint[:16]}. Capture it from `base_model`, or remove is_target."
        )
    # One vocabulary may end turns with other tokens in another template: those are mapped by role.
    turn_ends = {table.id_of_role(Role.END_OF_TURN) for table in (store.table, target.table)}
    if source.is_target or (same and len(turn_ends) == 1):
        ids = np.arange(store.table.vocab_size, dtype=np.int32)
        return VocabularyMap(ids, np.zeros_like(ids), "identity")
    method = block.alignment.vocabulary
    return cached_map(
        store.table,
        target.table,
        method=method,
        max_distance=block.alignment.max_distance,
        counts=_count(store, texts) if method == "statistics" else None,
        tokenizer=target.tokenizer,
    )


def _count(store: Store, texts: Texts) -> AlignmentCounts:
    counts = AlignmentCounts()
    for id, tokens in texts:
        record = store[id]
        alignment = align_texts(record, tokens)
        counts.add(record.input_ids.tolist(), tokens.input_ids.tolist(), alignment.target_to_source)
    return counts
