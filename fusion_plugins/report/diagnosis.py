"""What fusion of some sources into a target can be expected to give, measured on a sample before any training.

Every text of the sample goes the way that training will send it (align, project), source by source, and the rows are
counted by what the target's next token is: digits, CJK, white space, special tokens, the rest.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.accounting import ProjectionReport
from fusion_plugins.core.align import align_texts
from fusion_plugins.core.common_text import common_text
from fusion_plugins.core.project import Projection, ProjectionOptions, project_record
from fusion_plugins.core.record import stored_rows
from fusion_plugins.core.token_table import TokenTable
from fusion_plugins.core.types import Record, TokenizedText, VocabularyMap

__all__ = ["CLASSES", "ClassCount", "Diagnosis", "advice", "diagnose", "label_classes", "verdict", "vocabulary_overlap"]

CLASSES = ("special", "digits", "cjk", "white space", "other")
#: rows of CJK scripts, kana and hangul as code points
CJK = ((0x2E80, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


@dataclass(frozen=True)
class ClassCount:
    """Rows whose label belongs to one class; counts and sums over the sample.

    Attributes:
        rows: supervised rows.
        used: those with a distribution of the source.
        gold: sum over used rows of the probability that the projected, renormalised row gives the label.
        own: sum over used rows of the probability that the target itself gives the label.
        top1: used rows whose most probable entry is the label.
    """

    rows: int = 0
    used: int = 0
    gold: float = 0.0
    own: float = 0.0
    top1: int = 0

    def __add__(self, other: "ClassCount") -> "ClassCount":
        return ClassCount(
            self.rows + other.rows,
            self.used + other.used,
            self.gold + other.gold,
            self.own + other.own,
            self.top1 + other.top1,
        )


@dataclass(frozen=True)
class Diagnosis:
    """One source against the target.

    Attributes:
        name: the source.
        texts: texts of the sample that both have.
        wins: texts on which the source's cross-entropy per byte is below the target's.
        ce_per_byte: the source's mean over the texts, nats/byte; nan without distributions.
        target_ce_per_byte: the target's.
        overlap: share of the target's ordinary tokens that are tokens of the source, by bytes.
        mapped: shares of the source's vocabulary: exact, edited, unmapped.
        projection: what became of rows and mass.
        classes: label class -> counts.
    """

    name: str
    texts: int
    wins: int
    ce_per_byte: float
    target_ce_per_byte: float
    overlap: float
    mapped: dict[str, float]
    projection: ProjectionReport
    classes: dict[str, ClassCount] = field(default_factory=dict)

    @property
    def total(self) -> ClassCount:
        """All classes together."""
        return sum(self.classes.values(), ClassCount())


def diagnose(
    name: str,
    pairs: Iterable[tuple[Record, Record]],
    tables: tuple[TokenTable, TokenTable],
    vocabulary: VocabularyMap,
    options: ProjectionOptions = ProjectionOptions(),
    advance: Callable[[], None] = lambda: None,
) -> Diagnosis:
    """Send a sample of texts through alignment and projection.

    Args:
        name: the source.
        pairs: (source's record, target's record) of one text each.
        tables: token tables of source and target.
        vocabulary: source id -> target id.
        options: options of the projection.
        advance: called after each text.

    Raises:
        AlignmentError: two records are not of the same text.
    """
    source_table, target_table = tables
    classes = label_classes(target_table)
    counts = {name: ClassCount() for name in CLASSES}
    report, n_texts, wins, ces = ProjectionReport(), 0, 0, []
    for source, own in pairs:
        target = TokenizedText(own.input_ids, own.offsets, own.spans, own.exact)
        source, target = common_text(source, target, source_table=source_table, target_table=target_table)
        projection = project_record(
            source,
            align_texts(source, target),
            vocabulary,
            target,
            source_table=source_table,
            target_table=target_table,
            options=options,
        )
        for index, label_class in enumerate(CLASSES):
            counts[label_class] += _count(projection, target, own, classes == index)
        report += projection.report
        n_texts += 1
        wins += source.ce_per_byte < own.ce_per_byte
        ces.append((source.ce_per_byte, own.ce_per_byte))
        advance()
    means = np.nanmean(ces, axis=0) if np.isfinite(ces).any() else (np.nan, np.nan)
    return Diagnosis(
        name=name,
        texts=n_texts,
        wins=wins,
        ce_per_byte=float(means[0]),
        target_ce_per_byte=float(means[1]),
        overlap=vocabulary_overlap(source_table, target_table),
        mapped=_mapped(vocabulary, source_table),
        projection=report,
        classes=counts,
    )


def label_classes(table: TokenTable) -> npt.NDArray[np.uint8]:
    """Return (V,) the index into :data:`CLASSES` of every token.

    Digits win over everything, then CJK, then white space; ids without bytes count as special.
    """
    return np.array([_label_class(table, index) for index in range(table.vocab_size)], np.uint8)


def vocabulary_overlap(source: TokenTable, target: TokenTable) -> float:
    """Return the share of the target's ordinary tokens whose bytes are an ordinary token of the source."""
    own, others = _ordinary(target), _ordinary(source)
    return len(own & others) / len(own) if own else 0.0


