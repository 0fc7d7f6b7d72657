"""Counts of positions, entries and probability mass that add up over sources and texts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class ProjectionReport:
    """Counters of the projection of one source; two reports add up.

    Every supervised position is counted once: ``positions`` = the used ones (``one_to_one`` .. ``unchecked``) + the
    unused ones (``unaligned`` .. ``left_out``). Every used position has a mass of 1, which the six masses share.

    Attributes:
        positions: supervised positions of the target.
        one_to_one: used; the next tokens of source and target are the same bytes.
        one_to_many: used; several source tokens are the target's next token.
        many_to_one: used; the source's next token is longer than the target's.
        crossing: used; the source's tokens end inside and beyond the target's next token.
        special: used; both expect the same special token (end of turn, end of text).
        unchecked: used; ``dtw`` matched positions that do not end at the same byte.
        unaligned: no source position ends at the same byte.
        other_bytes: on one side, the next token has other bytes than the text.
        reaches_out: the target's next token reaches into the template.
        other_special: a special token on one side (an unknown character, the end of a turn) is something else on the
            other.
        source_ends: the record ends before the target's next token does (it was truncated).
        low_mass: the entries keep less than the share ``min_mass`` of what the record stores.
        left_out: the source's text has nothing that corresponds: its template writes this part of the turn in another
            syntax or not at all, or the record was cut.
        fallback: unused positions that got the next label.
        exact: entries that are a token of the target.
        edited: entries mapped to another token of the target.
        unmapped: entries without a counterpart.
        gold_mass: probability of the label, from the chain correction.
        exact_mass: mass of exact entries.
        edited_mass: mass of entries mapped to another token.
        unmapped_mass: mass of entries without a counterpart in the target's vocabulary, or that do not begin with the
            white space which is written before an answer; lost.
        prefix_mass: mass of prefixes of the label that the chain does not explain; lost.
        outside_mass: mass outside the stored top k; lost.
    """

    positions: int = 0
    one_to_one: int = 0
    one_to_many: int = 0
    many_to_one: int = 0
    crossing: int = 0
    special: int = 0
    unchecked: int = 0
    unaligned: int = 0
    other_bytes: int = 0
    reaches_out: int = 0
    other_special: int = 0
    source_ends: int = 0
    low_mass: int = 0
    left_out: int = 0
    fallback: int = 0
    exact: int = 0
    edited: int = 0
    unmapped: int = 0
    gold_mass: float = 0.0
    exact_mass: float = 0.0
    edited_mass: float = 0.0
    unmapped_mass: float = 0.0
    prefix_mass: float = 0.0
    outside_mass: float = 0.0

    def __add__(self, other: "ProjectionReport") -> "ProjectionReport":
        return ProjectionReport(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def used(self) -> int:
        """Positions with a distribution of the source."""
        by_bytes = self.one_to_one + self.one_to_many + self.many_to_one + self.crossing
        return by_bytes + self.special + self.unchecked

    @property
    def coverage(self) -> float:
        """Used positions / supervised positions, in [0, 1]; 1 where there is nothing to cover."""
        return self.used / self.positions if self.positions else 1.0

    @property
    def mass_kept(self) -> float:
        """Mean probability that a used position keeps before renormalisation, in [0, 1]."""
        return (self.gold_mass + self.exact_mass + self.edited_mass) / self.used if self.used else 0.0


@dataclass(frozen=True)
class ChunkReport:
    """Counters of the chunks of whole texts; two reports add up.

    Attributes:
        texts: texts that were cut into chunks.
        positions: trained positions of the target.
        chunk_positions: those of them that are in a chunk.
        chunks: chunks.
        single: chunks of one token of the target.
        bytes: bytes of the trained tokens.
        chunk_bytes: those of them that are in a chunk.
        sampled: positions in chunks for which the sampler's log-probability is known.
    """

    texts: int = 0
    positions: int = 0
    chunk_positions: int = 0
    chunks: int = 0
    single: int = 0
    bytes: int = 0
    chunk_bytes: int = 0
    sampled: int = 0

    def __add__(self, other: "ChunkReport") -> "ChunkReport":
        return ChunkReport(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def shares(self) -> dict[str, float]:
        """Return what says how fine the chunks are, without what there is nothing to say of.

        ``coverage`` is the share of the trained positions in a chunk, ``tokens_per_chunk`` a mean, ``one_token_chunks``
        the share of the positions in chunks that are a chunk of their own, ``bytes_without_common_end`` the share of
        the trained bytes that no chunk has, ``sampled`` the share of the positions in chunks with a known
        log-probability of the sampler.
        """
        parts = {
            "coverage": (self.chunk_positions, self.positions),
            "tokens_per_chunk": (self.chunk_positions, self.chunks),
            "one_token_chunks": (self.single, self.chunk_positions),
            "bytes_without_common_end": (self.bytes - self.chunk_bytes, self.bytes),
            "sampled": (self.sampled, self.chunk_positions),
        }
        return {name: part / whole for name, (part, whole) in parts.items() if whole}


@dataclass(frozen=True)
class FusionReport:
    """Counters of whole texts; two reports add up.

    Attributes:
        texts: texts fused.
        positions: supervised positions of the target.
        fused_positions: positions with a fused distribution.
        chosen: source name -> texts for which it has the lowest cross-entropy; the first of equals.
        sources: source name -> the counters of its projection, over the texts that it takes part in or over some of
            them: ``positions`` there says of how many positions.
        taught: domain -> source name (or that there are several, or none) -> positions that it teaches.
        untaught: texts that no source takes part in.
        chunks: of a loss of chunks, whose positions are the fused ones.
    """

    texts: int = 0
    positions: int = 0
    fused_positions: int = 0
    chosen: Mapping[str, int] = field(default_factory=dict)
    sources: Mapping[str, ProjectionReport] = field(default_factory=dict)
    taught: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    untaught: int = 0
    chunks: ChunkReport = field(default_factory=ChunkReport)

    def __add__(self, other: "FusionReport") -> "FusionReport":
        names = list(dict.fromkeys([*self.chosen, *self.sources, *other.chosen, *other.sources]))
        nothing = ProjectionReport()
        return FusionReport(
            self.texts + other.texts,
            self.positions + other.positions,
            self.fused_positions + other.fused_positions,
            {name: self.chosen.get(name, 0) + other.chosen.get(name, 0) for name in names},
            {name: self.sources.get(name, nothing) + other.sources.get(name, nothing) for name in names},
            _summed(self.taught, other.taught),
            self.untaught + other.untaught,
            self.chunks + other.chunks,
        )


def _summed(left: Mapping[str, Mapping[str, int]], right: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for domain in dict.fromkeys([*left, *right]):
        parts = left.get(domain, {}), right.get(domain, {})
        found[domain] = {
            name: sum(part.get(name, 0) for part in parts) for name in dict.fromkeys([*parts[0], *parts[1]])
        }
    return found
