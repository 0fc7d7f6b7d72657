"""Reports of projections and of fused texts: what they derive, and that they add up."""

from dataclasses import fields

import numpy as np
import pytest
import tiny
from records import record_of

from fusion_plugins.core.fusion.accounting import FusionReport, ProjectionReport
from fusion_plugins.core.fusion.align import align_texts
from fusion_plugins.core.fusion.pipeline import FusionPlan, FusionSource, fuse_text
from fusion_plugins.core.fusion.project import Projector
from fusion_plugins.core.fusion.vocabulary_map import map_vocabulary
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize

NAMES = [field.name for field in fields(ProjectionReport)]


def test_reports_add_up():
    first = ProjectionReport(positions=4, one_to_one=3, unaligned=1, gold_mass=1.5, exact_mass=0.5)
    total = first + ProjectionReport(positions=2, one_to_many=1, low_mass=1, gold_mass=0.5)
    assert (total.positions, total.used, total.coverage) == (6, 4, 4 / 6)
    assert total.mass_kept == pytest.approx(2.5 / 4)
    assert ProjectionReport().coverage == 1.0
    assert ProjectionReport().mass_kept == 0.0


def test_every_counter_adds_up():
    """Counter n is n in the one report and 100 n in the other."""
    one = ProjectionReport(*range(1, len(NAMES) + 1))
    other = ProjectionReport(*(100 * n for n in range(1, len(NAMES) + 1)))
    total = one + other
    assert {name: getattr(total, name) for name in NAMES} == {name: 101 * n for n, name in enumerate(NAMES, start=1)}
    assert len(NAMES) == 24
    assert sum([one, other], ProjectionReport()) == other + one == total
    assert one + ProjectionReport() == one


@pytest.mark.parametrize(
    ("counter", "used"),
    [(name, 1) for name in ("one_to_one", "one_to_many", "many_to_one", "crossing", "special", "unchecked")]
    + [
        (name, 0)
        for name in ("unaligned", "other_bytes", "reaches_out", "other_special", "source_ends", "low_mass", "left_out")
    ]
    + [("fallback", 0)],
)
def test_a_position_is_used_or_not_by_its_counter(counter, used):
    report = ProjectionReport(positions=4, **{counter: 1})
    assert (report.used, report.coverage) == (used, used / 4)


def test_the_mass_that_is_kept_is_that_of_the_label_and_of_mapped_entries():
    """Two used positions: of a mass of 2, .5 + .4 + .3 = 1.2 is kept and .4 + .1 + .3 = .8 is lost."""
    report = ProjectionReport(
        positions=2, one_to_one=1, crossing=1, gold_mass=0.5, exact_mass=0.4, edited_mass=0.3, unmapped_mass=0.4,
        prefix_mass=0.1, outside_mass=0.3,
    )  # fmt: skip
    assert report.mass_kept == pytest.approx(0.6)


def test_texts_with_other_sources_add_up_by_name():
    a, b = ProjectionReport(positions=5, one_to_one=4), ProjectionReport(positions=3, special=1)
    one = FusionReport(texts=1, positions=5, fused_positions=4, chosen={"x": 1, "y": 0}, sources={"x": a, "y": b})
    other = FusionReport(texts=2, positions=7, fused_positions=6, chosen={"z": 1, "y": 1}, sources={"z": b, "y": a})
    total = one + other
    assert (total.texts, total.positions, total.fused_positions) == (3, 12, 10)
    assert total.chosen == {"x": 1, "y": 1, "z": 1}
    assert total.sources == {"x": a, "y": ProjectionReport(positions=8, one_to_one=4, special=1), "z": b}
    # Reports list the sources in the order in which the texts name them.
    assert list(total.chosen) == list(total.sources) == ["x", "y", "z"]
    # Neither addend has changed.
    assert (one.chosen, other.chosen) == ({"x": 1, "y": 0}, {"z": 1, "y": 1})


def test_no_text_adds_nothing():
    report = FusionReport(1, 5, 4, {"x": 1}, {"x": ProjectionReport(positions=5, one_to_one=4)})
    assert report + FusionReport() == FusionReport() + report == sum([report], FusionReport()) == report
    assert FusionReport() + FusionReport() == FusionReport()


def test_reports_of_texts_add_up():
    tokenizers = {name: getattr(tiny, name)() for name in ("byte_level", "digit_splitting")}
    tables = {name: TokenTable.from_tokenizer(tokenizer) for name, tokenizer in tokenizers.items()}
    texts = {name: tokenize(tokenizers[name], tables[name], "The 120 apples cost 35 €, said Zoë.") for name in tables}
    target_table, sources, records = tables["byte_level"], [], []
    for name, text in texts.items():
        mapping = map_vocabulary(tables[name], target_table, method="exact")
        sources.append(FusionSource(name, Projector.of(tables[name], target_table, mapping), align_texts))
        logprobs = np.log(0.3 + 0.5 * (np.arange(len(text.input_ids)) * 0.37 % 1)).astype(np.float32)
        following = np.append(text.input_ids[1:], 0)
        records.append(record_of("text", text, following[:, None], logprobs[:, None], logprobs))
    _, one = fuse_text(FusionPlan(tuple(sources)), texts["byte_level"], records)
    assert one.sources["digit_splitting"].used > 5
    total = one + one + FusionReport()
    assert (total.texts, total.positions, total.fused_positions) == (2, 2 * one.positions, 2 * one.fused_positions)
    assert total.chosen["byte_level"] == 2 * one.chosen["byte_level"]
    assert total.sources["digit_splitting"].used == 2 * one.sources["digit_splitting"].used
