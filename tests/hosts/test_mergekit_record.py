"""What a merge leaves behind: fusion_merge.json, a section in the model card, and the report on it."""

import json
import re

import merging
import pytest
import tiny
import torch
import yaml
from merging import config_of, run_merge
from typer.testing import CliRunner

from fusion_plugins.core.merging.varm import varm_weights
from fusion_plugins.errors import DataError
from fusion_plugins.mergekit.report import render_merge_report, summarize_merge
from fusion_plugins.reports.build import page_of
from fusion_plugins.reports.chain import Options


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return merging.make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def merged(models, tmp_path_factory):
    config = config_of(models, "one", "two", "same", dtype="float32", parameters={"granularity": "module"})
    return run_merge(tmp_path_factory.mktemp("merged"), config)


def weights_of(models, *tuned, **settings):
    return varm_weights(tiny.tensors_of(models["base"]), [tiny.tensors_of(models[name]) for name in tuned], **settings)


def test_the_record_holds_weights_statistics_parameters_and_versions(models, merged):
    record = json.loads((merged / "fusion_merge.json").read_text())
    assert record["method"] == "varm"
    assert record["base_model"] == str(models["base"])
    assert record["models"] == [str(models[name]) for name in ("one", "two", "same")]
    assert record["config"]["parameters"] == {"granularity": "module"}
    assert set(record["versions"]) == {"fusion-plugins", "mergekit", "torch"}
    expected = weights_of(models, "one", "two", "same", granularity="module")
    assert {entry["name"] for entry in record["tensors"]} == set(expected)
    for entry in record["tensors"]:
        assert list(entry["weights"].values()) == expected[entry["name"]].tolist()
        values = torch.tensor(list(entry["values"].values()), dtype=torch.float64)
        torch.testing.assert_close(values / values.sum(), expected[entry["name"]])
        assert entry["unit"] == entry["module"]
    head = next(entry for entry in record["tensors"] if entry["name"] == "lm_head.weight")
    assert head["layer"] is None
    assert head["elements"] == tiny.tensors_of(models["base"])["lm_head.weight"].numel()


def test_mean_weights_count_every_parameter_once(models, merged):
    record = json.loads((merged / "fusion_merge.json").read_text())
    expected = weights_of(models, "one", "two", "same", granularity="module")
    sizes = {name: tensor.numel() for name, tensor in tiny.tensors_of(models["base"]).items()}
    mean = sum(sizes[name] * weight for name, weight in expected.items()) / sum(sizes.values())
    assert list(record["mean_weights"].values()) == pytest.approx(mean.tolist())


def test_rows_are_recorded_by_mean_and_range(models, tmp_path):
    config = config_of(models, "one", "two", dtype="float32", parameters={"granularity": "row"})
    record = json.loads((run_merge(tmp_path, config) / "fusion_merge.json").read_text())
    expected = weights_of(models, "one", "two", granularity="row")
    entry = next(entry for entry in record["tensors"] if entry["name"] == "lm_head.weight")
    one = expected["lm_head.weight"][0]
    assert entry["weights"][str(models["one"])] == pytest.approx(float(one.mean()))
    assert entry["rows"][str(models["one"])] == pytest.approx([float(one.min()), float(one.max())])


def test_tensors_are_recorded_in_natural_order(tmp_path):
    models = merging.make_models(tmp_path, num_hidden_layers=11)
    record = json.loads((run_merge(tmp_path, config_of(models, "one", "two")) / "fusion_merge.json").read_text())
    layers = list(dict.fromkeys(entry["layer"] for entry in record["tensors"] if entry["layer"]))
    assert layers == [f"model.layers.{index}" for index in range(11)]


def test_the_model_card_gets_a_section_and_keeps_mergekits(models, merged):
    card = (merged / "README.md").read_text()
    assert "This is a merge of pre-trained language models created using [mergekit]" in card
    section = card[card.index("### How the models were weighted") :]
    assert all(f"| {models[name]} |" in section for name in ("one", "two", "same"))
    assert f"| {models['same']} | 0.000 |" in section
    assert card.count("### How the models were weighted") == 1


def test_no_card_is_made_where_none_is_wanted(models, tmp_path):
    out = run_merge(tmp_path, config_of(models, "one", "two"), "--no-write-model-card")
    assert not (out / "README.md").exists()
    assert (out / "fusion_merge.json").exists()


def test_other_methods_leave_no_record(models, tmp_path):
    config = config_of(models, "one", "two", method="linear", parameters={"weight": 1.0})
    out = run_merge(tmp_path, config)
    assert not (out / "fusion_merge.json").exists()
    assert "### How the models were weighted" not in (out / "README.md").read_text()


def test_the_report_is_one_page_with_a_picture_and_the_weights(models, merged):
    page = render_merge_report(merged)
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert page.count("<svg") == 3
    record = json.loads((merged / "fusion_merge.json").read_text())
    for model in record["models"]:
        assert f"{record['mean_weights'][model]:.3f}" in page
    for name in ("one", "two", "same", "model.embed_tokens.weight", "lm_head.weight"):
        assert name in page


def test_the_page_of_a_run_has_the_heat_maps_of_its_merge(models, merged, tmp_path):
    steps = [{"name": "merge", "command": "mergekit-yaml", "writes": [str(merged)]}]
    (tmp_path / "fusion.yml").write_text(yaml.safe_dump({"steps": steps}))
    page = page_of(tmp_path, Options())
    alone = render_merge_report(merged)
    assert "Merge: merge" in page
    assert page.count("<svg") == alone.count("<svg") == 3
    record = json.loads((merged / "fusion_merge.json").read_text())
    for model in record["models"]:
        assert f"{record['mean_weights'][model]:.3f}" in page


def test_the_report_compares_with_a_plain_mean():
    """Half the parameters at (0.9, 0.1), half at (0.5, 0.5): the mean distance is half of 0.4."""
    tensors = [
        {"name": f"layers.{i}.w", "layer": f"layers.{i}", "module": "w", "elements": 10, "weights": w, "values": w}
        for i, w in enumerate(({"a": 0.9, "b": 0.1}, {"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 0.0}))
    ]
    summary = summarize_merge({"models": ["a", "b"], "mean_weights": {"a": 0.7, "b": 0.3}, "tensors": tensors})
    assert summary.distance == pytest.approx(0.2)
    assert summary.farthest[0] == (pytest.approx(0.4), "layers.0.w")
    assert summary.extremes[0][0][0] == (0.5, "layers.1.w")
    assert summary.extremes[0][1][0] == (0.9, "layers.0.w")
    assert 1.38 < summary.effective < 2
    assert summary.unchanged == ["layers.2.w"]


def test_the_command_writes_the_page(merged, tmp_path):
    from fusion_plugins.cli import app

    result = CliRunner().invoke(app, ["report", str(merged), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_one_model_and_models_of_one_name_are_drawn(models, tmp_path):
    same_name = tmp_path / "other" / "one"
    tiny.llama_checkpoint(same_name, seed=5, moved=1e-2, base=models["base"])
    for index, names in enumerate((("one",), ("one", "other"))):
        config = config_of(models | {"other": same_name}, *names)
        page = render_merge_report(run_merge(tmp_path, config, name=f"out{index}"))
        assert (str(same_name) in page) == (len(names) == 2)


def test_a_folder_without_anything_to_report_on_is_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}: expected a merged model with fusion_merge.json"):
        render_merge_report(tmp_path)
    (tmp_path / "fusion_merge.json").write_text('{"format": 7}')
    with pytest.raises(DataError, match="expected format 2 .*, got format 7"):
        render_merge_report(tmp_path)
