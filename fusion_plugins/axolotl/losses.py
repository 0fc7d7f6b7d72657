"""Which trainer a preference run has, and which settings belong to it; every other combination is refused by name."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.core.preferences.losses import PAIR_LOSSES

_TRAINERS = "fusion_plugins.axolotl.preference_trainers"
WRPO, INFIFPO, FUSEPO = (f"{_TRAINERS}.{name}Trainer" for name in ("WRPO", "InfiFPO", "FusePO"))
#: `rl` of axolotl -> the trainer, as `trainer_cls`, that takes pairs as they are tokenized
PAIR_TRAINERS = {
    "dpo": f"{_TRAINERS}.TokenizedDPOTrainer",
    "ipo": f"{_TRAINERS}.TokenizedDPOTrainer",
    "simpo": f"{_TRAINERS}.TokenizedCPOTrainer",
    "orpo": f"{_TRAINERS}.TokenizedORPOTrainer",
}
#: a trainer with a loss that TRL lacks -> the `rl` with which axolotl builds it
OWN_TRAINERS = {WRPO: ("dpo",), INFIFPO: ("dpo", "ipo"), FUSEPO: ("dpo", "ipo")}

_LIGER = {"dpo_use_liger_kernel": "the kernel has TRL's loss alone"}
_WEIGHING = {"dpo_use_weighting": "the trainer has a loss of its own"}
#: trainer -> axolotl's settings that it would ignore -> why
_REFUSED: Mapping[str, Mapping[str, str]] = {
    WRPO: _LIGER
    | _WEIGHING
    | {
        "dpo_loss_weights": "there is one loss",
        "precompute_ref_log_probs": "the reference of three answers is computed with them",
    },
    INFIFPO: _LIGER | {"rl_adapter_ref_model": "the reference is in the dataset"},
    FUSEPO: _LIGER | _WEIGHING | {"dpo_label_smoothing": "TRL's losses have none either, except robust"},
}


def problems_of_losses(cfg: Any, block: FusionBlock, *, pairs: bool, all_pairs: bool) -> Iterator[str]:
    """Yield what does not belong together: trainer, pairs, and settings of one loss.

    Args:
        cfg: the raw configuration.
        block: its ``fusion:`` block.
        pairs: a dataset of the run has our pairs.
        all_pairs: all of them have.
    """
    trainer = str(cfg.get("trainer_cls") or "")
    own = trainer if pairs else ""
    for key, given, needed in (
        ("fusion.wrpo", block.wrpo is not None, WRPO),
        ("fusion.reference", block.reference is not None, INFIFPO),
        ("fusion.pairs.weighted", pairs and block.pairs is not None and block.pairs.weighted, FUSEPO),
    ):
        if given and own != needed:
            rl = " or ".join(OWN_TRAINERS[needed])
            yield (
                f"{key} is for `rl: {rl}` and `trainer_cls: {needed}` alone, got {trainer or 'none'}; set that, "
                f"or remove {key}"
            )
    if own not in OWN_TRAINERS:
        return
    if cfg.get("rl") not in OWN_TRAINERS[own]:
        yield f"trainer_cls: {own} needs `rl: {' or '.join(OWN_TRAINERS[own])}`, got {cfg.get('rl')!r}; correct it"
    if not all_pairs:
        yield f"trainer_cls: {own} needs the columns of our pairs, which another dataset of the run lacks; remove it"
    yield from _needs(own, block)
    for key, why in _REFUSED[own].items():
        if cfg.get(key):
            yield f"{key} cannot be combined with trainer_cls: {own}: {why}; remove it"
    known = {WRPO: {"sigmoid"}, FUSEPO: {*PAIR_LOSSES}}.get(own)
    for name in _listed(cfg.get("dpo_loss_type")):
        if known is not None and name not in known:
            yield f"dpo_loss_type: expected one of {', '.join(sorted(known))} with trainer_cls: {own}, got {name!r}"


def _needs(trainer: str, block: FusionBlock) -> Iterator[str]:
    """Yield what the block lacks for a trainer."""
    rule = block.pairs.rule if block.pairs else "same_source"
    if trainer == WRPO and rule != "own_answers":
        yield f"trainer_cls: {WRPO} needs pairs of the target itself, fusion.pairs.rule: own_answers; got {rule}"
    if trainer == INFIFPO and block.reference is None:
        yield f"trainer_cls: {INFIFPO} needs fusion.reference, the stores of the sources and of the target"
    if trainer == FUSEPO and not (block.pairs and block.pairs.weighted):
        yield f"trainer_cls: {FUSEPO} needs fusion.pairs.weighted: true and per_prompt: all, a pair of every source"


def _listed(value: Any) -> Sequence[str]:
    return [value] if isinstance(value, str) else list(value or [])
