"""The comparison of alignments: its shares are shares, and what it calls a context is one, by the bytes."""

import sys
from dataclasses import astuple
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import tiny

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import compare_alignment as comparison

KINDS = {"code": tiny.TEXTS[1:3], "maths": tiny.TEXTS[3:5], "other": tiny.TEXTS[5:8], "prose": tiny.TEXTS[8:]}


@pytest.fixture(scope="module")
def sides():
    return [
        comparison.Side.of(name, tokenizer)
        for name, tokenizer in (("bytes", tiny.byte_level()), ("pieces", tiny.sentencepiece_bpe()))
    ]


@pytest.fixture(scope="module")
def lines(sides):
    return list(comparison.compare(KINDS, sides))


def test_every_direction_and_kind_has_a_line_with_shares(lines):
    assert [(line.direction, line.kind) for line in lines] == [
        (direction, kind) for direction in ("bytes -> pieces", "pieces -> bytes") for kind in KINDS
    ]
    for line in lines:
        assert all(0 <= share <= 1 for part in (line.ours, line.hard, line.soft) for share in astuple(part))
        assert line.soft.one_hot <= line.hard.one_hot, "whatever hard transfers, soft transfers"
        assert line.ours.gold_by_map <= line.ours.gold_with_chain == 1
    assert len({astuple(line.ours) for line in lines}) == len(lines), "the figures are of the texts"


def test_the_table_has_a_cell_for_every_column(lines):
    table = comparison.markdown(lines).splitlines()
    assert len(table) == 2 + len(lines)
    assert {row.count("|") for row in table} == {3 + len(comparison.COLUMNS)}


def prefixes(side, text):
    """What has been read after each token, from the bytes of the tokens alone."""
    plain = [b"" if side.table.role_of(i) else side.table.bytes_of(i) for i in text.input_ids.tolist()]
    read = [b"".join(plain[: t + 1]) for t in range(len(plain))]
    return [prefix.removeprefix(b" ") for prefix in read] if side.table.prefix_space else read


def test_no_row_of_ours_is_of_another_prefix(sides, lines):
    found = 0
    for source, target in permutations(sides, 2):
        for text in tiny.TEXTS:
            left, right = source.read(text), target.read(text)
            alignment = comparison.align_texts(left, right)
            rows = comparison.taught_rows(alignment, np.ones(len(right.ends), bool).tolist())
            rows = [(u, t) for u, t in rows if u >= 0]
            read, wanted = prefixes(source, left), prefixes(target, right)
            assert [read[u] for u, _ in rows] == [wanted[t] for _, t in rows]
            found += len(rows)
    assert found > 300
    assert all(line.ours.wrong_context == 0 for line in lines)


def test_a_wrong_context_is_one_by_the_bytes(sides):
    source, target = sides
    text = tiny.TEXTS[4]
    left, right = source.read(text), target.read(text)
    read, wanted = prefixes(source, left), prefixes(target, right)
    rows = [(u, t) for u in range(len(read)) for t in range(len(wanted))]
    different = sum(read[u] != wanted[t] for u, t in rows)
    assert comparison.wrong_contexts(left, right, rows) == different
    assert 0 < different < len(rows)


def test_a_tokenizer_agrees_with_itself(sides):
    twice = [sides[0], sides[0]._replace(name="again")]
    for line in comparison.compare(KINDS, twice):
        assert astuple(line.ours) == (1, 0, 1, 1, 0)
        assert astuple(line.hard) == astuple(line.soft) == (0, 0, 1)


def test_the_texts_are_of_the_size_that_is_promised():
    kinds = comparison.read_kinds()
    assert {name: len(texts) for name, texts in kinds.items() if name != "Chinese"} == {
        "code": comparison.COUNT,
        "maths": 60,
        "prose": comparison.COUNT,
    }
    chinese = "".join(kinds["Chinese"])
    assert sum("\u4e00" <= letter <= "\u9fff" for letter in chinese) > 1_500
    assert len(chinese) >= 2_000
    assert max(len(text) for texts in kinds.values() for text in texts) <= comparison.SIZE
