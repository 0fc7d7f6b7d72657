"""Sides, samples and reports, on real stores and on tokenizers alone."""

import json
import math
import shutil

import numpy as np
import pytest
import tiny

from fusion_plugins.core.fusion.project import ProjectionOptions
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.doctor.diagnosis import figures
from fusion_plugins.doctor.examine import examine
from fusion_plugins.doctor.page import taught_lines
from fusion_plugins.doctor.sides import Side, open_side, open_target
from fusion_plugins.errors import ConfigError, MismatchError
from fusion_plugins.inputs import open_texts
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.sources.capture_config import CaptureConfig


def test_every_supervised_position_is_in_one_class(work):
    sides = [open_side(str(work / "stores" / name), None) for name in ("target", "a")]
    diagnosis = examine(sides[0], sides[1:]).sources[0].diagnosis
    assert sum(count.positions for count in diagnosis.classes.values()) == diagnosis.projection.positions
    assert sum(count.used for count in diagnosis.classes.values()) == diagnosis.projection.used
    assert diagnosis.classes["digits"].positions > 0
    assert diagnosis.classes["cjk"].positions > 0
    assert diagnosis.classes["white space"].positions > 0


def test_the_target_as_its_own_source_is_covered_and_gives_its_own_probabilities(work):
    target = open_side(str(work / "stores" / "target"), None)
    report = examine(target, [target], options=ProjectionOptions(chain=False, renormalize=False))
    diagnosis = report.sources[0].diagnosis
    assert diagnosis.projection.coverage == 1.0
    assert diagnosis.wins == 0
    assert diagnosis.overlap == 1.0
    held = diagnosis.total
    assert 0.0 < held.label <= held.target_label + 1e-3


def test_tokenizers_and_stores_agree_on_coverage(work, contents):
    by_store = examine(*_sides(work, "stores", None)).sources[0].diagnosis
    by_tokenizer = examine(*_sides(work, "models", contents)).sources[0].diagnosis
    assert by_store.projection.positions == by_tokenizer.projection.positions
    assert by_store.projection.unaligned == by_tokenizer.projection.unaligned


def _sides(work, kind, contents):
    target, source = (open_side(str(work / kind / name), contents) for name in ("target", "b"))
    return target, [source]


def test_stores_of_other_texts_are_refused_by_name(work):
    sides = [open_side(str(work / "stores" / name), None) for name in ("target", "other-texts")]
    with pytest.raises(MismatchError, match="target, other-texts have; they have none in common"):
        examine(sides[0], sides[1:])


def test_a_tokenizer_without_texts_is_refused(work):
    with pytest.raises(ConfigError, match="together with --texts"):
        open_side(str(work / "models" / "a"), None)


def test_a_folder_that_is_neither_a_store_nor_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=f"expected a store or a tokenizer, got {tmp_path}"):
        open_side(str(tmp_path), {"0": "x"})


def test_the_store_of_the_target_is_named_as_such_and_not_judged(work):
    target = open_side(str(work / "stores" / "target"), None)
    shutil.copytree(work / "stores" / "target", work / "copy", dirs_exist_ok=True)
    found = examine(target, [open_side(str(work / "copy"), None)]).sources[0]
    assert found.diagnosis.is_target
    assert found.verdict == "own"
    assert ["is_target: true" in line for line in found.advice] == [True]


class _Listed(Side):
    """A side that notes which records are asked for."""

    def __init__(self, texts):
        tokenizer = tiny.byte_level()
        super().__init__("a", TokenTable.from_tokenizer(tokenizer), None, tokenizer, texts)
        self.seen = []

    def record(self, id):
        self.seen.append(id)
        return super().record(id)


@pytest.mark.parametrize("count", [5, 20, 39, 41])
def test_the_sample_is_spread_over_all_texts(count):
    texts = {str(index): "x" for index in range(count)}
    side = _Listed(texts)
    examine(side, [Side("b", side.table, None, side.tokenizer, texts)], limit=20)
    seen = [int(id) for id in side.seen]
    assert len(seen) == len(set(seen)) == min(count, 20)
    gaps = np.diff([*seen, count])
    assert gaps.max() - gaps.min() <= 1


