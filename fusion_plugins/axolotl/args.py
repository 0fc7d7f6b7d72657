"""The ``fusion:`` block of an axolotl configuration.

:class:`FusionArgs` is what axolotl mixes into its own schema. All our settings are inside the one nested block, so that
an unknown key there is an error: axolotl drops unknown keys of its own level silently.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, field_serializer, field_validator, model_validator

from fusion_plugins.axolotl.block_settings import BlockSettings
from fusion_plugins.axolotl.response_args import PairArgs, ReferenceArgs, SftArgs, SplitArgs, WRPOArgs
from fusion_plugins.axolotl.source_args import (
    AlignmentArgs,
    FusedSourceArgs,
    ProjectionArgs,
    RuleArgs,
    problems_of_names,
)
from fusion_plugins.config import validate
from fusion_plugins.errors import ConfigError
from fusion_plugins.where import Where, checked_where

#: keys of the block that say how distributions are fused
FOR_SOURCES = frozenset(
    {
        *("on_missing_text", "on_no_source", "prepared", "own_source", "where", "alignment", "projection", "top_k"),
        *("rule", "rule_options", "rule_by_domain", "weights_from", "metric"),
        *("loss", "loss_options", "lm_loss_weight", "lm_loss_schedule", "temperature", "loss_chunk"),
    }
)
#: keys of the block that say which scored responses are used
FOR_RESPONSES = frozenset(
    {"pairs", "sft", "split", "keep_truncated", "leave_out_sources", "min_trust", "wrpo", "reference"}
)


class FusionBlock(BlockSettings):
    """Everything under ``fusion:``."""

    MOVED = {"missing_texts": "now fusion.on_missing_text, with the values raise (was: stop) and skip (was: drop)"}

    sources: list[FusedSourceArgs] = Field(
        default_factory=list, description="source models, for datasets of type fusion_plugins.axolotl.fused"
    )
    where: Where | None = Field(
        default=None,
        description="of fused datasets, column -> a value, a list of values, or {min, max}: only rows that meet all "
        "conditions are used; verdict is correct, incorrect or unknown, and trust is inside for one that a program can "
        "forge, else outside",
    )
    own_source: str | None = Field(
        default=None,
        description="source of a folder of responses whose answers are the target's own; besides it, the answers of "
        "base_model and of the source with is_target are",
    )
    on_missing_text: Literal["raise", "skip", "skip_source"] = Field(
        default="raise",
        description="rows of the dataset that the store of a source which teaches them lacks: stop with an error, "
        "train without the row, or teach it without the source",
    )
    on_no_source: Literal["raise", "skip", "lm_loss"] = Field(
        default="raise",
        description="rows that no source teaches: stop with an error, leave them out, or train on them with the "
        "language-model loss alone",
    )
    on_unusable: Literal["raise", "skip"] = Field(
        default="raise",
        description="a row that cannot be used, for example because the chat template refuses it: stop with an error "
        "that names it, or leave it out; the report names what was left out",
    )
    prepared: Literal["rows", "stores"] = Field(
        default="rows",
        description="what a prepared dataset holds. rows: the fused distributions; stores: only which text of the "
        "stores a row is. The loader then fuses while the model trains, and another rule, map or top_k needs no new "
        "preparation",
    )
    alignment: AlignmentArgs = Field(
        default_factory=AlignmentArgs, description="which source position belongs to which target position"
    )
    projection: ProjectionArgs = Field(
        default_factory=ProjectionArgs, description="how distributions reach the target's vocabulary"
    )
    rule: str = Field(
        default="min_ce", description="min_ce, avg_ce, token_min_ce, fixed_weights, or a registered fusion rule"
    )
    rule_options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the rule")
    rule_by_domain: dict[str, RuleArgs] = Field(
        default_factory=dict,
        description="domain -> the rule of its texts, or {rule, rule_options}, in place of rule and rule_options",
    )
    weights_from: str | None = Field(
        default=None,
        description="folder of scored responses: the weight of a source in a domain, for the rule fixed_weights, is "
        "how likely its answers there are right by the verdicts, (right + 1) / (judged + 2); none for the weights of "
        "the sources",
    )
    metric: Literal["byte", "token"] = Field(
        default="byte", description="cross-entropy per byte of the text, or per token of the source (FuseLLM's code)"
    )
    top_k: int | None = Field(
        default=None, ge=1, description="entries kept per fused distribution; none for as many as the stores hold"
    )
    loss: str = Field(
        default="ce",
        description="ce, kl, reverse_kl, jsd, advantage (for the target's own answers), or a registered loss",
    )
    loss_options: dict[str, Any] = Field(
        default_factory=dict,
        description="keyword arguments of the loss. jsd: beta (0.5), from 0, forward KL, to 1, reverse KL. advantage: "
        "clip (10), the largest advantage in nats, and ratio_clip (0.2), how far the importance ratio may be above 1, "
        "null for a ratio of 1",
    )
    lm_loss_weight: float = Field(
        default=0.9, ge=0, le=1, description="weight of the language-model loss; the fusion loss has the rest"
    )
    lm_loss_schedule: Literal["constant", "rise"] = Field(
        default="constant",
        description="rise: lm_loss_weight rises linearly to 1 while training, so the fusion loss fades out (FuseLLM's "
        "code); an evaluation always uses lm_loss_weight itself",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="softens the fused distributions, not the trained model's"
    )
    loss_chunk: int | None = Field(
        default=None,
        ge=1,
        description="positions whose logits are held at once; none for as many as 2**28 logits allow, in multiples of "
        "128. Fewer take less memory and more time",
    )
    pairs: PairArgs | None = Field(
        default=None, description="rules of preference pairs; those of FuseChat-3.0 if absent"
    )
    sft: SftArgs | None = Field(default=None, description="rule of the best answer; that of FuseChat-3.0 if absent")
    keep_truncated: bool = Field(
        default=False,
        description="use responses that were cut: by the length limit or an interruption (finish_reason length, abort)",
    )
    leave_out_sources: list[str] = Field(
        default_factory=list,
        description="sources of scored responses that are not trained on, such as those that `fusion doctor` finds to "
        "be worse than the target",
    )
    min_trust: Literal["inside", "outside"] = Field(
        default="inside",
        description="which verdicts count. outside: not those that say `trust: inside` in the scores, which a program "
        "can forge; such a response has none. inside: all. Also of weights_from; a dataset of answers has "
        "where: {trust: outside} for it",
    )
    split: SplitArgs | None = Field(default=None, description="division of the prompts between SFT and DPO")
    wrpo: WRPOArgs | None = Field(
        default=None, description="loss of trainer_cls: fusion_plugins.axolotl.preference_trainers.WRPOTrainer"
    )
    reference: ReferenceArgs | None = Field(
        default=None,
        description="the sources as reference, for trainer_cls: "
        "fusion_plugins.axolotl.preference_trainers.InfiFPOTrainer",
    )

    _check_where = field_validator("where")(checked_where)

    @field_validator("rule_by_domain", mode="before")
    @classmethod
    def _read_rules(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {domain: {"rule": rule} if isinstance(rule, str) else rule for domain, rule in value.items()}

    @field_validator("lm_loss_schedule", mode="before")
    @classmethod
    def _refuse_decay(cls, value: Any) -> Any:
        if value == "decay":
            raise ValueError("expected constant or rise; decay is now called rise")
        return value

    @model_validator(mode="after")
    def _together(self) -> "FusionBlock":
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        yield from problems_of_names(self.sources)
        for source in self.sources:
            yield from source.problems()
        yield from self._problems_of_weights()
        if self.on_no_source == "lm_loss" and self.lm_loss_weight == 0 and self.lm_loss_schedule == "constant":
            yield (
                "on_no_source: lm_loss trains on texts without a source with the language-model loss, and "
                "lm_loss_weight is 0: they would teach nothing; give it a weight, or set on_no_source: skip"
            )
        if self.reference is not None:
            yield from (f"reference: {problem}" for problem in self.reference.problems())
        divided_by = self.split.pairs if self.split is not None else None
        for key, pairs in (("pairs", self.pairs), ("split.pairs", divided_by)):
            if pairs is not None:
                yield from (f"{key}: {problem}" for problem in pairs.problems())
        if not self.sources and self.pairs is None and self.sft is None and self.split is None:
            yield "nothing to do: give sources (type fusion_plugins.axolotl.fused), sft or pairs"

    @property
    def rules(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Key of the block -> rule and options, of the rule of all texts and those of domains."""
        own = {
            f"rule_by_domain.{domain}": (rule.rule, rule.rule_options) for domain, rule in self.rule_by_domain.items()
        }
        return {"rule": (self.rule, self.rule_options), **own}

    def _problems_of_weights(self) -> Iterator[str]:
        weighs = any(rule == "fixed_weights" for rule, _ in self.rules.values())
        given = [source.name for source in self.sources if source.weight != 1 or source.weight_by_domain]
        if (given or self.weights_from) and not weighs:
            yield "weight, weight_by_domain and weights_from are for the rule fixed_weights; set it, or remove them"
        if given and self.weights_from:
            yield f"weights_from measures the weights of all sources, and {given[0]!r} has one already; remove one"
        if any(rule == "fixed_weights" and "weights" in options for rule, options in self.rules.values()):
            yield "rule_options.weights: the sources differ from text to text; give each entry of sources a weight"


class FusionArgs(BaseModel):
    """What axolotl mixes into its configuration schema."""

    fusion: FusionBlock | None = Field(default=None, description="LLM fusion; see docs/axolotl.md of fusion_plugins")

    @field_serializer("fusion")
    def _keep_null(self, block: FusionBlock | None) -> dict[str, Any] | None:
        """Axolotl leaves out every null when it writes its configuration, and with them those that mean something."""
        return None if block is None else block.model_dump()


def fusion_block(cfg: Any) -> FusionBlock:
    """Return the checked ``fusion:`` block of an axolotl configuration, raw or validated.

    Raises:
        ConfigError: the block is missing, or wrong; every wrong key is named.
    """
    block = cfg.get("fusion")
    if block is None:
        raise ConfigError(
            "the plugin fusion_plugins.axolotl.FusionPlugin is configured, but there is no `fusion:` block: nothing "
            "would be fused. Add the block, or remove the plugin."
        )
    if not isinstance(block, dict):
        raise ConfigError(f"fusion: expected a mapping of settings, got {type(block).__name__}. See docs/axolotl.md.")
    return validate(FusionBlock, block.to_dict() if hasattr(block, "to_dict") else block, where="fusion")
