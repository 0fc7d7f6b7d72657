"""How much of real texts each method of alignment can use, and whether what it uses is right.

    python benchmarks/compare_alignment.py

Two real tokenizers (tekken, byte-level, 131,072 tokens; Mistral's first, SentencePiece, 32,000) in both directions on
four kinds of text. `ours` is the alignment by byte offsets with the `first_token` map; `hard` and `soft` are the
published FuseLLM: time warping, then the transfer of rows whose tokens are equal, as they are or under the `min_edit`
map. Both sides read the text and its end, without a token for its beginning, as the published code does. No model is
asked: a source that is certain of its own next token shows where its probability would go. Prints a Markdown table and
what its columns mean; exits 1 when a row of ours stands in a wrong context.
"""

import argparse
import json
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import permutations
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import tiny
from published_alignment import PublishedText, PublishedVocabulary, published_matches
from records import record_of

from fusion_plugins.core.fusion.align import Alignment, align_texts
from fusion_plugins.core.fusion.dtw import dtw_path, path_ranges
from fusion_plugins.core.fusion.project import ProjectionOptions, Projector
from fusion_plugins.core.fusion.types import Record, VocabularyMap
from fusion_plugins.core.fusion.vocabulary_map import map_vocabulary
from fusion_plugins.core.text.surfaces import BYTE_LEVEL_SPACE, SENTENCEPIECE_SPACE
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import encoder, tokenize
from fusion_plugins.core.text.types import TokenizedText

TEXTS = Path(__file__).parent / "texts"
#: characters per text, so that no tokenizer needs more than about 2,048 tokens, and texts per kind
SIZE, COUNT = 4_000, 12
MODES = ("hard", "soft")
CERTAIN = -1e-6

#: heading of each column after the first two, and what it means
COLUMNS = {
    "target tokens": "Tokens of the target, over all texts of the kind.",
    "ours: used": "Share of the target's rows (tokens with a next token) that a row of the source teaches.",
    "ours: wrong context": "Share of these in which source and target have read different bytes.",
    "ours: gold by map": "Share of these in which the map sends the source's next token to the target's next token.",
    "ours: gold with chain": "The same with the chain correction, which looks at the text.",
    "ours: 1-n": "Share of these in which several source tokens spell the target's next token: what the chain is for.",
    "hard: one-hot": "Share of the target's rows on which the published code trains on a one-hot of the current token.",
    "hard: wrong context": "Share of the other rows, the transferred ones, in which both have read different bytes.",
    "hard: gold": "Share of the transferred rows that send the source's next token to the target's next token.",
    "soft: one-hot": "As for hard, where tokens also count as equal when the map sends one to the other.",
    "soft: wrong context": "As for hard.",
    "soft: gold": "As for hard, through the map.",
}


class Side(NamedTuple):
    """A tokenizer under the name that it has in the table."""

    name: str
    tokenizer: Any
    table: TokenTable

    @classmethod
    def of(cls, name: str, tokenizer: Any) -> "Side":
        """Make the token table of a tokenizer."""
        return cls(name, tokenizer, TokenTable.from_tokenizer(tokenizer))

    @property
    def marker(self) -> str:
        """The character that stands for a space in its tokens."""
        return SENTENCEPIECE_SPACE if self.table.kind == "sentencepiece" else BYTE_LEVEL_SPACE

    def read(self, text: str) -> TokenizedText:
        """Tokenize a text and its end."""
        return tokenize(self.tokenizer, self.table, text, special_tokens=False)

    def surfaces(self, text: TokenizedText) -> list[str]:
        """Return the tokens as the vocabulary file writes them."""
        names: list[str] = self.tokenizer.convert_ids_to_tokens(text.input_ids.tolist())
        return names


@dataclass(frozen=True)
class Published:
    """Shares of one mode of the published code; see :data:`COLUMNS`."""

    one_hot: float
    wrong_context: float
    gold: float


@dataclass(frozen=True)
class Ours:
    """Shares of the alignment by offsets; see :data:`COLUMNS`."""

    used: float
    wrong_context: float
    gold_by_map: float
    gold_with_chain: float
    one_to_many: float


@dataclass(frozen=True)
class Comparison:
    """One line of the table."""

    direction: str
    kind: str
    target_tokens: int
    ours: Ours
    hard: Published
    soft: Published


def pieces(text: str, size: int = SIZE) -> list[str]:
    """Cut a text into pieces of at most ``size`` characters, between lines."""
    found = [""]
    for line in text.splitlines(keepends=True):
        if len(found[-1]) + len(line) > size:
            found.append("")
        found[-1] += line
    return [piece for piece in found if piece.strip()]


