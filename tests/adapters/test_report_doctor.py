"""`fusion doctor` on real stores and on tokenizers alone."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.core.accounting import ProjectionReport
from fusion_plugins.core.project import ProjectionOptions
from fusion_plugins.core.token_table import TokenTable
from fusion_plugins.errors import ConfigError, MismatchError
from fusion_plugins.report.diagnosis import CLASSES, ClassCount, Diagnosis, advice, label_classes, verdict
from fusion_plugins.report.doctor import examine, open_side

TEXTS = [
    "def area(width, height):\n    return width * height\n",
    "Ann has 12 apples and buys 345 more. She has 357 apples.",
    "中文数学题：小明有十二个苹果。",
    "Plain prose, with a comma; and a naïve café.",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    from fusion_plugins.sources.capture import CaptureConfig, capture_texts

    folder = tmp_path_factory.mktemp("doctor")
    lines = [json.dumps({"id": str(index), "text": text}) for index, text in enumerate(TEXTS)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    (folder / "others.jsonl").write_text(json.dumps({"id": "elsewhere", "text": "something else"}))
    models = {"target": tiny.byte_level(), "a": tiny.sentencepiece_bpe(), "b": tiny.digit_splitting()}
    for seed, (name, tokenizer) in enumerate(models.items()):
        tiny.llama_checkpoint(folder / "models" / name, seed=seed, tokenizer=tokenizer)
        _capture(capture_texts, CaptureConfig, folder, name, "texts", name)
    _capture(capture_texts, CaptureConfig, folder, "a", "others", "other-texts")
    return folder


def _capture(capture_texts, config, folder, model, texts, out):
    settings = {"model": str(folder / "models" / model), "texts": str(folder / f"{texts}.jsonl"), "top_k": 32}
    capture_texts(config(**settings, out=str(folder / "stores" / out)))


def _doctor(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def test_stores_give_figures_a_page_and_a_picture(work):
    stores = work / "stores"
    result = _doctor(stores / "a", stores / "b", "--target", stores / "target", "--out", work / "out")
    assert result.exit_code == 0, result.output
    found = json.loads((work / "out" / "doctor.json").read_text())
    assert [source["diagnosis"]["name"] for source in found["sources"]] == ["a", "b"]
    assert found["texts"] == len(TEXTS)
    assert found["scored"] is True
    assert (work / "out" / "doctor.png").read_bytes().startswith(b"\x89PNG")
    page = (work / "out" / "doctor.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert "coverage" in result.output


def test_every_supervised_row_is_in_one_class(work):
    sides = [open_side(str(work / "stores" / name), None) for name in ("target", "a")]
    diagnosis = examine(sides[0], sides[1:]).sources[0].diagnosis
    assert sum(count.rows for count in diagnosis.classes.values()) == diagnosis.projection.rows
    assert sum(count.used for count in diagnosis.classes.values()) == diagnosis.projection.used
    assert diagnosis.classes["digits"].rows > 0
    assert diagnosis.classes["cjk"].rows > 0
    assert diagnosis.classes["white space"].rows > 0


def test_the_target_as_its_own_source_is_covered_and_gives_its_own_probabilities(work):
    target = open_side(str(work / "stores" / "target"), None)
    report = examine(target, [target], options=ProjectionOptions(chain=False, tail="ignore"))
    diagnosis = report.sources[0].diagnosis
    assert diagnosis.projection.coverage == 1.0
    assert diagnosis.wins == 0
    assert diagnosis.overlap == 1.0
    held = diagnosis.total
    assert 0.0 < held.gold <= held.own + 1e-3


def test_tokenizers_with_texts_give_coverage_without_scores(work):
    models = work / "models"
    result = _doctor(
        models / "a", "--target", models / "target", "--texts", work / "texts.jsonl", "--out", work / "tokenizers"
    )
    assert result.exit_code == 0, result.output
    found = json.loads((work / "tokenizers" / "doctor.json").read_text())
    assert found["scored"] is False
    assert found["sources"][0]["diagnosis"]["ce_per_byte"] is None
    assert 0.5 < found["sources"][0]["diagnosis"]["projection"]["rows"]


def test_tokenizers_and_stores_agree_on_coverage(work):
    contents = dict(enumerate(TEXTS))
    contents = {str(index): text for index, text in contents.items()}
    by_store = examine(*_sides(work, "stores", None)).sources[0].diagnosis
    by_tokenizer = examine(*_sides(work, "models", contents)).sources[0].diagnosis
    assert by_store.projection.rows == by_tokenizer.projection.rows
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


def test_labels_fall_into_the_class_of_their_bytes():
    tokenizer = tiny.byte_level()
    table = TokenTable.from_tokenizer(tokenizer)
    classes = label_classes(table)
    assert CLASSES[classes[tokenizer.eos_token_id]] == "special"
    for token in tokenizer("7 x")["input_ids"][-3:]:
        data = table.tokens[token]
        expected = "digits" if b"7" in data else "white space" if data.isspace() else "other"
        if table.role_of(token) is None:
            assert CLASSES[classes[token]] == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wins": 0}, "leave it out"),
        ({"projection": ProjectionReport(rows=10, one_to_one=4, exact_mass=4.0)}, "different bytes"),
        ({"projection": ProjectionReport(rows=10, one_to_one=10, exact_mass=6.0, outside_mass=4.0)}, "larger top_k"),
        ({"projection": ProjectionReport(rows=10, one_to_one=10, exact_mass=6.0, unmapped_mass=4.0)}, "first_token"),
        ({"classes": {"other": ClassCount(rows=10, used=10, gold=1.0, own=5.0)}}, "lm_loss_weight"),
    ],
)
def test_each_complaint_names_the_setting_that_helps(change, words):
    sound = Diagnosis(
        name="a",
        texts=10,
        wins=8,
        ce_per_byte=0.5,
        target_ce_per_byte=0.7,
        overlap=0.5,
        mapped={"exact": 0.5, "edited": 0.5, "unmapped": 0.0},
        projection=ProjectionReport(rows=10, one_to_one=10, exact_mass=10.0),
        classes={"other": ClassCount(rows=10, used=10, gold=6.0, own=5.0)},
    )
    assert advice(sound, ProjectionOptions(), 10) == []
    assert verdict(sound, []) == "good"
    found = advice(replace(sound, **change), ProjectionOptions(), 10)
    assert any(words in line for line in found)
    assert verdict(replace(sound, **change), found) in ("fair", "poor")


def test_chain_correction_is_advised_where_digits_suffer():
    digits = {"digits": ClassCount(rows=10, used=10, gold=1.0, own=5.0)}
    report = ProjectionReport(rows=10, one_to_one=10, exact_mass=10.0)
    diagnosis = Diagnosis("a", 10, 8, 0.5, 0.7, 1.0, {}, report, digits)
    assert any("alignment.chain" in line for line in advice(diagnosis, ProjectionOptions(chain=False), 10))


def test_no_distribution_means_no_score(work):
    side = open_side(str(work / "models" / "a"), {"0": TEXTS[0]})
    record = side.record("0")
    assert math.isnan(record.ce_per_byte)
    assert np.isnan(record.token_logprobs).all()
