"""From the ``fusion:`` block and the stores to core's plan, after checking that they belong together."""

from collections.abc import Callable
from functools import partial

from fusion_plugins.axolotl.args import AlignmentArgs, FusionBlock, SourceArgs
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer
from fusion_plugins.core.fusion.align import ALIGNERS, Alignment, align_dtw
from fusion_plugins.core.fusion.counts import AlignmentCounts
from fusion_plugins.core.fusion.fuse import RULES
from fusion_plugins.core.fusion.pipeline import FusionPlan, SourcePlan
from fusion_plugins.core.fusion.types import VocabularyMap
from fusion_plugins.core.fusion.vocabulary_map import COUNTED, identity_map, same_ids
from fusion_plugins.errors import MismatchError
from fusion_plugins.map_cache import cached_map
from fusion_plugins.plugins import lookup
from fusion_plugins.store import Store

__all__ = ["make_plan"]

#: stores -> how often their tokens stand where the target's do, for the maps that need statistics
Count = Callable[[list[Store]], list[AlignmentCounts]]


def make_plan(block: FusionBlock, stores: list[Store], target: TargetTokenizer, count: Count) -> FusionPlan:
    """Return core's plan; ``count`` is called once at most, and only for maps that go by counts.

    Raises:
        MismatchError: the store that is said to be the target's own has another tokenizer.
    """
    same = [_same_tokens(source, store, target) for source, store in zip(block.sources, stores, strict=True)]
    mapped = [store for store, is_same in zip(stores, same, strict=True) if not is_same]
    counted = mapped and block.alignment.vocabulary in COUNTED
    counts = iter(count(mapped) if counted else [None] * len(mapped))
    return FusionPlan(
        target_table=target.table,
        sources=tuple(
            SourcePlan(
                source.name,
                store.table,
                identity_map(store.table) if is_same else _map(block, store, target, next(counts)),
            )
            for source, store, is_same in zip(block.sources, stores, same, strict=True)
        ),
        rule=block.rule if block.rule in RULES else lookup("fusion_rules", block.rule),
        rule_options=block.rule_options,
        metric=block.metric,
        width=block.top_k or max(store.manifest.top_k for store in stores),
        alignment=_aligner(block.alignment),
        projection=block.alignment.projection(),
        tie_order=block.alignment.tie_order,
    )


def _aligner(options: AlignmentArgs) -> str | Callable[..., Alignment]:
    if options.method == "dtw":
        return partial(align_dtw, band=options.band)
    aligner: str | Callable[..., Alignment] = options.method
    return aligner if aligner in ALIGNERS else lookup("aligners", options.method)


def _same_tokens(source: SourceArgs, store: Store, target: TargetTokenizer) -> bool:
    """Whether the source's ids are the target's: it is said to be the target's own, or they mean the same."""
    if source.is_target and not target.table.extends(store.table):
        raise MismatchError(
            f"source {source.name!r} is said to be the target model's own (is_target: true), but the store "
            f"{store.path} was captured with tokenizer {store.table.fingerprint[:16]} ({store.manifest.model}), and "
            f"the target's is {target.table.fingerprint[:16]}. A run may add tokens behind the others, but not have "
            "other tokens or other BOS and EOS tokens. Capture it from `base_model`, or remove is_target: its rows are "
            "then mapped."
        )
    return source.is_target or same_ids(store.table, target.table)


def _map(block: FusionBlock, store: Store, target: TargetTokenizer, counts: AlignmentCounts | None) -> VocabularyMap:
    return cached_map(
        store.table,
        target.table,
        method=block.alignment.vocabulary,
        max_distance=block.alignment.max_distance,
        counts=counts,
        tokenizer=target.tokenizer,
    )