def test_a_target_without_distributions_does_not_make_a_captured_source_poor(work, contents):
    found = examine(
        open_side(str(work / "models" / "target"), contents), [open_side(str(work / "stores" / "a"), None)]
    ).sources[0]
    assert math.isnan(figures(found.diagnosis)["texts won"])
    assert not any("texts: min_ce" in line for line in found.advice)


def test_the_map_is_made_with_the_tokenizer_of_the_captured_model_or_the_report_says_so(work):
    store = str(work / "stores" / "target")
    sources = [open_side(str(work / "stores" / "a"), None)]
    assert examine(open_target(store, None), sources).notes == []
    moved = _without_model(work)
    assert ["--tokenizer" in note for note in examine(open_target(moved, None), sources).notes] == [True]
    assert examine(open_target(moved, None, str(work / "models" / "target")), sources).notes == []
    assert examine(open_target(moved, None), sources, vocabulary_map="exact").notes == []


def _without_model(work):
    """A store like the target's, whose model's folder no longer exists."""
    model = shutil.copytree(work / "models" / "target", work / "gone" / "target")
    settings = {"model": str(model), "texts": str(work / "texts.jsonl"), "top_k": 32}
    capture_texts(CaptureConfig(**settings, out=str(work / "moved")))
    shutil.rmtree(work / "gone")
    return str(work / "moved")


def test_the_tokenizer_of_another_model_is_refused(work):
    with pytest.raises(MismatchError, match="Name the one it was captured with"):
        open_target(str(work / "stores" / "target"), None, str(work / "models" / "a"))


def test_a_tokenizer_beside_a_target_that_is_one_is_refused(work):
    with pytest.raises(ConfigError, match="leave out --tokenizer"):
        open_target(str(work / "models" / "target"), {"0": "x"}, str(work / "models" / "target"))


def test_no_distribution_means_no_score(work, contents):
    side = open_side(str(work / "models" / "a"), contents)
    record = side.record("0")
    assert math.isnan(record.ce_per_byte)
    assert np.isnan(record.topk.token_logprobs).all()


def test_sources_of_different_domains_are_examined_on_their_own_texts_and_counted_by_domain(work, tmp_path):
    rows = [
        {
            "id": f"{domain}{n}",
            "text": f"{domain}: {n} apples and {n} more.",
            **({"domain": domain} if domain != "instruction" else {}),
        }
        for domain in ("math", "code", "instruction")
        for n in range(4)
    ]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wheres = {"target": None, "a": {"domain": "math"}, "b": {"domain": ["code", "instruction"]}}
    for name, where in wheres.items():
        settings = {"model": str(work / "models" / name), "texts": str(texts), "top_k": 16, "where": where}
        capture_texts(CaptureConfig(**settings, out=str(tmp_path / name)))
    target, *sources = [open_side(str(tmp_path / name), None) for name in wheres]
    report = examine(target, sources, texts=open_texts(texts))
    assert [source.diagnosis.texts for source in report.sources] == [4, 8]
    assert report.texts == 12
    assert any("no text in common" in note for note in report.notes)
    assert {domain: set(counts) - {"(no source)"} for domain, counts in report.taught.items()} == {
        "math": {"a"}, "code": {"b"}, "instruction": {"b"},
    }  # fmt: skip
    for source in report.sources:
        taught = sum(counts.get(source.diagnosis.name, 0) for counts in report.taught.values())
        assert taught == source.diagnosis.projection.used
    # Both have these texts: in each the one with the lower cross-entropy would teach.
    both = examine(target, [target, sources[0]], texts=open_texts(texts))
    assert set(both.taught) == {"math"}
    costs = [[side.store[f"math{n}"].ce_per_byte for side in (target, sources[0])] for n in range(4)]
    best = sum(target_ce <= own for target_ce, own in costs)
    lines = list(taught_lines(both))
    assert len(lines) == 1
    assert lines[0].startswith("math: of ")
    assert ("target" in lines[0], "a " in lines[0].partition("teach ")[2]) == (best > 0, best < 4)