def advice(diagnosis: Diagnosis, options: ProjectionOptions, top_k: int) -> list[str]:
    """Return what stands in the way of this source and the setting that would improve it, worst first."""
    found = []
    report, total = diagnosis.projection, diagnosis.total
    if diagnosis.texts and np.isfinite(diagnosis.ce_per_byte) and diagnosis.wins < 0.05 * diagnosis.texts:
        found.append(
            f"the source is better than the target on only {diagnosis.wins} of {diagnosis.texts} texts: min_ce will "
            "hardly choose it; leave it out, or capture texts of its own field"
        )
    if report.coverage < 0.5:
        found.append(
            f"only {report.coverage:.0%} of the rows can be taught, because the tokenizers end at different bytes: "
            "expect a weak signal"
        )
    if report.used and report.outside_mass / report.used > 0.2:
        found.append(
            f"{report.outside_mass / report.used:.0%} of the mass lies outside the stored top {top_k}: capture with a "
            f"larger top_k ({min(4 * top_k, 256)})"
        )
    if report.used and report.unmapped_mass / report.used > 0.1:
        found.append(
            f"{report.unmapped_mass / report.used:.0%} of the mass has no counterpart in the target's vocabulary: use "
            "alignment.vocabulary: first_token"
        )
    digits = diagnosis.classes.get("digits", ClassCount())
    if not options.chain and digits.used and digits.gold < digits.own:
        found.append("on digits the projected rows are worse than the target: set alignment.chain: true")
    if total.used and np.isfinite(diagnosis.target_ce_per_byte) and total.gold < total.own and not found:
        found.append(
            "on these texts the target itself gives the right token more probability than the source does: a larger "
            "lm_loss_weight, or token_min_ce as the rule, limits the harm"
        )
    return found


def verdict(diagnosis: Diagnosis, found: Sequence[str]) -> str:
    """Return ``good``, ``fair`` or ``poor``.

    Good is a source without complaints. Poor is one with less than half of the rows usable, or one that is better than
    the target on less than one text in twenty.
    """
    if not found:
        return "good"
    scored = np.isfinite(diagnosis.ce_per_byte)
    hopeless = diagnosis.projection.coverage < 0.5 or (scored and diagnosis.wins < 0.05 * diagnosis.texts)
    return "poor" if hopeless else "fair"


def _count(projection: Projection, target: TokenizedText, own: Record, of_class: npt.NDArray[np.bool_]) -> ClassCount:
    labels = target.input_ids[1:]
    rows = stored_rows(target)[:-1] & of_class[labels]
    used = rows & projection.distributions.rows[:-1]
    ids, logprobs = projection.distributions.ids[:-1][used], projection.distributions.logprobs[:-1][used]
    hits = ids == labels[used][:, None]
    gold = np.where(hits, np.exp(logprobs), 0.0).sum()
    return ClassCount(
        rows=int(rows.sum()),
        used=int(used.sum()),
        gold=float(gold),
        own=float(np.exp(own.token_logprobs[:-1][used].astype(np.float64)).sum()),
        top1=int(hits[:, 0].sum()),
    )


def _label_class(table: TokenTable, index: int) -> int:
    data = table.tokens[index]
    if not data or table.role_of(index) is not None:
        return CLASSES.index("special")
    text = data.decode(errors="replace")
    if any(character.isdigit() for character in text):
        return CLASSES.index("digits")
    if any(low <= ord(character) <= high for character in text for low, high in CJK):
        return CLASSES.index("cjk")
    return CLASSES.index("white space" if text.isspace() else "other")


def _ordinary(table: TokenTable) -> set[bytes]:
    return {data for index, data in enumerate(table.tokens) if data and table.role_of(index) is None}


def _mapped(vocabulary: VocabularyMap, source: TokenTable) -> dict[str, float]:
    size = max(source.vocab_size, 1)
    exact = int((vocabulary.distances == 0).sum())
    mapped = int((vocabulary.target_ids >= 0).sum())
    return {"exact": exact / size, "edited": (mapped - exact) / size, "unmapped": 1.0 - mapped / size}
