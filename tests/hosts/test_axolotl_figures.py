"""Logged and evaluated figures against an independent computation: sums over positions, divided once."""

import csv
import json
import math
import struct
from importlib.util import find_spec

import axolotl_runs as runs
import numpy as np
import pytest
import tiny
import torch
from axolotl_runs import FUSED, config, forget_plugins, logged, train, write_config

from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.store import StoreWriter, open_store

IN_ORDER = {"curriculum_sampling": True, "shuffle_merged_datasets": False}
#: the model stays as it is, so that every step can be computed again
STILL = IN_ORDER | {"learning_rate": 1e-12, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def gappy(material, tmp_path_factory):
    """A store that says something about every third text only."""
    from dataclasses import replace

    store = open_store(material.folder / "texts-target")
    out = tmp_path_factory.mktemp("gappy") / "store"
    with StoreWriter(out, store.manifest.model_copy(update={"shards": [], "complete": False}), store.table) as writer:
        for record in store:
            if int(record.id.removeprefix("t")) % 3:
                empty = np.full_like(record.topk.logprobs, -np.inf)
                nothing = TopK(
                    np.full_like(record.topk.ids, -1), empty, np.full_like(record.topk.token_logprobs, np.nan)
                )
                record = replace(record, topk=nothing)
            writer.write(record)
        writer.finish()
    return [{"name": "gappy", "store": str(out)}]


def sums(model, rows):
    """Sums of both losses and counts of their positions over some rows, one row after the other."""
    totals = np.zeros(4)
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].double().log_softmax(-1)
        fused = np.array(row["fused_ids"]).reshape(ids.shape[1], -1)
        values = np.array(row["fused_logprobs"], dtype=np.float64).reshape(fused.shape)
        for position, label in enumerate(row["labels"][1:]):
            if label == -100:
                continue
            totals += (-logprobs[position, label].item(), 0, 1, 0)
            kept = fused[position] >= 0
            if kept.any():
                entries = logprobs[position, torch.tensor(fused[position][kept])].numpy()
                totals += (0, -(np.exp(values[position][kept]) * entries).sum(), 0, 1)
    return totals


def expected(totals, weight):
    lm, fusion, positions, fused = totals
    return {
        "loss": (weight * lm + (1 - weight) * fusion) / positions,
        "lm_loss": lm / positions,
        "ppl": math.exp(lm / positions),
        "fusion_loss": fusion / fused,
        "fusion_coverage": fused / positions,
        "lm_weight": weight,
    }


