"""From the ``fusion:`` block and the stores to core's plan, after checking that they belong together."""

from collections.abc import Iterable

import numpy as np

from fusion_plugins.axolotl.args import FusionBlock, SourceArgs
from fusion_plugins.axolotl.rows import TargetTokenizer
from fusion_plugins.core.align import ALIGNERS, align_texts
from fusion_plugins.core.counts import AlignmentCounts
from fusion_plugins.core.fuse import RULES
from fusion_plugins.core.pipeline import FusionPlan, SourcePlan
from fusion_plugins.core.token_table import Role
from fusion_plugins.core.types import TokenizedText, VocabularyMap
from fusion_plugins.errors import MismatchError
from fusion_plugins.plugins import lookup
from fusion_plugins.store import Store
from fusion_plugins.store.map_cache import cached_map

__all__ = ["make_plan"]

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
