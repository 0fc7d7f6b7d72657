"""Settings of the ``fusion:`` block about scored responses: pairs, best answers, their division, preference losses."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from fusion_plugins.axolotl.block_settings import BlockSettings
from fusion_plugins.axolotl.source_args import SourceArgs, problems_of_names
from fusion_plugins.core.preferences.gaps import GapWindow
from fusion_plugins.core.preferences.split import SplitRule
from fusion_plugins.errors import ConfigError


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
        yield from problems_of_names(self.sources)
        if self.needs_target and not any(source.is_target for source in self.sources):
            yield (
                f"clip: {str(self.clip).lower()} with rule {self.rule} needs the target's own store: capture the same "
                "responses from `base_model` and give the store with is_target: true, or set clip: false and rule: mean"
            )


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