def test_figures_of_training_and_evaluation_are_sums_divided_once(material, run_folder, gappy):
    from axolotl.utils.callbacks import log_prediction_callback_factory
    from transformers import AutoModelForCausalLM

    settings = config(
        material,
        run_folder,
        fusion={"sources": gappy, "lm_loss_schedule": "rise"},
        micro_batch_size=1,
        gradient_accumulation_steps=4,
        val_set_size=7,
        eval_steps=1,
        eval_batch_size=3,
        max_steps=4,
        **STILL,
    )
    trainer = train(settings, run_folder)
    model = AutoModelForCausalLM.from_pretrained(material.target, dtype=torch.float32).eval()
    rows, held_out = list(trainer.train_dataset), list(trainer.eval_dataset)
    assert len(held_out) == 7
    assert 0 < logged(trainer, "fusion_coverage")[0] < 0.9, "some texts have no fused position"
    for step, entry in enumerate([entry for entry in trainer.state.log_history if "loss" in entry]):
        wanted = expected(sums(model, rows[4 * step : 4 * step + 4]), 0.5 + 0.5 * step / 4)
        for name, value in wanted.items():
            assert entry[name] == pytest.approx(value, rel=1e-4), (step, name)
    wanted = expected(sums(model, held_out), 0.5)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) >= 4
    for entry in evaluations:
        for name, value in wanted.items():
            assert entry[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name

    # The table of predictions evaluates single batches after an evaluation; the next one does not know of it.
    trainer.axolotl_cfg.eval_table_size = 2
    table = log_prediction_callback_factory(trainer, trainer.processing_class, "no logger")
    seen = []
    step = trainer.prediction_step
    trainer.prediction_step = lambda *args, **kwargs: seen.append(kwargs) or step(*args, **kwargs)
    trainer.add_callback(table(trainer.axolotl_cfg))
    found = [trainer.evaluate() for _ in range(2)]
    assert len([kwargs for kwargs in seen if kwargs.get("prediction_loss_only") is False]) >= 2
    for entry in found:
        assert {name: entry[f"eval_{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-4)

    # Another dataset under another name, as `axolotl evaluate` does with the training set.
    other = trainer.evaluate(trainer.train_dataset, metric_key_prefix="train")
    assert not [name for name in other if name.startswith("eval_")]
    wanted = expected(sums(model, rows), 0.5)
    assert {name: other[f"train_{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-4)


def test_axolotl_evaluate_writes_each_figure_in_the_column_of_its_dataset(material, run_folder, gappy):
    from axolotl.cli.main import cli
    from click.testing import CliRunner
    from transformers import AutoModelForCausalLM

    settings = config(material, run_folder, fusion={"sources": gappy}, val_set_size=7, **IN_ORDER)
    forget_plugins()
    path = write_config(settings, run_folder)
    result = CliRunner().invoke(cli, ["evaluate", str(path), "--launcher", "python"])
    assert result.exit_code == 0, result.exception
    with (run_folder / "model" / "eval_summary.csv").open() as file:
        table = {row["metric"]: (row["training"], row["validation"]) for row in csv.DictReader(file)}
    model = AutoModelForCausalLM.from_pretrained(material.target, dtype=torch.float32).eval()
    _, rows = runs.prepare(settings | {"val_set_size": 0}, run_folder)
    for name, parts in {"training": (slice(0, 17), 0), "validation": (slice(17, 24), 1)}.items():
        wanted = expected(sums(model, [rows[index] for index in range(24)[parts[0]]]), 0.5)
        found = {key: float(table[key][parts[1]]) for key in wanted}
        assert found == pytest.approx(wanted, rel=1e-4), name


def test_the_loss_of_a_router_is_kept(material, run_folder):
    """A mixture of experts, trained on its language-model loss alone: the loss is the model's own."""
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer = tiny.sentencepiece_bpe()
    torch.manual_seed(3)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            max_position_embeddings=128,
            output_router_logits=True,
            router_aux_loss_coef=0.5,
        )
    )
    model.save_pretrained(run_folder / "mixtral")
    tokenizer.save_pretrained(run_folder / "mixtral")
    settings = config(
        material,
        run_folder,
        base_model=str(run_folder / "mixtral"),
        fusion={"sources": material.sources("texts", "target"), "lm_loss_weight": 1.0},
        micro_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=2,
        val_set_size=3,
        eval_steps=1,
        eval_batch_size=1,
        **STILL,
    )
    trainer = train(settings, run_folder)
    assert trainer._losses_in_head is True
    model.eval()

    def own(row):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            out = model(ids, labels=torch.tensor([row["labels"]]), attention_mask=torch.ones_like(ids))
        return out.loss.item() - 0.5 * out.aux_loss.item(), 0.5 * out.aux_loss.item(), ids.shape[1] - 1

    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, entry in enumerate(steps):
        (lm_a, router_a, n_a), (lm_b, router_b, n_b) = (own(trainer.train_dataset[2 * step + part]) for part in (0, 1))
        assert router_a > 0.4
        lm = (lm_a * n_a + lm_b * n_b) / (n_a + n_b)
        assert entry["loss"] == pytest.approx(lm + (router_a + router_b) / 2, rel=1e-4)
        assert entry["lm_loss"] == pytest.approx(lm, rel=1e-4)
        assert entry["router_loss"] == pytest.approx((router_a * n_a + router_b * n_b) / (n_a + n_b), rel=1e-4)
        assert entry["ppl"] == pytest.approx(math.exp(lm), rel=1e-4)
    held_out = [own(row) for row in trainer.eval_dataset]
    mean = sum((lm + router) * n for lm, router, n in held_out) / sum(n for _, _, n in held_out)
    evaluated = logged(trainer, "eval_loss")
    assert evaluated == pytest.approx([mean] * len(evaluated), rel=1e-4)


@pytest.mark.parametrize("noise", ["lora_dropout", "neftune"])
def test_a_resumed_run_draws_the_random_numbers_of_an_uninterrupted_one(material, run_folder, noise):
    common = IN_ORDER | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    if noise == "neftune":
        common |= {"neftune_noise_alpha": 5.0}
    else:
        common |= {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "learning_rate": 0.01}
        common |= {"lora_target_modules": ["q_proj", "v_proj"]}
        common |= {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
    whole = train(config(material, run_folder, **common), run_folder)
    checkpoint = str(run_folder / "model" / "checkpoint-2")
    resumed = train(config(material, run_folder, resume_from_checkpoint=checkpoint, **common), run_folder)
    assert len(logged(whole)) == 4
    assert logged(resumed) == logged(whole)
    assert logged(resumed, "grad_norm") == logged(whole, "grad_norm")


def test_the_best_checkpoint_is_the_one_with_the_lowest_fixed_loss(material, run_folder):
    """Both terms fall while the weight rises; with the moving weight the first checkpoint would seem the best."""
    settings = config(
        material,
        run_folder,
        fusion={"lm_loss_schedule": "rise", "lm_loss_weight": 0.1, "sources": material.sources("texts", "target")},
        val_set_size=6,
        eval_steps=2,
        save_steps=2,
        save_strategy="steps",
        max_steps=6,
        learning_rate=0.003,
        early_stopping_patience=1,
        load_best_model_at_end=True,
        **IN_ORDER,
    )
    trainer = train(settings, run_folder)
    evaluated = logged(trainer, "eval_lm_weight")
    assert evaluated == pytest.approx([0.1] * len(evaluated))
    assert logged(trainer, "lm_weight")[-1] > 0.8
    assert trainer.state.best_global_step == 6
    assert logged(trainer, "eval_loss") == sorted(logged(trainer, "eval_loss"), reverse=True)


def test_a_run_without_any_fused_position_has_no_fusion_loss(material, run_folder, gappy):
    texts = [line for number, line in enumerate(material.texts.read_text().splitlines(keepends=True)) if number % 3]
    path = run_folder / "unfused.jsonl"
    path.write_text("".join(texts[:4]))
    data = [{"path": str(path), "type": FUSED}]
    trainer = train(config(material, run_folder, fusion={"sources": gappy}, datasets=data, max_steps=1), run_folder)
    assert logged(trainer, "fusion_coverage") == [0]
    assert logged(trainer, "fusion_loss") == []
    assert logged(trainer)[0] == pytest.approx(0.5 * logged(trainer, "lm_loss")[0], rel=1e-4)


def test_the_table_of_the_target_is_that_of_the_store(material, gappy):
    table = TokenTable.from_tokenizer(tiny.sentencepiece_bpe())
    assert table.fingerprint == open_store(gappy[0]["store"]).manifest.tokenizer_fingerprint


def wandb_history(file):
    """Name -> values of a run that Weights & Biases has kept offline: protobuf records in a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = file.read_bytes(), 7, b""
    found: dict[str, list[float]] = {}
    while place + 7 <= len(data):
        if (left := 32_768 - place % 32_768) < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            for item in Record.FromString(parts).history.item:
                found.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
            parts = b""
    return found


def mlflow_history(folder):
    """Name -> values of the one run in a folder of MLflow's, with the names that the others use."""
    values = {
        file.name: [float(line.split()[1]) for line in file.read_text().splitlines()]
        for file in folder.glob("*/*/metrics/*")
    }
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": found
        for name, found in values.items()
    }


def test_every_figure_reaches_the_trackers(material, run_folder, monkeypatch):
    """tensorboard, Weights & Biases (offline) and, where it is installed, MLflow (in a folder)."""
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = {"use_tensorboard": True, "wandb_project": "fusion", "wandb_mode": "offline"}
    monkeypatch.setenv("WANDB_DIR", str(run_folder))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.setenv(name, "")  # axolotl sets them for good
    with_mlflow = find_spec("mlflow") is not None
    if with_mlflow:
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        trackers |= {"mlflow_tracking_uri": f"file:{run_folder / 'mlflow'}", "mlflow_experiment_name": "fusion"}
    settings = config(material, run_folder, val_set_size=4, eval_steps=1, max_steps=2, **trackers)
    trainer = train(settings, run_folder)
    wandb.finish()
    events = EventAccumulator(str(next(run_folder.rglob("events.out.tfevents*")).parent)).Reload()
    found = {
        "tensorboard": {name: [one.value for one in events.Scalars(name)] for name in events.Tags()["scalars"]},
        "wandb": wandb_history(next(run_folder.rglob("run-*.wandb"))),
    }
    if with_mlflow:
        found["mlflow"] = mlflow_history(run_folder / "mlflow")
    ours = ("lm_loss", "fusion_loss", "fusion_coverage", "lm_weight", "kept_mass", "fused_entropy", "top1_agreement")
    for name in (*ours, "share_digits", "share_target", "ppl", "loss"):
        for shown, key in ((f"train/{name}", name), (f"eval/{name}", f"eval_{name}")):
            for tracker, values in found.items():
                assert values.get(shown) == pytest.approx(logged(trainer, key), rel=1e-6), (tracker, shown)
    assert len(logged(trainer, "share_digits")) == 2
