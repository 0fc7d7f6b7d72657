"""The ``fusion:`` block of an axolotl configuration.

:class:`FusionArgs` is what axolotl mixes into its own schema. All our settings are inside the one nested block, so that
an unknown key there is an error: axolotl drops unknown keys of its own level silently.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, field_serializer, field_validator, model_validator

from fusion_plugins.config import Settings, validate
from fusion_plugins.core.fusion.project import ProjectionOptions
from fusion_plugins.core.preferences.pairs import GapWindow
from fusion_plugins.core.preferences.split import SplitRule
from fusion_plugins.errors import ConfigError
from fusion_plugins.where import Where, checked_where

#: keys of the block that say how distributions are fused
FOR_SOURCES = frozenset(
    {
        *("on_missing_text", "prepared", "alignment", "projection", "rule", "rule_options", "metric", "top_k", "loss"),
        "loss_options",
        *("lm_loss_weight", "lm_loss_schedule", "temperature", "loss_chunk"),
        *("where", "on_no_source", "own_source", "rule_by_domain", "weights_from"),
    }
)
#: keys of the block that say which scored responses are used
FOR_RESPONSES = frozenset(
    {"pairs", "sft", "split", "keep_truncated", "leave_out_sources", "min_trust", "wrpo", "reference"}
)


class BlockSettings(Settings):
    """A group of settings of the block.

    The word ``none`` is the null of a command line. A truth value is no number: an option that lacks its value is true.
    """

    @model_validator(mode="before")
    @classmethod
    def _read_words(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        types = {name: {field.annotation, *get_args(field.annotation)} for name, field in cls.model_fields.items()}
        for key, value in values.items():
            if isinstance(value, bool) and types.get(key, set()) & {int, float}:
                raise ValueError(f"{key}: expected a number, got {str(value).lower()}")
        return {
            key: None if value == "none" and NoneType in types.get(key, ()) else value for key, value in values.items()
        }


class SourceArgs(BlockSettings):
    """One source model: a name for reports and the store that `fusion capture` made of it."""

    name: str = Field(min_length=1, description="name in reports and logs; unique")
    store: str = Field(min_length=1, description="folder of the source's store")
    is_target: bool = Field(
        default=False,
        description="the store is the target model's own; then another tokenizer is an error (equal tokenizers need no "
        "vocabulary map in any case)",
    )


class FusedSourceArgs(SourceArgs):
    """One source of fused distributions, and which texts it teaches."""

    domains: list[str] | None = Field(
        default=None,
        description="values of the column domain: the source takes part in these texts alone; none for all",
    )
    where: Where | None = Field(
        default=None,
        description="column -> a value, a list of values, or {min, max}: the source takes part in the texts that meet "
        "all conditions; none for all",
    )
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="weight in the rule fixed_weights")
    weight_by_domain: dict[str, float] = Field(
        default_factory=dict, description="domain -> weight there, in place of weight"
    )

    _check_where = field_validator("where")(checked_where)

    @field_validator("weight_by_domain")
    @classmethod
    def _check_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        if wrong := [domain for domain, weight in weights.items() if not 0 <= weight < math.inf]:
            raise ValueError(f"{wrong[0]}: expected a weight that is not negative, got {weights[wrong[0]]}")
        return weights

    @property
    def conditions(self) -> Where:
        """All conditions of the texts that the source takes part in."""
        return {**(self.where or {}), **({} if self.domains is None else {"domain": self.domains})}

    def problems(self) -> Iterator[str]:
        """Yield what does not belong together."""
        if self.domains is not None and not self.domains:
            yield f"source {self.name!r}: domains is empty, so the source would teach nothing; name some, or remove it"
        if self.domains is not None and "domain" in (self.where or {}):
            yield f"source {self.name!r}: domains and where.domain are two conditions on one column; give one of them"


class RuleArgs(BlockSettings):
    """The fusion rule of one domain."""

    rule: str = Field(min_length=1, description="name of the rule")
    rule_options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the rule")


class AlignmentArgs(BlockSettings):
    """Which source position belongs to which target position."""

    MOVED = {
        "band": "gone: dtw always computes the whole matrix",
        "vocabulary": "now fusion.projection.vocabulary_map",
        "max_distance": "now fusion.projection.max_distance",
        "chain": "now fusion.projection.chain",
        "tail": "now fusion.projection.tail",
        "min_mass": "now fusion.projection.min_mass",
        "fallback": "now fusion.projection.fallback",
    }

    method: str = Field(
        default="offsets",
        description="offsets (positions that have read the same bytes), offsets_strict (and whose next tokens end at "
        "the same byte), dtw (FuseLLM's code), or a registered aligner",
    )
    tie_order: Literal["fusellm", "fusechat"] = Field(
        default="fusellm", description="which of equally cheap paths dtw takes: that of FuseLLM's or FuseChat's code"
    )


class ProjectionArgs(BlockSettings):
    """How a source's distributions become distributions over the target's vocabulary."""

    MOVED = {"vocabulary": "now vocabulary_map"}

    vocabulary_map: Literal["first_token", "min_edit", "exact", "statistics", "one_to_many"] = Field(
        default="first_token",
        description="source token -> target token. first_token: the first token of the target's own encoding; "
        "min_edit: the nearest by edit distance (FuseLLM); exact: equal bytes only; statistics: the token most often "
        "aligned with it (FuseChat); one_to_many: all tokens aligned with it, in proportion to the counts",
    )
    max_distance: int | None = Field(
        default=None,
        ge=0,
        description="largest edit distance of a mapped pair, in bytes; none for no limit",
    )
    chain: bool = Field(
        default=True,
        description="where source and target split the text differently, give the next token the probability that the "
        "source gave to its bytes",
    )
    tail: Literal["renormalize", "bucket"] = Field(
        default="renormalize",
        description="probability that no entry holds after projection (leftover). renormalize: scale the entries to "
        "sum to 1; bucket: keep their true probabilities (reverse_kl and jsd count the rest as one entry, ce and kl "
        "ignore it)",
    )
    min_mass: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="positions that keep less than this share of the stored probability are not used",
    )
    fallback: Literal["mask", "next_label"] = Field(
        default="mask",
        description="positions without a distribution: teach nothing, or probability 1 on the next token (FuseChat)",
    )

    @field_validator("tail", mode="before")
    @classmethod
    def _refuse_ignore(cls, value: Any) -> Any:
        if value == "ignore":
            raise ValueError("expected renormalize or bucket; ignore is now called bucket")
        return value

    def options(self) -> ProjectionOptions:
        """Return the options in core's form."""
        return ProjectionOptions(chain=self.chain, renormalize=self.tail == "renormalize", min_mass=self.min_mass)


