"""What would be a silent plain fine-tune ends with an error: each case runs axolotl's own command."""

import json

import axolotl_runs as runs
import pytest
from axolotl_runs import FUSED, PLUGIN, config, forget_plugins, write_config
from click.testing import CliRunner

from fusion_plugins.errors import ConfigError, DataError, MismatchError, PluginError


@pytest.fixture
def axolotl_train(material, run_folder):
    """Runs `axolotl train` in this process; returns status and error."""
    from axolotl.cli.main import cli

    def train(**changes):
        forget_plugins()
        path = write_config(config(material, run_folder, **changes), run_folder)
        result = CliRunner().invoke(cli, ["train", str(path), "--launcher", "python"])
        return result.exit_code, result.exception

    return train


def refused(outcome, error, *parts):
    status, exception = outcome
    assert status != 0
    assert isinstance(exception, error), exception
    for part in parts:
        assert part in str(exception)


def test_the_same_command_without_a_fault_ends_with_status_0(axolotl_train):
    assert axolotl_train(max_steps=1) == (0, None)


def test_plugin_without_block(axolotl_train):
    refused(axolotl_train(fusion=None), ConfigError, "no `fusion:` block")


def test_block_without_plugin(axolotl_train):
    refused(axolotl_train(plugins=None), PluginError, f"plugins: [{PLUGIN}]")


def test_plugin_that_cannot_be_imported(axolotl_train, monkeypatch):
    import fusion_plugins.axolotl

    monkeypatch.setattr(fusion_plugins.axolotl, "__getattr__", raise_import_error)
    refused(axolotl_train(), PluginError, "could not load it")
    refused(axolotl_train(plugins=["fusion_plugin.axolotl.FusionPlugin"]), PluginError, f"plugins: [{PLUGIN}]")


def raise_import_error(name):
    # What an import of ours would raise if the package did not turn it into an error that axolotl does not swallow.
    raise ImportError(name)


def test_an_import_error_of_the_plugin_is_not_one_that_axolotl_swallows(monkeypatch):
    import sys

    import fusion_plugins.axolotl

    monkeypatch.setitem(sys.modules, "fusion_plugins.axolotl.plugin", None)
    with pytest.raises(PluginError, match="cannot be imported"):
        _ = fusion_plugins.axolotl.FusionPlugin


def test_missing_and_broken_stores_are_named_together(axolotl_train, material, run_folder):
    broken = run_folder / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    sources = [{"name": "gone", "store": "nowhere"}, {"name": "broken", "store": str(broken)}]
    refused(
        axolotl_train(fusion={"sources": sources}),
        ConfigError,
        "'gone': nowhere: expected a store or a folder of responses, got no folder",
        "'broken'",
        "damaged",
    )


def test_store_with_a_damaged_shard(axolotl_train, material, run_folder):
    import shutil

    store = shutil.copytree(material.folder / "texts-digits", run_folder / "damaged")
    shard = next(store.glob("*.parquet") if not list(store.glob("shard-*")) else store.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-40])
    status, error = axolotl_train(fusion={"sources": [{"name": "digits", "store": str(store)}]})
    assert status != 0
    assert "shard" in str(error)


def test_store_of_other_texts(axolotl_train, material, run_folder):
    rows = [json.loads(line) for line in material.texts.read_text().splitlines()]
    other_ids = runs.write_rows(run_folder / "ids.jsonl", [{"text": row["text"]} for row in rows])
    refused(axolotl_train(datasets=[{"path": str(other_ids), "type": FUSED}]), MismatchError, "24 of 24 are missing")
    rows[5]["text"] = rows[5]["text"].replace("No.", "Nr.")
    same_ids = runs.write_rows(run_folder / "texts.jsonl", rows)
    refused(axolotl_train(datasets=[{"path": str(same_ids), "type": FUSED}]), MismatchError, "'t5' is of another text")


def test_store_of_another_tokenizer_than_the_targets(axolotl_train, material):
    sources = [{"name": "digits", "store": str(material.folder / "texts-digits"), "is_target": True}]
    refused(
        axolotl_train(fusion={"sources": sources}), MismatchError, "is_target: true", "Capture it from `base_model`"
    )


def test_batch_without_targets(axolotl_train, run_folder):
    """axolotl takes rows that are tokens already as they are, whatever type the data set is said to have."""
    row = {"input_ids": [1, 5, 6, 7], "attention_mask": [1] * 4, "labels": [1, 5, 6, 7]}
    path = runs.write_rows(run_folder / "tokens.jsonl", [row] * 4)
    train = axolotl_train(datasets=[{"path": str(path), "type": FUSED}])
    refused(train, DataError, "expected a row with fused distributions")


def test_other_data_sets_among_the_fused_ones(axolotl_train, material):
    data = [{"path": str(material.texts), "type": FUSED}, {"path": str(material.texts), "type": "completion"}]
    refused(axolotl_train(datasets=data), ConfigError, "`type: completion`, which fuses nothing")
    data.pop()
    refused(axolotl_train(datasets=data, test_datasets=[{"path": "x", "type": "alpaca"}]), ConfigError, "alpaca")


def test_truncation(axolotl_train):
    refused(axolotl_train(excess_length_strategy="truncate"), ConfigError, "excess_length_strategy: truncate")


def test_all_problems_of_one_configuration_come_together(axolotl_train, material):
    fusion = {"lm_loss_weight": 2, "lost": True, "projection": {"vocabulary_map": "guess"}}
    refused(
        axolotl_train(fusion=fusion), ConfigError, "lm_loss_weight", "lost: unknown key", "projection.vocabulary_map"
    )
    refused(
        axolotl_train(fusion={"rule": "best", "loss": "hinge"}, excess_length_strategy="truncate", rl="dpo"),
        ConfigError,
        "fusion.rule: expected one of avg_ce, min_ce, token_min_ce, got 'best'",
        "fusion.loss",
        "rl: dpo",
        "truncate",
    )
    twice = material.sources("texts", "digits", "digits")
    refused(axolotl_train(fusion={"sources": twice}), ConfigError, "'digits' is given twice")


def test_settings_that_would_change_rows_behind_their_targets(axolotl_train):
    refused(
        axolotl_train(streaming=True, label_smoothing_factor=0.1), ConfigError, "streaming", "label_smoothing_factor"
    )


def test_rows_that_are_no_text(axolotl_train, run_folder):
    path = runs.write_rows(run_folder / "odd.jsonl", [{"id": "a", "body": "text"}])
    refused(axolotl_train(datasets=[{"path": str(path), "type": FUSED}]), DataError, "'text'", "id, body")


def test_a_missing_store_stops_the_real_command(material, run_folder):
    settings = config(material, run_folder, fusion={"sources": [{"name": "gone", "store": "nowhere"}]})
    result = runs.command("train", str(write_config(settings, run_folder)), cwd=run_folder)
    assert result.returncode != 0
    assert "source 'gone': nowhere: expected a store or a folder" in result.stdout
