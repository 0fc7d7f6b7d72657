"""The `fusion:` block refuses keys and values that were renamed, with the new name."""

import pytest

from fusion_plugins.axolotl.args import FusionBlock, fusion_block
from fusion_plugins.axolotl.source_args import AlignmentArgs, ProjectionArgs
from fusion_plugins.errors import ConfigError

SOURCES = [{"name": "a", "store": "stores/a"}]


@pytest.mark.parametrize(
    ("block", "new"),
    [
        ({"alignment": {"vocabulary": "exact"}}, "vocabulary is now fusion.projection.vocabulary_map"),
        ({"alignment": {"max_distance": 2}}, "max_distance is now fusion.projection.max_distance"),
        ({"alignment": {"chain": False}}, "chain is now fusion.projection.chain"),
        ({"alignment": {"tail": "bucket"}}, "tail is now fusion.projection.tail"),
        ({"alignment": {"min_mass": 0.0}}, "min_mass is now fusion.projection.min_mass"),
        ({"alignment": {"fallback": "mask"}}, "fallback is now fusion.projection.fallback"),
        ({"alignment": {"band": 8}}, "band is gone: dtw always computes the whole matrix"),
        (
            {"missing_texts": "drop"},
            "missing_texts is now fusion.on_missing_text, with the values raise (was: stop) and skip (was: drop)",
        ),
        ({"projection": {"vocabulary": "exact"}}, "projection: vocabulary is now vocabulary_map"),
        (
            {"projection": {"tail": "ignore"}},
            "expected renormalize or bucket; ignore is now called bucket, got 'ignore'",
        ),
        ({"lm_loss_schedule": "decay"}, "expected constant or rise; decay is now called rise, got 'decay'"),
    ],
)
def test_what_was_renamed_is_refused_with_the_new_name(block, new):
    with pytest.raises(ConfigError, match="^fusion: ") as error:
        fusion_block({"fusion": {"sources": SOURCES, **block}})
    assert new in str(error.value)


def test_every_key_that_moved_has_a_new_home():
    for old, new in AlignmentArgs.MOVED.items():
        assert old not in AlignmentArgs.model_fields
        assert new.startswith("gone") or new.removeprefix("now ").rpartition(".")[2] in ProjectionArgs.model_fields
    assert set(FusionBlock.MOVED).isdisjoint(FusionBlock.model_fields)


@pytest.mark.parametrize(
    ("block", "read"),
    [
        ({"projection": {"tail": "bucket"}}, lambda b: not b.projection.options().renormalize),
        ({"projection": {"tail": "renormalize"}}, lambda b: b.projection.options().renormalize),
        ({"projection": {"chain": False, "min_mass": 0.3}}, lambda b: b.projection.options().min_mass == 0.3),
        ({"lm_loss_schedule": "rise"}, lambda b: b.lm_loss_schedule == "rise"),
        ({"on_missing_text": "skip"}, lambda b: b.on_missing_text == "skip"),
        ({"alignment": {"method": "dtw", "tie_order": "fusechat"}}, lambda b: b.alignment.tie_order == "fusechat"),
    ],
)
def test_the_new_keys_are_read(block, read):
    assert read(fusion_block({"fusion": {"sources": SOURCES, **block}}))