class PairArgs(BlockSettings):
    """Which preference pairs `fusion_plugins.multi_source_dpo` builds."""

    rule: str = Field(
        default="same_source",
        description="same_source, across_sources, verdict, own_answers (of the target itself; needs own_source), or a "
        "registered pair rule",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the rule")
    min_gap: float | None = Field(default=0.01, description="smallest reward gap, inclusive; none for no limit")
    max_gap: float | None = Field(default=0.1, description="largest reward gap, inclusive; none for no limit")
    gap_unit: Literal["reward", "quantile"] = Field(
        default="reward",
        description="limits are rewards (of ArmoRM, as in FuseChat-3.0), or quantiles of the gaps that occur",
    )
    gap_exempt: list[str] = Field(
        default_factory=lambda: ["code"], description="domains where the verdict alone decides"
    )
    per_prompt: int | Literal["all"] = Field(
        default=1, description="most pairs per prompt; all: every pair that the rule proposes, one per source"
    )
    min_accuracy: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="a source that is right less often than this, over all prompts with verdicts, gives no pair whose "
        "chosen answer is right by a verdict",
    )
    own_source: str | None = Field(
        default=None,
        description="source whose responses are the target's own samples: they are never a best answer, and only the "
        "rule own_answers makes pairs of them; none for no such source",
    )
    weighted: bool = Field(
        default=False,
        description="weigh each pair by the softmax of the chosen answers' rewards over the prompt's pairs (FusePO); "
        "needs trainer_cls: fusion_plugins.axolotl.preference_trainers.FusePOTrainer, and per_prompt: all",
    )
    weight_temperature: float = Field(
        default=1.0, gt=0, description="temperature of that softmax, in units of the reward"
    )
    texts: str | None = Field(
        default=None,
        description=".jsonl file that gets both answers of every pair, for `fusion capture --texts`; none for no file",
    )

    @field_validator("texts")
    @classmethod
    def _check_texts(cls, value: str | None) -> str | None:
        if value is not None and not value.endswith(".jsonl"):
            raise ValueError(f"expected the name of a .jsonl file, got {value!r}")
        return value

    @field_validator("per_prompt")
    @classmethod
    def _check_per_prompt(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("expected a number of pairs, at least 1, or 'all'")
        return value

    @property
    def most(self) -> int | None:
        """Most pairs per prompt; None for no limit."""
        return None if self.per_prompt == "all" else int(self.per_prompt)

    def problems(self) -> Iterator[str]:
        """Yield what does not belong together."""
        try:
            self.window()
        except ConfigError as error:
            yield str(error)
        if self.rule == "own_answers" and self.own_source is None:
            yield (
                "the rule own_answers needs own_source, the name under which the target's own samples are among the "
                "responses"
            )
        if self.weighted and (why := self._one_pair()):
            yield (
                f"weighted compares the pairs of one prompt, and {why}: every weight would be 1. Set per_prompt: all "
                "with the rule same_source or verdict, which give a pair of every source; or, for plain DPO, remove "
                "weighted and trainer_cls"
            )

    def _one_pair(self) -> str | None:
        """Return why no prompt can have more than one pair; None where one can."""
        if self.most == 1:
            return f"per_prompt: {self.per_prompt} leaves one of them"
        return f"the rule {self.rule} makes one" if self.rule in ("across_sources", "own_answers") else None

    def window(self) -> GapWindow:
        """Return the limits in core's form; raises ConfigError for limits that contradict each other."""
        return GapWindow(self.min_gap, self.max_gap, self.gap_unit, frozenset(self.gap_exempt))


class SftArgs(BlockSettings):
    """Which answers `fusion_plugins.axolotl.best_of_sources` learns from."""

    rule: str = Field(default="reward", description="reward (highest, among correct ones where verified) or verdict")
    per_prompt: Literal["best", "all"] = Field(
        default="best",
        description="best: the best answer of all sources; all: the best answer of each source, weighted in the loss "
        "by the softmax of their rewards (FuseSFT)",
    )
    weight_temperature: float = Field(
        default=1.0, gt=0, description="temperature of that softmax, in units of the reward"
    )
    only_verified: bool = Field(default=False, description="only answers that a verdict calls correct")


class WRPOArgs(BlockSettings):
    """The loss of the trainer WRPOTrainer."""

    alpha: float = Field(
        default=0.1, ge=0, le=1, description="weight of the source's answer; the target's own best answer has the rest"
    )
    schedule: Literal["rise", "constant"] = Field(
        default="rise",
        description="rise: the weight rises linearly from 0 to alpha over the steps of the training, and an "
        "evaluation uses alpha itself; constant: always alpha",
    )


class ReferenceArgs(BlockSettings):
    """The reference of the trainer InfiFPOTrainer: log-probabilities of whole answers, out of stores."""

    sources: list[SourceArgs] = Field(
        min_length=1,
        description="stores of the responses, `fusion capture --texts` of the scored folder; that of the model that is "
        "trained is marked with is_target",
    )
    rule: Literal["max_margin", "mean"] = Field(
        default="max_margin",
        description="max_margin: per pair the source that is farthest from the target; mean: the mean over the sources",
    )
    clip: bool = Field(
        default=True,
        description="a source counts only as far as it agrees with the preference more than the target: for the chosen "
        "answer not below the target, for the rejected one not above it",
    )

    @property
    def needs_target(self) -> bool:
        """Whether the target's own log-probabilities play a part."""
        return self.clip or (self.rule == "max_margin" and len(self.sources) > 1)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the sources."""
        yield from _problems_of_names(self.sources)
        if self.needs_target and not any(source.is_target for source in self.sources):
            yield (
                f"clip: {str(self.clip).lower()} with rule {self.rule} needs the target's own store: capture the same "
                "responses from `base_model` and give the store with is_target: true, or set clip: false and rule: mean"
            )


def _problems_of_names(sources: Sequence[SourceArgs]) -> Iterator[str]:
    names = [source.name for source in sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"source name {name!r} is given twice; reports go by names, so give each source its own"
    targets = [source.name for source in sources if source.is_target]
    if len(targets) > 1:
        yield f"is_target is true for {', '.join(targets)}; only one store can be the target model's own"


class SplitArgs(BlockSettings):
    """Which prompts train which stage; without this block every prompt trains whichever stage reads it."""

    sft_share: float = Field(default=0.4, ge=0, le=1, description="share of prompts with a pair that go to SFT")
    verified_dpo_share: float = Field(
        default=1.0, ge=0, le=1, description="share of maths and code prompts with a pair that go to DPO"
    )
    unpaired: Literal["drop", "sft"] = Field(
        default="drop", description="what becomes of an unverified prompt without a pair"
    )
    sft_only: list[str] = Field(default_factory=lambda: ["chinese"], description="domains that never go to DPO")
    seed: int = Field(default=0, description="another seed gives another, equally fixed, division")
    pairs: PairArgs | None = Field(
        default=None,
        description="rules of the pairs by which the first stage divided the prompts, where this run trains on other "
        "pairs; the run's own if absent",
    )

    def rule(self) -> SplitRule:
        """Return the rule in core's form."""
        return SplitRule(self.sft_share, self.verified_dpo_share, self.unpaired, frozenset(self.sft_only), self.seed)


class FusionBlock(BlockSettings):
    """Everything under ``fusion:``."""

    MOVED = {"missing_texts": "now fusion.on_missing_text, with the values raise (was: stop) and skip (was: drop)"}

    sources: list[FusedSourceArgs] = Field(
        default_factory=list, description="source models, for datasets of type fusion_plugins.axolotl.fused"
    )
    where: Where | None = Field(
        default=None,
        description="column -> a value, a list of values, or {min, max}: only rows that meet all conditions are used; "
        "verdict is correct, incorrect or unknown",
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
        "can forge; such a response has none. inside: all",
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
        yield from _problems_of_names(self.sources)
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
