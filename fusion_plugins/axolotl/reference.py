"""The reference of InfiFPO as columns of the dataset: what the sources say about both answers of every pair.

The stores hold the responses as texts (`fusion capture --texts` of the scored folder). No reference model is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusion_plugins.axolotl.plan import same_tokens
from fusion_plugins.axolotl.preference_rows import Unusable, pair_name
from fusion_plugins.axolotl.response_args import ReferenceArgs
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer
from fusion_plugins.checkpoint_fingerprint import weights_revision
from fusion_plugins.core.fusion.answers import answer_logprob
from fusion_plugins.core.preferences.candidates import Candidate, Pair, answer_id
from fusion_plugins.core.preferences.losses import fused_reference
from fusion_plugins.core.text.finish_reason import is_cut
from fusion_plugins.errors import MismatchError
from fusion_plugins.store import Store, open_store

#: pairs that an error names
_SHOWN = 3


@dataclass(frozen=True)
class Reference:
    """What the sources say about some pairs.

    Attributes:
        pairs: the pairs that every source has.
        values: (P, 2) mean log-probability per token of the chosen and of the rejected answer, nats.
        missing: the pairs that a store lacks.
    """

    pairs: list[Pair]
    values: npt.NDArray[np.float64]
    missing: list[Unusable]


def make_reference(
    pairs: Sequence[Pair], settings: ReferenceArgs, target: TargetTokenizer, base_model: str, on_missing: str
) -> Reference:
    """Look up both answers of every pair in every store, and fuse what the sources say.

    Args:
        pairs: the pairs.
        settings: the stores and the rule.
        target: the tokenizer of the model that is trained.
        base_model: that model.
        on_missing: ``raise`` or ``skip`` pairs that a store lacks.

    Raises:
        MismatchError: a store lacks a pair, or the target's own store is of another model.
    """
    stores = [open_store(source.store) for source in settings.sources]
    for source, store in zip(settings.sources, stores, strict=True):
        same_tokens(source, store, target)
        if source.is_target:
            _check_model(store, base_model)
    found = [(pair, _both(pair, stores)) for pair in pairs]
    missing = [Unusable(pair_name(pair), which) for pair, which in found if isinstance(which, str)]
    if missing and (on_missing == "raise" or len(missing) == len(pairs)):
        named = "; ".join(f"{each.row}: {each.reason}" for each in missing[:_SHOWN])
        raise MismatchError(
            f"{len(missing)} of {len(pairs)} pairs are not in every store of fusion.reference. {named}. Capture the "
            "responses that this run reads (`fusion capture --texts`), with every source and with base_model"
            + (", or train without them with fusion.on_missing_text: skip." if on_missing == "raise" else ".")
        )
    kept = [(pair, values) for pair, values in found if not isinstance(values, str)]
    values = np.array([values for _, values in kept], np.float64).transpose(1, 0, 2)  # (S, P, 2)
    own = [source.is_target for source in settings.sources]
    target_values = values[own.index(True)] if any(own) else None
    # The target is what the others are held against; alone it is the reference, and the loss is DPO's.
    others = values[~np.array(own)] if not all(own) else values
    fused = fused_reference(others, target_values, rule=settings.rule, clip=settings.clip)
    return Reference([pair for pair, _ in kept], fused, missing)


def _both(pair: Pair, stores: Sequence[Store]) -> list[list[float]] | str:
    """Return (S, 2) mean log-probabilities per token, or which store lacks an answer."""
    values = []
    for store in stores:
        means = [_mean(answer, store) for answer in (pair.chosen, pair.rejected)]
        if None in means:
            side = ("chosen", "rejected")[means.index(None)]
            answer = (pair.chosen, pair.rejected)[means.index(None)]
            return f"{store.path} has no record of the {side} answer{_other_text(answer)}"
        values.append([mean for mean in means if mean is not None])
    return values


def _other_text(answer: Candidate) -> str:
    """Return why `fusion capture` of the folder itself gives this answer another id than a pair needs."""
    other = []
    if answer.extra.get("system"):
        other.append("it was sampled with a system prompt")
    if is_cut(answer.extra.get("finish_reason")):
        other.append("it was cut")
    # The trained model sees neither, so the sources must not either.
    return f" ({' and '.join(other)}: capture the file of fusion.pairs.texts in its place)" if other else ""


def _mean(answer: Candidate, store: Store) -> float | None:
    record = store.get(answer_id(answer))
    if record is None:
        return None
    total, tokens = answer_logprob(record, store.table)
    return total / tokens if tokens else None


def _check_model(store: Store, base_model: str) -> None:
    """Refuse a store of another checkpoint than the one that is trained, as far as both are known by their weights."""
    weights, known = weights_revision(base_model), store.manifest.revision or ""
    if weights and known.startswith("weights:") and known != weights:
        raise MismatchError(
            f"{store.path} is marked as the target's own (is_target: true), but was captured from "
            f"{store.manifest.model} with other weights ({known}) than base_model {base_model} has ({weights}). "
            "Capture the responses from base_model, the model that this stage starts from."
        )
