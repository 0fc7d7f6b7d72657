"""Count what alignment and projection make of one source's distributions on a sample of texts.

Every text is aligned and projected as in training. Positions are counted by what the target's next token (their label)
is: digits, CJK, white space, special tokens, the rest.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.fusion.accounting import ChunkReport, ProjectionReport
from fusion_plugins.core.fusion.align import align_texts
from fusion_plugins.core.fusion.chunks import ChunkSide, common_chunks
from fusion_plugins.core.fusion.common_text import common_text
from fusion_plugins.core.fusion.flat import Texts
from fusion_plugins.core.fusion.project import Projection, ProjectionOptions, Projector
from fusion_plugins.core.fusion.record import supervised_positions
from fusion_plugins.core.fusion.types import Record, VocabularyMap
from fusion_plugins.core.text.token_bytes import TokenBytes
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.doctor.label_classes import CLASSES, label_classes, token_classes

#: Mean difference of log-probabilities of the same tokens, in nats, below which two stores are of one model. Not 0:
#: another precision or batch size changes a model's numbers a little.
SAME_MODEL = 0.02
#: used positions; `unchecked` is missing because it exists with `dtw` only, and doctor aligns by offsets
POSITION_KINDS = ("one_to_one", "one_to_many", "many_to_one", "crossing", "special")


@dataclass(frozen=True)
class ClassCount:
    """Positions whose label belongs to one class; counts and sums over the sample.

    Attributes:
        positions: supervised positions.
        used: those of them with a distribution of the source.
        label: sum over used positions of the probability that the source gives the label, before renormalisation.
        target_label: sum over used positions of the probability that the target itself gives the label.
        top1: used positions whose most probable entry is the label.
    """

    positions: int = 0
    used: int = 0
    label: float = 0.0
    target_label: float = 0.0
    top1: int = 0

    def __add__(self, other: "ClassCount") -> "ClassCount":
        return ClassCount(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


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
        projection: counts of positions, entries and probability mass.
        classes: label class -> counts.
        vocabulary_map: method of the vocabulary map; ``identity`` where the tokenizers are the same.
        vocab_size: tokens of the source's vocabulary.
        top_k: entries per position of the source.
        tokens: the source's tokens of the sample.
        n_bytes: bytes of the sample, with what the source's template adds.
        is_target: the source's distributions are the target's own.
        chunks: the minimal common chunks, which the loss of advantages compares.
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
    vocabulary_map: str = "first_token"
    vocab_size: int = 0
    top_k: int = 1
    tokens: int = 0
    n_bytes: int = 0
    is_target: bool = False
    chunks: ChunkReport = field(default_factory=ChunkReport)

    @property
    def compared(self) -> bool:
        """Whether both sides have distributions."""
        return bool(np.isfinite([self.ce_per_byte, self.target_ce_per_byte]).all())

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
    advance: Callable[[int, int], None] = lambda items, tokens: None,
    seen: Callable[[Record, Projection], None] = lambda record, projection: None,
) -> Diagnosis:
    """Align and project a sample of texts, and return the counts.

    Args:
        name: the source.
        pairs: (source's record, target's record) of one text each.
        tables: token tables of source and target.
        vocabulary: source id -> target id.
        options: options of the projection.
        advance: called after each text with 1 and the number of its source tokens.
        seen: called after each text with the source's record and its projection.

    Raises:
        AlignmentError: two records are not of the same text.
    """
    source_table, target_table = tables
    projector = Projector.of(source_table, target_table, vocabulary, options)
    by_token, tally = token_classes(target_table), _Tally()
    for said, target_record in pairs:
        source = said
        tally.compare(source, target_record)
        source, target = common_text(source, target_record.text, projector.source_bytes, projector.target_bytes)
        tally.cut(source, target, target_record, (projector.source_bytes, projector.target_bytes))
        projection = projector(source, align_texts(source.text, target), target)
        tally.count(projection, target, target_record, label_classes(target, target_table, by_token))
        seen(said, projection)
        advance(1, len(source.text.input_ids))
    return Diagnosis(
        name=name,
        texts=len(tally.ces),
        wins=sum(source_ce < target_ce for source_ce, target_ce in tally.ces),
        ce_per_byte=_mean([source_ce for source_ce, _ in tally.ces]),
        target_ce_per_byte=_mean([target_ce for _, target_ce in tally.ces]),
        overlap=_overlap(source_table, target_table),
        mapped=_mapped(vocabulary, source_table),
        projection=tally.report,
        classes=tally.classes,
        vocabulary_map=vocabulary.method,
        vocab_size=source_table.vocab_size,
        top_k=tally.top_k,
        tokens=tally.tokens,
        n_bytes=tally.n_bytes,
        is_target=source_table.fingerprint == target_table.fingerprint and tally.same_distributions,
        chunks=tally.chunks,
    )


def figures(diagnosis: Diagnosis) -> dict[str, float]:
    """Return the figures of the table, name -> value; shares in [0, 1], cross-entropies in nats/byte.

    Training masks the supervised positions "without a distribution", or teaches them the label alone. Figures that need
    distributions are nan where there is only a tokenizer.
    """
    report, total = diagnosis.projection, diagnosis.total
    positions, used, chunks = max(report.positions, 1), max(report.used, 1), diagnosis.chunks.shares()
    return {
        "coverage": report.coverage,
        "without a distribution": 1.0 - report.coverage,
        **{f"positions {kind.replace('_', '-')}": getattr(report, kind) / positions for kind in POSITION_KINDS},
        "mass kept": report.mass_kept,
        "mass by the text": report.gold_mass / used,
        "mass exact": report.exact_mass / used,
        "mass edited": report.edited_mass / used,
        "mass unmapped": report.unmapped_mass / used,
        "mass outside top k": report.outside_mass / used if np.isfinite(diagnosis.ce_per_byte) else float("nan"),
        "label is top 1": total.top1 / max(total.used, 1),
        "label probability": total.label / max(total.used, 1),
        "label probability, target": total.target_label / max(total.used, 1),
        "vocabulary exact": diagnosis.mapped["exact"],
        "vocabulary edited": diagnosis.mapped["edited"],
        "vocabulary unmapped": diagnosis.mapped["unmapped"],
        "vocabulary overlap": diagnosis.overlap,
        "CE per byte": diagnosis.ce_per_byte,
        "CE per byte, target": diagnosis.target_ce_per_byte,
        "chunks, tokens in each": chunks.get("tokens_per_chunk", float("nan")),
        "chunks, tokens that are one": chunks.get("one_token_chunks", float("nan")),
        "chunks, bytes in none": chunks.get("bytes_without_common_end", float("nan")),
        "texts won": diagnosis.wins / max(diagnosis.texts, 1) if diagnosis.compared else float("nan"),
        "bytes of text per token": diagnosis.n_bytes / max(diagnosis.tokens, 1),
    }


class _Tally:
    """The sums over the texts so far."""

    def __init__(self) -> None:
        self.report, self.chunks = ProjectionReport(), ChunkReport()
        self.classes = {label_class: ClassCount() for label_class in CLASSES}
        self.ces: list[tuple[float, float]] = []
        self.top_k = self.tokens = self.n_bytes = self._positions = 0
        self._difference = 0.0

    @property
    def same_distributions(self) -> bool:
        """Whether source and target have the same tokens and gave them the same probabilities."""
        return self._positions > 0 and self._difference < SAME_MODEL * self._positions

    def compare(self, source: Record, target_record: Record) -> None:
        """Add what the two records of one text tell without alignment."""
        self.ces.append((source.ce_per_byte, target_record.ce_per_byte))
        self.top_k = max(self.top_k, source.topk.ids.shape[1])
        self.tokens += len(source.text.input_ids)
        self.n_bytes += int(source.text.ends[-1])
        self._positions += len(target_record.text.input_ids) - 1
        if np.array_equal(source.text.input_ids, target_record.text.input_ids):
            difference = source.topk.token_logprobs[:-1] - target_record.topk.token_logprobs[:-1]
            self._difference += float(np.abs(difference).sum())
        else:
            # Other tokens anywhere mean another tokenizer or template, so the stores are not of one model.
            self._difference = float("inf")

    def cut(
        self, source: Record, target: TokenizedText, target_record: Record, tokens: tuple[TokenBytes, TokenBytes]
    ) -> None:
        """Add the chunks of one text, as the spans of both sides have them in common."""
        texts = Texts.of([source.text]), Texts.of([target])
        side = ChunkSide(*texts, source.topk.token_logprobs.astype(np.float32), tokens)
        self.chunks += common_chunks([side], [1.0], supervised_positions(target_record.text))[1]

    def count(
        self, projection: Projection, target: TokenizedText, target_record: Record, classes: npt.NDArray[np.uint8]
    ) -> None:
        """Add the projection of one text; ``classes`` (T,) are those of the target's tokens."""
        self.report += projection.report
        for index, label_class in enumerate(CLASSES):
            self.classes[label_class] += _count(projection, target, target_record, classes[1:] == index)


