"""The table, the page and the picture."""

from io import StringIO

import pytest

from fusion_plugins.doctor.examine import examine
from fusion_plugins.doctor.page import picture_png, render_doctor_page, sections, show
from fusion_plugins.doctor.sides import open_side, open_target
from fusion_plugins.terminal import console


@pytest.fixture(scope="module")
def report(work):
    target = open_side(str(work / "stores" / "target"), None)
    return examine(target, [open_side(str(work / "stores" / name), None) for name in ("a", "b")])


def _table(report):
    return dict(line for _, lines in sections(report) for line in lines)


def test_the_table_says_that_a_source_with_the_tokenizer_of_the_target_needs_no_map(work):
    target = open_side(str(work / "stores" / "target"), None)
    assert _table(examine(target, [target]))["map"] == ["none needed: the same tokenizer"]


def test_one_tokenizer_among_stores_leaves_the_figures_of_the_others(work, contents):
    target = open_target(str(work / "stores" / "target"), contents)
    sources = [open_side(str(work / path), contents) for path in ("stores/a", "models/b")]
    report = examine(target, sources)
    table = _table(report)
    assert [value == "-" for value in table["CE per byte"]] == [False, True]
    assert [value == "-" for value in table["texts won"]] == [False, True]
    assert [value == "-" for value in table["CE per byte, target"]] == [False, False]
    assert table["store, bytes per token"][1].startswith("about ")
    assert ["a tokenizer (b) is examined" in note for note in report.notes] == [True]


def test_a_figure_that_no_source_has_is_left_out(work, contents):
    target, source = (open_side(str(work / "models" / name), contents) for name in ("target", "a"))
    table = _table(examine(target, [source]))
    assert "CE per byte" not in table
    assert "coverage" in table


def test_terminal_and_page_show_every_figure_and_all_advice(report):
    screen = console(file=StringIO(), width=200)
    show(report, screen)
    page, printed = render_doctor_page(report), screen.file.getvalue()
    for title, lines in sections(report):
        assert title in page
        assert title in printed
        for name, values in lines:
            assert name in page
            assert name in printed
            assert all(value in page and value in printed for value in values)
    for source in report.sources:
        assert f"{source.diagnosis.name}: {source.verdict}" in printed
        assert all(line in printed for line in source.advice)


def test_names_are_escaped_in_page_and_terminal(report):
    from dataclasses import replace

    odd = replace(report, target="[b]<b>")
    screen = console(file=StringIO(), width=200)
    show(odd, screen)
    assert "fusion into [b]<b>" in screen.file.getvalue()
    assert "Fusion into [b]&lt;b&gt;" in render_doctor_page(odd)


def test_position_and_row_are_not_mixed_up(report):
    page = render_doctor_page(report).partition("<body>")[2]
    assert "positions one-to-one" in page
    assert " row" not in page


def test_the_picture_is_a_png(report):
    assert picture_png(report).startswith(b"\x89PNG")
