"""`fusion doctor` as a command: what it reads, writes and refuses."""

import copy
import json
import sys
from pathlib import Path

import pytest
import tiny
from tokenizers import normalizers
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.doctor.examine import DoctorConfig


def _doctor(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def test_stores_give_figures_a_page_and_a_picture(work, contents):
    stores = work / "stores"
    result = _doctor(stores / "a", stores / "b", "--target", stores / "target", "--out", work / "out")
    assert result.exit_code == 0, result.output
    found = json.loads((work / "out" / "doctor.json").read_text())
    assert [source["diagnosis"]["name"] for source in found["sources"]] == ["a", "b"]
    assert found["texts"] == len(contents)
    assert found["vocabulary_map"] == "first_token"
    assert found["sources"][0]["captured"] is True
    assert found["sources"][0]["figures"]["coverage"] > 0
    assert {"positions", "used", "gold", "own", "top1"} == set(found["sources"][0]["diagnosis"]["classes"]["other"])
    assert found["notes"] == []
    assert (work / "out" / "doctor.png").read_bytes().startswith(b"\x89PNG")
    page = (work / "out" / "doctor.html").read_text()
    assert page.count("<svg role=") == 2
    assert "http" not in page
    assert "coverage" in result.output
    assert "target: " not in result.output


def test_without_the_packages_of_the_page_the_figures_are_written_all_the_same(work, monkeypatch):
    stores = work / "stores"
    for name in ("jinja2", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    result = _doctor(stores / "a", "--target", stores / "target", "--out", work / "no-page")
    assert result.exit_code == 0, result.output
    assert "no page was written: it needs the package" in result.output
    assert sorted(path.name for path in (work / "no-page").iterdir()) == ["doctor.json"]


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
    assert 0.5 < found["sources"][0]["diagnosis"]["projection"]["positions"]
    assert ["a tokenizer (a) is examined" in note for note in found["notes"]] == [True]


def test_settings_may_come_from_a_file_and_the_last_store_is_the_target(work):
    stores = work / "stores"
    config = work / "doctor.yml"
    config.write_text(f"sources: [{stores / 'a'}, {stores / 'target'}]\nlimit: 2\nout: {work / 'from-file'}\n")
    result = _doctor("--config", config, "--limit", 3)
    assert result.exit_code == 0, result.output
    assert f"target: {stores / 'target'}" in result.output
    found = json.loads((work / "from-file" / "doctor.json").read_text())
    assert (found["target"], found["texts"]) == ("target", 3)
    config.write_text("sorces: []\n")
    assert "unknown key; known keys: chain, columns, limit, out" in str(_doctor("--config", config).exception)
    assert "at least one source" in str(_doctor(stores / "a").exception)


def test_every_setting_may_be_set_by_its_key(work):
    stores = work / "stores"
    assigned = ["--set", "vocabulary_map=exact", "--set", "chain=false", "--set", f"out={work / 'assigned'}"]
    result = _doctor(stores / "a", "--target", stores / "target", *assigned)
    assert result.exit_code == 0, result.output
    found = json.loads((work / "assigned" / "doctor.json").read_text())
    assert found["vocabulary_map"] == found["sources"][0]["diagnosis"]["vocabulary_map"] == "exact"
    projection = found["sources"][0]["diagnosis"]["projection"]
    assert projection["gold_mass"] == projection["edited_mass"] == 0


@pytest.mark.parametrize("flags", [["--vocabulary-map", "exact", "--no-chain"], []])
def test_flags_override_the_file(work, flags):
    stores = work / "stores"
    config = work / "flags.yml"
    config.write_text("vocabulary_map: min_edit\nchain: true\n")
    out = work / "flags"
    result = _doctor(stores / "a", "--target", stores / "target", "--config", config, *flags, "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "doctor.json").read_text())
    assert found["vocabulary_map"] == ("exact" if flags else "min_edit")
    assert (found["sources"][0]["diagnosis"]["projection"]["gold_mass"] == 0) is bool(flags)


def test_the_old_names_of_the_vocabulary_map_are_refused_with_the_new_ones(work):
    store = work / "stores" / "a"
    config = work / "old.yml"
    config.write_text(f"sources: [{store}, {store}]\nvocabulary: exact\n")
    assert "vocabulary is now vocabulary_map" in str(_doctor("--config", config).exception)
    result = _doctor(store, store, "--vocabulary", "exact")
    assert result.exit_code == 2
    assert "--vocabulary-map" in result.output


def test_every_key_is_in_the_document():
    table = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text().partition("## Figures")[0]
    for key in DoctorConfig.model_fields:
        assert f"`{key}`" in table or f"`--{key.replace('_', '-')}`" in table, key


def test_maps_by_counts_are_refused_because_they_are_made_in_training(work):
    store = work / "stores" / "a"
    error = str(_doctor(store, store, "--vocabulary-map", "statistics").exception)
    assert "vocabulary_map: Input should be 'first_token', 'min_edit' or 'exact', got 'statistics'" in error


def test_a_tokenizer_that_loses_text_is_refused_and_known_changes_are_noted(work):
    deaf = copy.deepcopy(tiny.byte_level())
    deaf.backend_tokenizer.normalizer = normalizers.Lowercase()
    deaf.save_pretrained(work / "deaf")
    target = work / "models" / "target"
    texts = ("--texts", work / "texts.jsonl", "--out", work / "losses")
    result = _doctor(work / "deaf", "--target", target, *texts)
    assert result.exit_code == 1
    assert "loses or changes capital letters" in str(result.exception)
    composing = copy.deepcopy(tiny.byte_level())
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    composing.save_pretrained(work / "composing")
    assert _doctor(work / "composing", "--target", target, *texts).exit_code == 0
    notes = json.loads((work / "losses" / "doctor.json").read_text())["notes"]
    assert "The tokenizer of composing changes texts: NFC." in notes