def _count(
    projection: Projection, target: TokenizedText, target_record: Record, of_class: npt.NDArray[np.bool_]
) -> ClassCount:
    positions = supervised_positions(target)[:-1] & of_class
    used = positions & projection.distributions.present[:-1]
    return ClassCount(
        positions=int(positions.sum()),
        used=int(used.sum()),
        label=_probability(projection.label_logprobs[:-1][used]),
        target_label=_probability(target_record.topk.token_logprobs[:-1][used]),
        top1=int((projection.distributions.ids[:-1, 0][used] == target.input_ids[1:][used]).sum()),
    )


def _probability(logprobs: npt.NDArray[np.float32]) -> float:
    return float(np.exp(logprobs.astype(np.float64)).sum())


def _mean(values: list[float]) -> float:
    """Return the mean of the finite values, nan where there are none."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def _overlap(source: TokenTable, target: TokenTable) -> float:
    """Return the share of the target's ordinary tokens whose bytes are an ordinary token of the source."""
    ours, theirs = (
        {table.tokens[index] for index in np.flatnonzero(table.ordinary).tolist()} for table in (target, source)
    )
    return len(ours & theirs) / len(ours) if ours else 0.0


def _mapped(vocabulary: VocabularyMap, source: TokenTable) -> dict[str, float]:
    size = max(source.vocab_size, 1)
    exact = int((vocabulary.distances == 0).sum())
    mapped = int((vocabulary.target_ids >= 0).sum())
    return {"exact": exact / size, "edited": (mapped - exact) / size, "unmapped": 1.0 - mapped / size}
