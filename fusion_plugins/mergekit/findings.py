"""The outcome of ``fusion merge-check``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Say = Callable[[str], None]
#: Names that mergekit takes as `dtype` and `out_dtype` -> bytes per element.
WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Finding:
    """One problem, or something worth knowing.

    Attributes:
        level: an error makes the merge fail or its result wrong; a warning is for the user to judge.
        text: what was found.
        cure: what to do about it.
    """

    level: Literal["error", "warning"]
    text: str
    cure: str


@dataclass
class MergeCheck:
    """The outcome of a check.

    Attributes:
        findings: what was found, in the order of the checks.
        facts: what the merge reads, writes and needs, as (name, text).
    """

    findings: list[Finding] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not any(finding.level == "error" for finding in self.findings)

    def error(self, text: str, cure: str) -> None:
        """Add an error."""
        self.findings.append(Finding("error", text, cure))

    def warning(self, text: str, cure: str) -> None:
        """Add a warning."""
        self.findings.append(Finding("warning", text, cure))


def short(error: Exception) -> str:
    """Return a message as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def architecture_of(config: Any) -> str:
    """Return the names of the architectures in transformers' configuration."""
    return ", ".join(getattr(config, "architectures", None) or [config.model_type])
