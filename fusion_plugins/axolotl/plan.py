"""The ``fusion:`` block and the stores -> core's fusion plan, after checking that they belong together.

Every name of the configuration is resolved here; core gets functions and prepared objects.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.source_args import SourceArgs
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer
from fusion_plugins.core.fusion.align import TextAligner, align_by_tokens, align_dtw, align_texts
from fusion_plugins.core.fusion.counts import AlignmentCounts
from fusion_plugins.core.fusion.pipeline import METRICS, FusionPlan, FusionSource
from fusion_plugins.core.fusion.project import Projector
from fusion_plugins.core.fusion.vocabulary_map import COUNTED, identity_map, same_ids
from fusion_plugins.core.preferences.verdict import as_verdict, may_be_forged
from fusion_plugins.errors import ConfigError, MismatchError
from fusion_plugins.map_cache import cached_map
from fusion_plugins.plugins import lookup
from fusion_plugins.store import Store, open_rows
from fusion_plugins.where import value_of

#: stores -> how often their tokens are aligned with the target's, for the maps that need counts
Count = Callable[[list[Store]], list[AlignmentCounts]]
#: measured weight of a source in a domain where none of its answers has a verdict, by the same formula
UNJUDGED = 1 / 2


def make_plan(block: FusionBlock, stores: list[Store], target: TargetTokenizer, count: Count) -> FusionPlan:
    """Return core's plan.

    Args:
        block: the settings.
        stores: one per source, in the order of the block.
        target: the target's tokenizer.
        count: called once at most, and only for maps that go by counts.

    Raises:
        MismatchError: the store that is marked as the target's own has another tokenizer.
        PluginError: no rule or aligner of that name is registered.
    """
    options = block.projection
    identical = [same_tokens(source, store, target) for source, store in zip(block.sources, stores, strict=True)]
    mapped = [store for store, same in zip(stores, identical, strict=True) if not same]
    counts = iter(count(mapped) if mapped and options.vocabulary_map in COUNTED else [None] * len(mapped))
    names = [source.name for source in block.sources]
    measured = None
    if block.weights_from is not None:
        measured = measured_weights(block.weights_from, names, sure=block.min_trust == "outside")
    sources = []
    for source, store, same in zip(block.sources, stores, identical, strict=True):
        vocabulary = (
            identity_map(store.table)
            if same
            else cached_map(
                store.table,
                target.table,
                method=options.vocabulary_map,
                max_distance=options.max_distance,
                counts=next(counts),
                tokenizer=target.tokenizer,
            )
        )
        projector = Projector.of(store.table, target.table, vocabulary, options.options())
        weights = source.weight_by_domain if measured is None else measured[source.name]
        weight = source.weight if measured is None else UNJUDGED
        sources.append(FusionSource(source.name, projector, _text_aligner(block, projector), weight, weights))
    rules = {
        domain: (lookup("fusion_rules", own.rule), own.rule_options) for domain, own in block.rule_by_domain.items()
    }
    return FusionPlan(
        sources=tuple(sources),
        rule=lookup("fusion_rules", block.rule),
        rule_options=block.rule_options,
        metric=METRICS[block.metric],
        width=block.top_k or max(store.manifest.top_k for store in stores),
        label_fallback=options.fallback == "next_label",
        rules=rules,
    )


def measured_weights(folder: str, names: Sequence[str], *, sure: bool = False) -> dict[str, dict[str, float]]:
    """Return source -> domain -> how likely its answers there are right, by the verdicts of scored responses.

    The domain "" is that of texts without a column for it: there, the answers of all domains count.

    Args:
        folder: of scored responses.
        names: the sources.
        sure: whether only verdicts count that no program can forge.

    Raises:
        ConfigError: a source has no answer with a verdict.
        StoreError: the folder is damaged.
        DataError: a verdict is none.
    """
    right: Counter[tuple[str, str]] = Counter()
    judged: Counter[tuple[str, str]] = Counter()
    for row in open_rows(folder):
        verdict = as_verdict(row.get("correct"))
        if verdict is None or row.get("source") not in names or (sure and may_be_forged(row.get("scores"))):
            continue
        for domain in (str(value_of("domain", row)), ""):
            judged[row["source"], domain] += 1
            right[row["source"], domain] += verdict
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for name, domain in sorted(judged):
        found[name][domain] = (right[name, domain] + 1) / (judged[name, domain] + 2)
    if unjudged := [name for name, weights in found.items() if not weights]:
        which = "a verdict that no program can forge (min_trust: outside)" if sure else "a verdict"
        raise ConfigError(
            f"fusion.weights_from: expected answers with {which} of every source in {folder}, got none of "
            f"{', '.join(unjudged)}. The names must be those under which the responses were sampled; score them, or "
            "give weights."
        )
    return found


def _text_aligner(block: FusionBlock, projector: Projector) -> TextAligner:
    method = block.alignment.method
    # Stores hold the ends of the tokens, so these two need not look at the tokens at all.
    if method in ("offsets", "offsets_strict"):
        return partial(align_texts, strict=method == "offsets_strict")
    aligner = lookup("aligners", method)
    if method == "dtw":
        aligner = partial(align_dtw, tie_order=block.alignment.tie_order)
    return align_by_tokens(aligner, projector.source_bytes, projector.target_bytes)


def same_tokens(source: SourceArgs, store: Store, target: TargetTokenizer) -> bool:
    """Whether the source's ids mean the same to the target: it is marked as the target's own, or needs no map."""
    if source.is_target and not target.table.extends(store.table):
        raise MismatchError(
            f"source {source.name!r} is marked as the target model's own (is_target: true), but the store "
            f"{store.path} was captured with tokenizer {store.table.fingerprint[:16]} ({store.manifest.model}), and "
            f"the target's is {target.table.fingerprint[:16]}. A run may add tokens after the others, but not have "
            "other tokens or other BOS and EOS tokens. Capture it from `base_model`, or remove is_target: its "
            "distributions are then mapped."
        )
    return source.is_target or same_ids(store.table, target.table)
