"""A record belongs to the weights beside it; a page shows names from anywhere as text."""

import json
import re
import shutil
from html.parser import HTMLParser

import merging
import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner
from merging import config_of, run_merge
from safetensors.torch import load_file, save_file

from fusion_plugins.errors import ConfigError, DataError, MergeError
from fusion_plugins.mergekit.record import CARD_HEADING, MergeRecord, append_card, read_record
from fusion_plugins.mergekit.report import render_merge_report


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return merging.make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def merged(models, tmp_path_factory):
    return run_merge(tmp_path_factory.mktemp("merged"), config_of(models, "one", "two"))


@pytest.fixture
def copy(merged, tmp_path):
    """A copy of a merged model, with a page, as it lies on another machine."""
    folder = tmp_path / "out"
    shutil.copytree(merged, folder, copy_function=shutil.copy)
    (folder / "fusion_report.html").write_text(render_merge_report(folder))
    return folder


def traces(folder):
    card = folder / "README.md"
    section = card.exists() and CARD_HEADING in card.read_text()
    return [name for name in ("fusion_merge.json", "fusion_report.html") if (folder / name).exists()] + [section]


def test_a_copied_model_keeps_its_record(copy):
    assert read_record(copy)["method"] == "varm"
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert "<svg" in render_merge_report(copy)


@pytest.mark.parametrize("flags", [[], ["--no-write-model-card"]])
def test_another_merge_into_the_folder_removes_what_described_the_old_weights(models, copy, flags):
    run_merge(copy.parent, config_of(models, "one", "two", method="linear", parameters={"weight": 1.0}), *flags)
    assert traces(copy) == [False]
    with pytest.raises(DataError, match=r"expected a merged model with fusion_merge\.json, got no such file"):
        render_merge_report(copy)


def test_a_merge_of_files_into_the_folder_removes_it_too(models, copy, tmp_path):
    from mergekit.scripts.merge_raw_pytorch import main

    files = [str(models[name] / "model.safetensors") for name in ("base", "one")]
    config = {"merge_method": "linear", "models": [{"model": file, "parameters": {"weight": 1.0}} for file in files]}
    path = tmp_path / "raw.yml"
    path.write_text(yaml.safe_dump(config))
    assert CliRunner().invoke(main, [str(path), str(copy)]).exit_code == 0
    assert traces(copy) == [False]


def test_a_merge_that_ends_between_weights_and_record_leaves_no_record(models, copy, monkeypatch):
    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(MergeRecord, "write", killed)
    with pytest.raises(BaseException):  # noqa: B017, PT011 - what click makes of it
        run_merge(copy.parent, config_of(models, "one", parameters={"granularity": "layer"}))
    assert traces(copy) == [False]
    with pytest.raises(DataError, match="nor does a merge that did not finish"):
        render_merge_report(copy)


@pytest.mark.parametrize(
    "wrong", [{"out_dtpe": "float32"}, {"base_model": "nowhere/model"}, {"tokenizer": {"source": "nowhere/model"}}]
)
def test_a_merge_that_is_refused_leaves_the_old_weights_and_their_record(models, copy, wrong):
    with pytest.raises((ConfigError, MergeError)):
        run_merge(copy.parent, config_of(models, "one", "two") | wrong)
    assert "<svg" in render_merge_report(copy)


def changed_element(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CHANGES = {
    "one_element": changed_element,
    "other_weights": lambda folder: save_file(tiny.tensors_of(folder), folder / "model.safetensors"),
    "another_shard_beside_it": lambda folder: save_file({"w": torch.ones(1)}, folder / "model-2.safetensors"),
    "pickled_now": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "no_weights": lambda folder: (folder / "model.safetensors").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_record_of_other_weights_is_refused(copy, change):
    CHANGES[change](copy)
    with pytest.raises(DataError, match="expected the record of the weights in .*, got that of others"):
        render_merge_report(copy)


def edited(**values):
    return lambda record: record | values


@pytest.mark.parametrize(
    "edit",
    [
        edited(format=1),
        edited(tensors=[]),
        edited(tensors=[{"name": "w"}]),
        edited(models=[]),
        edited(models="one"),
        edited(mean_weights={}),
        edited(weights=None),
        edited(versions=[1]),
        lambda record: [record],
        lambda record: record | {"tensors": [record["tensors"][0] | {"layer": "elsewhere"}]},
        lambda record: record | {"tensors": [record["tensors"][0] | {"weights": {"a": float("nan")}}]},
    ],
)
def test_a_record_that_is_none_is_one_sentence(copy, edit):
    path = copy / "fusion_merge.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=r"Merge again|Merge\s+again"):
        render_merge_report(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'{"format": 2}'])
def test_bytes_that_are_no_record_are_one_sentence(copy, content):
    (copy / "fusion_merge.json").write_bytes(content)
    with pytest.raises(DataError, match="Merge\\s+again"):
        render_merge_report(copy)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(
        DataError, match=f"{tmp_path / 'nowhere'}: expected the folder of a merged model, got no folder"
    ):
        render_merge_report(tmp_path / "nowhere")


NAMES = ["<script>alert(1)</script>", "$x^{2$ $\\frac$", "a|b\n# c", "[/bold]\x1b[31m", "模型 \ud83d"]


class Page(HTMLParser):
    """Collects the elements, and the tables that have no box that scrolls around them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.unboxed = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.unboxed += ("div", "wide") not in self.open
        if tag in ("div", "figure"):
            self.open.append((tag, dict(attrs).get("class")))

    def handle_endtag(self, tag):
        if tag in ("div", "figure"):
            self.open.pop()


@pytest.fixture
def odd_names(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    record = MergeRecord(tmp_path, "varm", NAMES[0], NAMES, {"merge_method": "varm", "base_model": NAMES[0]})
    for layer in range(2):
        for number, name in enumerate(NAMES):
            full = f"layers.{layer}.{name}"
            weights = {model: 0.2 + 0.01 * (index == number) for index, model in enumerate(NAMES)}
            record.add(full, weights, weights, layer=f"layers.{layer}", module=full, elements=2)
    record.add(NAMES[0], dict.fromkeys(NAMES, 0.2), {}, layer=None, module="", elements=2)
    record.write()
    return tmp_path


def test_names_from_anywhere_are_text_in_the_page(odd_names):
    text = render_merge_report(odd_names)
    page = Page(text)
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "\x1b" not in text
    text.encode()  # no halves of surrogate pairs
    assert [tag for tag, _ in page.elements].count("svg") == len(NAMES)


def test_the_page_fits_a_phone_and_the_dark(odd_names):
    text = render_merge_report(odd_names)
    page = Page(text)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    assert "prefers-color-scheme: dark" in text
    assert page.unboxed == 0
    assert all("scope" in attrs for tag, attrs in page.elements if tag == "th")
    assert not [tag for tag, _ in page.elements if tag == "img"]
    sizes = [float(size) for size in re.findall(r"font: ([\d.]+)px", text)]
    assert min(sizes) >= 9


def test_names_from_anywhere_are_one_line_of_text_in_the_card(odd_names):
    card = odd_names / "README.md"
    card.write_text("# Model\n")
    append_card(odd_names)
    section = card.read_text().partition(CARD_HEADING)[2]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(NAMES)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    assert "<script>" not in section
    assert "\x1b" not in section
