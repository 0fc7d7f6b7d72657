"""What would be a silent plain fine-tune ends with an error: each case runs axolotl's own command."""

import json

import axolotl_runs as runs
import pytest
from axolotl_runs import FUSED, PLUGIN, config, forget_plugins, prepare, train, write_config
from click.testing import CliRunner

from fusion_plugins.errors import ConfigError, DataError, MismatchError, PluginError

BEST = "fusion_plugins.axolotl.best_of_sources"
DPO = "fusion_plugins.multi_source_dpo"


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


TOKENS = {"input_ids": [1, 5, 6, 7], "attention_mask": [1] * 4, "labels": [1, 5, 6, 7]}


def test_batch_without_targets(axolotl_train, run_folder):
    """axolotl takes rows that are tokens already as they are, whatever type the dataset is said to have."""
    path = runs.write_rows(run_folder / "tokens.jsonl", [TOKENS] * 4)
    train = axolotl_train(datasets=[{"path": str(path), "type": FUSED}])
    refused(train, DataError, "expected a row with fused distributions")


def test_tokens_instead_of_responses(axolotl_train, run_folder):
    path = runs.write_rows(run_folder / "tokens.jsonl", [TOKENS] * 4)
    train = axolotl_train(datasets=[{"path": str(path), "type": BEST}], fusion={"sources": [], "sft": {}})
    refused(train, ConfigError, "tokens.jsonl has the columns attention_mask, input_ids, labels")


def test_a_folder_of_responses_as_test_dataset_needs_its_split(axolotl_train, run_folder):
    path = runs.row_folder(run_folder / "scored", runs.scored(3))
    entry = {"path": str(path), "type": DPO}
    block = {"sources": [], "pairs": {}}
    train = axolotl_train(datasets=[dict(entry)], test_datasets=[dict(entry)], fusion=block, rl="dpo")
    refused(train, ConfigError, "`split: train`")


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
        "fusion.rule: expected one of avg_ce, fixed_weights, min_ce, token_min_ce, got 'best'",
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


REFUSED = {
    "sequence_parallel_degree": 2,
    "context_parallel_size": 2,
    "streaming": True,
    "pretraining_dataset": "data",
    "skip_prepare_dataset": True,
    "do_bench_eval": True,
    "trainer_cls": "some.Trainer",
    "batch_flattening": True,
    "use_eaft": True,
    "reward_model": True,
    "process_reward_model": True,
    "processor_type": "AutoProcessor",
    "orpo_alpha": 0.1,
}


def test_settings_that_axolotl_would_ignore_or_fail_on_later_are_refused_together(axolotl_train):
    status, error = axolotl_train(**REFUSED)
    assert status != 0
    assert isinstance(error, ConfigError)
    assert [key for key in REFUSED if key not in str(error)] == []
    assert str(error).startswith(f"{len(REFUSED)} problem(s)")


@pytest.mark.parametrize("key", ["streaming", "skip_prepare_dataset", "pretraining_dataset", "reward_model"])
def test_settings_that_keep_best_answers_from_being_chosen_are_refused(axolotl_train, run_folder, key):
    path = runs.write_rows(run_folder / "scored.jsonl", runs.scored(3))
    best = {"datasets": [{"path": str(path), "type": BEST}], "fusion": {"sources": [], "sft": {}}}
    refused(axolotl_train(**best, **{key: REFUSED[key]}), ConfigError, f"{key} cannot be combined", "best_of_sources")


KD = "axolotl.integrations.kd.KDPlugin"
DIFFUSION = "axolotl.integrations.diffusion.DiffusionPlugin"


THEIRS = """
from axolotl.integrations.base import BasePlugin

class Trainer(BasePlugin):
    def get_trainer_cls(self, cfg):
        return int

class Collator(BasePlugin):
    def get_collator_cls_and_kwargs(self, cfg, is_eval=False):
        return int, {}
"""


