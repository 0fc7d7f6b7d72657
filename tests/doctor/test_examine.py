"""`fusion doctor` on real stores and on tokenizers alone."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
from records import record_of
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.core.fusion.accounting import ProjectionReport
from fusion_plugins.core.fusion.project import ProjectionOptions
from fusion_plugins.core.fusion.types import VocabularyMap
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.doctor.advice import advice, verdict
from fusion_plugins.doctor.diagnosis import ClassCount, Diagnosis, diagnose, figures
from fusion_plugins.doctor.examine import Side, examine, open_side, open_target
from fusion_plugins.doctor.label_classes import CLASSES, label_classes, token_classes
from fusion_plugins.doctor.page import sections
from fusion_plugins.errors import ConfigError, MismatchError

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
    assert found["sources"][0]["captured"] is True
    assert found["sources"][0]["figures"]["coverage"] > 0
    assert found["notes"] == []
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
    assert found["sources"][0]["captured"] is False
    assert found["sources"][0]["diagnosis"]["ce_per_byte"] is None
    assert found["sources"][0]["figures"]["texts won"] is None
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("一二三四", "cjk"),
        ("한국", "cjk"),
        ("👩🎉", "other"),
        ("٣٤", "digits"),
        ("12", "digits"),
        ("\n\n", "white space"),
        ("é", "other"),
    ],
)
@pytest.mark.parametrize("make", [tiny.byte_level, tiny.sentencepiece_bpe])
def test_a_label_has_the_class_of_its_character_even_where_the_token_is_only_a_part_of_it(make, text, expected):
    tokenizer = make()
    table = TokenTable.from_tokenizer(tokenizer)
    tokens = tokenize(tokenizer, table, f"x{text}x", append_eos=False)
    found = label_classes(tokens, table, token_classes(table))
    names = {
        CLASSES[index]
        for index, begin, end in zip(found, [0, *tokens.ends], tokens.ends, strict=False)
        if begin >= 1 and end <= len(text.encode()) + 1 and end > begin
    }
    assert names == {expected}


def test_special_tokens_are_a_class_of_their_own():
    tokenizer = tiny.byte_level()
    assert CLASSES[token_classes(TokenTable.from_tokenizer(tokenizer))[tokenizer.eos_token_id]] == "special"


SOUND = Diagnosis(
    name="a",
    texts=10,
    wins=8,
    ce_per_byte=0.5,
    target_ce_per_byte=0.7,
    overlap=0.5,
    mapped={"exact": 0.5, "edited": 0.5, "unmapped": 0.0},
    projection=ProjectionReport(rows=10, one_to_one=10, exact_mass=10.0),
    classes={"other": ClassCount(rows=10, used=10, gold=6.0, own=5.0)},
    vocab_size=420,
    top_k=10,
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wins": 0}, "leave it out"),
        ({"projection": ProjectionReport(rows=10, one_to_one=4, exact_mass=4.0)}, "different bytes"),
        ({"projection": ProjectionReport(rows=10, one_to_one=10, exact_mass=6.0, outside_mass=4.0)}, "larger top_k"),
        ({"projection": ProjectionReport(rows=10, one_to_one=10, exact_mass=6.0, unmapped_mass=4.0)}, "no counterpart"),
        ({"classes": {"other": ClassCount(rows=10, used=10, gold=1.0, own=5.0)}}, "lm_loss_weight"),
    ],
)
def test_each_complaint_names_the_setting_that_helps(change, words):
    assert advice(SOUND, ProjectionOptions()) == []
    assert verdict(SOUND, []) == "good"
    found = advice(replace(SOUND, **change), ProjectionOptions())
    assert any(words in line for line in found)
    assert verdict(replace(SOUND, **change), found) in ("fair", "poor")


@pytest.mark.parametrize(("top_k", "expected"), [(10, "(40)"), (256, "(1024)"), (900, "(2000)")])
def test_the_advised_top_k_is_larger_than_the_stored_one_and_no_more_than_the_vocabulary(top_k, expected):
    outside = ProjectionReport(rows=10, one_to_one=10, exact_mass=6.0, outside_mass=4.0)
    diagnosis = replace(SOUND, projection=outside, top_k=top_k, vocab_size=2000)
    assert expected in advice(diagnosis, ProjectionOptions())[0]


def test_a_store_of_the_whole_vocabulary_is_not_told_to_hold_more():
    outside = ProjectionReport(rows=10, one_to_one=10, exact_mass=6.0, outside_mass=4.0)
    assert advice(replace(SOUND, projection=outside, top_k=2000, vocab_size=2000), ProjectionOptions()) == []


def test_first_token_is_not_advised_where_it_is_set():
    unmapped = ProjectionReport(rows=10, one_to_one=10, exact_mass=6.0, unmapped_mass=4.0)
    by_edits = replace(SOUND, projection=unmapped, vocabulary="min_edit")
    assert "first_token" in advice(by_edits, ProjectionOptions())[0]
    assert "first_token" not in advice(replace(by_edits, vocabulary="first_token"), ProjectionOptions())[0]


def test_chain_correction_is_advised_where_digits_suffer():
    diagnosis = replace(SOUND, classes={"digits": ClassCount(rows=10, used=10, gold=1.0, own=5.0)})
    assert any("alignment.chain" in line for line in advice(diagnosis, ProjectionOptions(chain=False)))
    assert not any("alignment.chain" in line for line in advice(diagnosis, ProjectionOptions()))


def _certain(probability, id="0", text=TEXTS[1]):
    """A record of top_k 1 that gives every next token the same probability."""
    tokenizer = tiny.byte_level()
    tokens = tokenize(tokenizer, TokenTable.from_tokenizer(tokenizer), text)
    n = len(tokens.input_ids)
    logprobs = np.full(n, np.log(probability), np.float32)
    return record_of(id, tokens, np.append(tokens.input_ids[1:], 0)[:, None], logprobs[:, None], logprobs)


def _diagnose(pairs):
    table = TokenTable.from_tokenizer(tiny.byte_level())
    ids = np.arange(table.vocab_size, dtype=np.int32)
    return diagnose("a", pairs, (table, table), VocabularyMap(ids, np.zeros_like(ids), "identity"))


def test_equal_rows_give_the_label_equal_probability():
    found = _diagnose([(_certain(0.3), _certain(0.3))])
    assert found.total.used > 0
    assert found.total.gold == pytest.approx(found.total.own)
    assert found.total.gold == pytest.approx(0.3 * found.total.used)


def test_a_target_that_knows_the_labels_better_is_said_to_at_a_top_k_of_one():
    texts = [(_certain(0.1), _certain(0.5))] * 19 + [(_certain(0.6), _certain(0.5))]
    found = _diagnose(texts)
    assert found.wins == 1
    assert any("the target itself gives" in line for line in advice(found, ProjectionOptions()))


def test_the_store_of_the_target_is_named_as_such_and_not_judged(work):
    target = open_side(str(work / "stores" / "target"), None)
    shutil.copytree(work / "stores" / "target", work / "copy", dirs_exist_ok=True)
    found = examine(target, [open_side(str(work / "copy"), None)]).sources[0]
    assert found.diagnosis.is_target
    assert found.verdict == "own"
    assert ["is_target: true" in line for line in found.advice] == [True]


def test_another_model_with_the_tokenizer_of_the_target_is_a_source_that_needs_no_map():
    found = _diagnose([(_certain(0.3), _certain(0.2))])
    assert not found.is_target
    assert found.vocabulary == "identity"
    assert verdict(found, advice(found, ProjectionOptions())) != "own"


def test_the_table_says_that_a_source_with_the_tokenizer_of_the_target_needs_no_map(work):
    target = open_side(str(work / "stores" / "target"), None)
    table = dict(row for _, rows in sections(examine(target, [target])) for row in rows)
    assert table["map"] == ["none needed: the same tokenizer"]


class _Listed(Side):
    """A side of which only the ids count."""

    def __init__(self, texts):
        tokenizer = tiny.byte_level()
        super().__init__("a", TokenTable.from_tokenizer(tokenizer), None, tokenizer, texts)
        self.seen = []

    def record(self, id):
        self.seen.append(id)
        return super().record(id)


@pytest.mark.parametrize("count", [5, 20, 39, 41])
def test_the_sample_is_spread_over_all_texts(count):
    side = _Listed({str(index): "x" for index in range(count)})
    examine(side, [Side("b", side.table, None, side.tokenizer, side._texts)], limit=20)
    seen = [int(id) for id in side.seen]
    assert len(seen) == len(set(seen)) == min(count, 20)
    gaps = np.diff([*seen, count])
    assert gaps.max() - gaps.min() <= 1


def test_one_tokenizer_among_stores_leaves_the_figures_of_the_others(work):
    contents = {str(index): text for index, text in enumerate(TEXTS)}
    target = open_target(str(work / "stores" / "target"), contents)
    sources = [open_side(str(work / path), contents) for path in ("stores/a", "models/b")]
    report = examine(target, sources)
    table = dict(row for _, rows in sections(report) for row in rows)
    assert [value == "-" for value in table["CE per byte"]] == [False, True]
    assert [value == "-" for value in table["texts won"]] == [False, True]
    assert [value == "-" for value in table["CE per byte, target"]] == [False, False]
    assert table["store, bytes per token"][1].startswith("about ")


def test_a_target_without_distributions_does_not_make_a_captured_source_poor(work):
    contents = {str(index): text for index, text in enumerate(TEXTS)}
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
    assert examine(open_target(moved, None), sources, vocabulary="exact").notes == []


def _without_model(work):
    """A copy of the target's store whose model's folder is nowhere to be found."""
    folder = work / "moved"
    shutil.copytree(work / "stores" / "target", folder, dirs_exist_ok=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"model": "gone/target"}))
    return str(folder)


def test_the_tokenizer_of_another_model_is_refused(work):
    with pytest.raises(MismatchError, match="Name the one it was captured with"):
        open_target(str(work / "stores" / "target"), None, str(work / "models" / "a"))


def test_a_tokenizer_beside_a_target_that_is_one_is_refused(work):
    with pytest.raises(ConfigError, match="leave out --tokenizer"):
        open_target(str(work / "models" / "target"), {"0": "x"}, str(work / "models" / "target"))


def test_no_distribution_means_no_score(work):
    side = open_side(str(work / "models" / "a"), {"0": TEXTS[0]})
    record = side.record("0")
    assert math.isnan(record.ce_per_byte)
    assert np.isnan(record.topk.token_logprobs).all()


def test_settings_may_come_from_a_file_and_the_last_store_is_the_target(work):
    stores = work / "stores"
    config = work / "doctor.yml"
    config.write_text(f"sources: [{stores / 'a'}, {stores / 'target'}]\nlimit: 2\nout: {work / 'from-file'}\n")
    result = _doctor("--config", config, "--limit", 3)
    assert result.exit_code == 0, result.output
    found = json.loads((work / "from-file" / "doctor.json").read_text())
    assert (found["target"], found["texts"]) == ("target", 3)
    config.write_text("sorces: []\n")
    assert "unknown key sorces; known keys: chain, limit, out" in str(_doctor("--config", config).exception)
    assert "at least one source" in str(_doctor(stores / "a").exception)
