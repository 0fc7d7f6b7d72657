"""Settings of the ``fusion:`` block about sources: which there are, and how their distributions are fused."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from fusion_plugins.axolotl.block_settings import BlockSettings
from fusion_plugins.core.fusion.project import ProjectionOptions
from fusion_plugins.where import Where, checked_where


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


def problems_of_names(sources: Sequence[SourceArgs]) -> Iterator[str]:
    """Yield what is wrong with the names and marks of several sources."""
    names = [source.name for source in sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"source name {name!r} is given twice; reports go by names, so give each source its own"
    targets = [source.name for source in sources if source.is_target]
    if len(targets) > 1:
        yield f"is_target is true for {', '.join(targets)}; only one store can be the target model's own"


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
