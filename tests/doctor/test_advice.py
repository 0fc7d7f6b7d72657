"""Verdicts and advice: each problem names the setting that helps."""

from dataclasses import replace

import pytest

from fusion_plugins.core.fusion.accounting import ProjectionReport
from fusion_plugins.core.fusion.project import ProjectionOptions
from fusion_plugins.doctor.advice import advice, verdict
from fusion_plugins.doctor.diagnosis import ClassCount, Diagnosis

SOUND = Diagnosis(
    name="a",
    texts=10,
    wins=8,
    ce_per_byte=0.5,
    target_ce_per_byte=0.7,
    overlap=0.5,
    mapped={"exact": 0.5, "edited": 0.5, "unmapped": 0.0},
    projection=ProjectionReport(positions=10, one_to_one=10, exact_mass=10.0),
    classes={"other": ClassCount(positions=10, used=10, label=6.0, target_label=5.0)},
    vocab_size=420,
    top_k=10,
)
OUTSIDE = ProjectionReport(positions=10, one_to_one=10, exact_mass=6.0, outside_mass=4.0)
UNMAPPED = ProjectionReport(positions=10, one_to_one=10, exact_mass=6.0, unmapped_mass=4.0)


@pytest.mark.parametrize(
    ("change", "words", "expected"),
    [
        ({"wins": 0}, "leave it out", "poor"),
        ({"projection": ProjectionReport(positions=10, one_to_one=4, exact_mass=4.0)}, "different bytes", "poor"),
        ({"projection": OUTSIDE}, "larger top_k", "fair"),
        ({"projection": UNMAPPED}, "no counterpart", "fair"),
        (
            {"classes": {"other": ClassCount(positions=10, used=10, label=1.0, target_label=5.0)}},
            "fusion.lm_loss_weight",
            "fair",
        ),
    ],
)
def test_each_problem_names_the_setting_that_helps(change, words, expected):
    assert advice(SOUND, ProjectionOptions()) == []
    assert verdict(SOUND, []) == "good"
    found = advice(replace(SOUND, **change), ProjectionOptions())
    assert any(words in line for line in found)
    assert verdict(replace(SOUND, **change), found) == expected


@pytest.mark.parametrize(("top_k", "expected"), [(10, "(40)"), (256, "(1024)"), (900, "(2000)")])
def test_the_advised_top_k_is_larger_than_the_stored_one_and_no_more_than_the_vocabulary(top_k, expected):
    diagnosis = replace(SOUND, projection=OUTSIDE, top_k=top_k, vocab_size=2000)
    assert expected in advice(diagnosis, ProjectionOptions())[0]


def test_a_store_of_the_whole_vocabulary_is_not_told_to_hold_more():
    assert advice(replace(SOUND, projection=OUTSIDE, top_k=2000, vocab_size=2000), ProjectionOptions()) == []


def test_first_token_is_not_advised_where_it_is_set():
    by_edits = replace(SOUND, projection=UNMAPPED, vocabulary_map="min_edit")
    assert "fusion.projection.vocabulary_map: first_token" in advice(by_edits, ProjectionOptions())[0]
    assert "first_token" not in advice(replace(by_edits, vocabulary_map="first_token"), ProjectionOptions())[0]


def test_chain_correction_is_advised_where_digits_suffer():
    diagnosis = replace(SOUND, classes={"digits": ClassCount(positions=10, used=10, label=1.0, target_label=5.0)})
    without = advice(diagnosis, ProjectionOptions(chain=False))
    assert any("fusion.projection.chain: true" in line for line in without)
    assert not any("fusion.projection.chain" in line for line in advice(diagnosis, ProjectionOptions()))


def test_the_settings_that_are_advised_exist():
    from fusion_plugins.axolotl.args import FusionBlock
    from fusion_plugins.axolotl.source_args import ProjectionArgs, SourceArgs

    assert {"rule", "lm_loss_weight", "sources"} <= set(FusionBlock.model_fields)
    assert {"chain", "vocabulary_map"} <= set(ProjectionArgs.model_fields)
    assert "is_target" in SourceArgs.model_fields