def read_kinds() -> dict[str, list[str]]:
    """Return texts of four kinds: the standard library, its language reference, GSM8K, and a Chinese text."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    code = [text for file in files if len(text := file.read_text(encoding="utf-8", errors="ignore")) > SIZE]
    problems = map(json.loads, (TEXTS / "gsm8k_sample.jsonl").read_text(encoding="utf-8").splitlines())
    chinese = (TEXTS / "chinese.txt").read_text(encoding="utf-8")
    return {
        "code": [pieces(text)[0] for text in code[:COUNT]],
        "maths": [f"{problem['question']}\n{problem['answer']}" for problem in problems],
        "Chinese": pieces(chinese, size=600),
        "prose": [pieces(text)[0] for text in sorted(topics.values(), key=len)[-COUNT:]],
    }


def compare(kinds: dict[str, Sequence[str]], sides: Sequence[Side]) -> Iterator[Comparison]:
    """Compare the methods on every kind of text, for every ordered pair of tokenizers."""
    for source, target in permutations(sides, 2):
        encode = encoder(target.tokenizer, target.table)
        vocabulary = map_vocabulary(source.table, target.table, method="first_token", encode=encode)
        for kind, texts in kinds.items():
            pairs = [(source.read(text), target.read(text)) for text in texts]
            yield Comparison(
                f"{source.name} -> {target.name}",
                kind,
                sum(len(read.input_ids) for _, read in pairs),
                judge_ours(source, target, pairs, vocabulary),
                *judge_published(source, target, pairs),
            )


def judge_ours(
    source: Side, target: Side, pairs: Sequence[tuple[TokenizedText, TokenizedText]], vocabulary: VocabularyMap
) -> Ours:
    """Return the shares of the alignment by offsets."""
    rows = used = wrong = mapped = chained = split = 0
    projectors = [
        Projector.of(source.table, target.table, vocabulary, ProjectionOptions(chain=chain)) for chain in (False, True)
    ]
    for left, right in pairs:
        record, alignment = certain_record(left), align_texts(left, right)
        plain, full = (projector(record, alignment, right) for projector in projectors)
        rows += full.report.positions
        used += full.report.used
        split += full.report.one_to_many
        wrong += wrong_contexts(left, right, taught_rows(alignment, full.distributions.present))
        mapped += int((plain.label_logprobs > CERTAIN).sum())
        chained += int((full.label_logprobs > CERTAIN).sum())
    return Ours(used / rows, *(count / max(used, 1) for count in (wrong, mapped, chained, split)))


def certain_record(text: TokenizedText) -> Record:
    """Return the record of a source that gives its own next token probability 1."""
    following = np.append(text.input_ids[1:], -1).astype(np.int32)[:, None]
    certain = np.where(following >= 0, 0.0, -np.inf)
    return record_of("", text, following, certain, np.zeros(len(following), np.float32))


def taught_rows(alignment: Alignment, used: Sequence[bool]) -> list[tuple[int, int]]:
    """Return (source row, target row) of every row that is used."""
    return [(u, t) for t, u in enumerate(alignment.source_positions.tolist()) if used[t]]


def wrong_contexts(source: TokenizedText, target: TokenizedText, rows: Sequence[tuple[int, int]]) -> int:
    """Count the (source row, target row) that do not stand at the same byte of the text."""
    return sum(bool(source.ends[u] != target.ends[t]) for u, t in rows)


def judge_published(
    source: Side, target: Side, pairs: Sequence[tuple[TokenizedText, TokenizedText]]
) -> list[Published]:
    """Return the shares of the published code, hard and soft."""
    surfaces = [(source.surfaces(left), target.surfaces(right)) for left, right in pairs]
    vocabulary = published_vocabulary(source, target, {name for names, _ in surfaces for name in names})
    counts = np.zeros((len(MODES), 4), np.int64)  # rows, transferred, wrong, gold
    for (left, right), (names, wanted) in zip(pairs, surfaces, strict=True):
        path, _ = dtw_path(names, wanted)
        matched = [list(range(first, last + 1)) for first, last in path_ranges(path, axis=1, size=len(wanted)).tolist()]
        text = PublishedText(names, wanted, right.input_ids.tolist(), matched, (), (), source.marker, target.marker)
        for mode, count in zip(MODES, counts, strict=True):
            found = published_matches(text, vocabulary, family="fusellm", mode=mode)
            rows = [(u, t) for t, u in enumerate(found[:-1]) if isinstance(u, int)]
            golds = sum(next_name(text, vocabulary, u, mode) == wanted[t + 1] for u, t in rows)
            count += len(found) - 1, len(rows), wrong_contexts(left, right, rows), golds
    return [
        Published(1 - moved / rows, wrong / max(moved, 1), gold / max(moved, 1)) for rows, moved, wrong, gold in counts
    ]


def published_vocabulary(source: Side, target: Side, names: set[str]) -> PublishedVocabulary:
    """Map the tokens that occur, written with the target's boundary character, to the nearest of the target's."""
    written = sorted({name.replace(source.marker, target.marker) for name in names})
    known = target.tokenizer.convert_ids_to_tokens(list(range(len(target.tokenizer))))
    nearest = map_vocabulary(written, known, method="min_edit").target_ids.tolist()
    by_surface = {name: known[index] for name, index in zip(written, nearest, strict=True)}
    return PublishedVocabulary({}, target.tokenizer.get_vocab(), by_surface, {})


def next_name(text: PublishedText, vocabulary: PublishedVocabulary, row: int, mode: str) -> str | None:
    """Return the target token that gets the probability of the source's next token; None for none."""
    if row + 1 == len(text.source_tokens):
        return None
    name = text.source_tokens[row + 1].replace(text.source_marker, text.target_marker)
    name = vocabulary.by_surface[name] if mode == "soft" else name
    return name if name in vocabulary.target_ids else None


def markdown(lines: Sequence[Comparison]) -> str:
    """Return the table."""
    out = [
        "| direction | text | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---:|" * len(COLUMNS),
    ]
    for line in lines:
        shares = [share for part in (line.ours, line.hard, line.soft) for share in astuple(part)]
        cells = [line.direction, line.kind, f"{line.target_tokens:,}", *(f"{share:.1%}" for share in shares)]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> int:
    """Print the table and what its columns mean."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sides = [Side.of("tekken", tiny.tekken()), Side.of("mistral_v1", tiny.mistral_v1())]
    lines = list(compare(read_kinds(), sides))
    print(markdown(lines) + "\n")
    for heading, meaning in COLUMNS.items():
        print(f"- **{heading}**: {meaning}")
    return int(any(line.ours.wrong_context for line in lines))


if __name__ == "__main__":
    sys.exit(main())