@pytest.mark.parametrize("other", [KD, DIFFUSION, "their_plugins.Trainer", "their_plugins.Collator"])
@pytest.mark.parametrize("first", [True, False], ids=["before ours", "behind ours"])
def test_another_plugin_with_a_trainer_is_refused_by_name(axolotl_train, run_folder, monkeypatch, other, first):
    (run_folder / "their_plugins.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(run_folder))
    plugins = [other, PLUGIN] if first else [PLUGIN, other]
    refused(axolotl_train(plugins=plugins, kd_trainer=True), ConfigError, PLUGIN, f"{other} brings a trainer")


def test_another_plugin_without_a_trainer_is_not_refused(axolotl_train):
    assert axolotl_train(plugins=[PLUGIN, "axolotl.integrations.spectrum.SpectrumPlugin"], max_steps=1) == (0, None)


@pytest.mark.parametrize("rl", [None, "dpo"])
def test_a_block_without_a_dataset_of_ours_is_refused(axolotl_train, run_folder, rl):
    path = runs.write_rows(run_folder / "stock.jsonl", [{"text": "a"}])
    stock = {"datasets": [{"path": str(path), "type": "chatml.intel" if rl else "completion"}], "rl": rl}
    for block in ({"sft": {}}, {"pairs": {}}, {"split": {}}, {"sft": {}, "keep_truncated": True}):
        refused(axolotl_train(fusion={"sources": []} | block, **stock), ConfigError, "no dataset has one of the types")


def test_best_answers_train_beside_a_stock_dataset(axolotl_train, material, run_folder):
    scored = runs.row_folder(run_folder / "scored", runs.scored(4))
    data = [{"path": str(scored), "type": BEST}, {"path": str(material.chats), "type": "chat_template"}]
    for order in (data, data[::-1]):
        outcome = axolotl_train(datasets=order, fusion={"sources": [], "sft": {}}, max_steps=1)
        assert outcome == (0, None)


def test_rows_that_are_no_text(axolotl_train, run_folder):
    path = runs.write_rows(run_folder / "odd.jsonl", [{"id": "a", "body": "text"}])
    refused(axolotl_train(datasets=[{"path": str(path), "type": FUSED}]), DataError, "'text'", "id, body")


def test_a_missing_store_stops_the_real_command(material, run_folder):
    settings = config(material, run_folder, fusion={"sources": [{"name": "gone", "store": "nowhere"}]})
    result = runs.command("train", str(write_config(settings, run_folder)), cwd=run_folder)
    assert result.returncode != 0
    assert "source 'gone': nowhere: expected a store or a folder" in result.stdout


def run(command, settings, folder, *arguments):
    """Run another command of axolotl in this process; returns status and error."""
    from axolotl.cli.main import cli

    forget_plugins()
    path = str(write_config(settings, folder))
    result = CliRunner().invoke(cli, [command, path, *arguments], input="")
    return result.exit_code, result.exception


PYTHON = ("--launcher", "python")


def test_commands_that_train_nothing_need_no_stores(material, run_folder):
    import shutil

    store = shutil.copytree(material.folder / "texts-digits", run_folder / "store")
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}
    lora |= {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
    fusion = {"sources": [{"name": "digits", "store": str(store)}]}
    settings = config(material, run_folder, fusion=fusion, max_steps=1, val_set_size=4, **lora)
    train(settings, run_folder)
    shutil.rmtree(store)
    assert run("inference", settings, run_folder, *PYTHON) == (0, None)
    assert run("merge-lora", settings, run_folder) == (0, None)
    assert (run_folder / "model" / "merged" / "model.safetensors").exists()
    # The rows are prepared already, so an evaluation needs no store either, nor does another training.
    assert run("evaluate", settings, run_folder, *PYTHON) == (0, None)
    assert run("train", settings, run_folder, *PYTHON) == (0, None)
    # These two get as far as axolotl itself goes here: there is no sharded checkpoint, and int8 needs more than a CPU.
    _, error = run("merge-sharded-fsdp-weights", settings, run_folder, *PYTHON)
    assert "pytorch_model_fsdp_0" in str(error)
    quantized = settings | {"quantization": {"weight_dtype": "int8"}}
    _, error = run("quantize", quantized, run_folder, "--base-model", str(run_folder / "model" / "merged"))
    assert "torchao" in str(error)
    # Other rows would have to be made of it.
    for command, arguments in {"preprocess": (), "train": PYTHON, "evaluate": PYTHON}.items():
        changed = settings | {"fusion": settings["fusion"] | {"top_k": 3}}
        if command == "preprocess":
            changed = settings
        refused(run(command, changed, run_folder, *arguments), ConfigError, "source 'digits'", "no folder")


def test_inference_of_a_preference_run_is_not_refused(material, run_folder):
    path = runs.write_rows(run_folder / "scored.jsonl", runs.scored(3))
    fusion = {"sources": [], "pairs": {}}
    settings = config(material, run_folder, fusion=fusion, datasets=[{"path": str(path), "type": DPO}], rl="dpo")
    assert run("inference", settings, run_folder, *PYTHON) == (0, None)
    # Without the scored responses, too.
    path.unlink()
    assert run("inference", settings, run_folder, *PYTHON) == (0, None)


def test_a_plugin_by_its_full_module_is_the_same_plugin(material, run_folder):
    settings = config(material, run_folder, plugins=["fusion_plugins.axolotl.plugin.FusionPlugin"])
    _, rows = prepare(settings, run_folder)
    assert "fused_ids" in rows.column_names
