"""Runs of two processes, started by the real `axolotl` command; those with DeepSpeed by `axolotl_on_cpu.py`."""

import json
import sys

import axolotl_runs as runs
import pytest
from axolotl_runs import PLUGIN, config, logged, prepare, row_folder, scored, train, two_processes

pytestmark = pytest.mark.slow
IN_ORDER = {"curriculum_sampling": True, "shuffle_merged_datasets": False, "max_steps": 2}
ZERO3 = {"deepspeed": str(runs.ROOT / "axolotl_configs" / "deepspeed" / "zero3.json")}
EVALUATED = IN_ORDER | {"val_set_size": 7, "eval_batch_size": 2, "eval_steps": 2, "learning_rate": 1e-12}


@pytest.fixture(scope="module")
def single(material, tmp_path_factory):
    """Changes of the settings -> the trainer of one process with batches of two rows, which runs once."""
    done = {}

    def trained(changes):
        name = json.dumps(changes, sort_keys=True)
        if name not in done:
            folder = tmp_path_factory.mktemp("single")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.setattr(sys, "argv", ["axolotl"])
                done[name] = train(config(material, folder, micro_batch_size=2, **changes), folder)
        return done[name]

    return trained


@pytest.mark.parametrize("averaged", [True, False], ids=["one token count", "token counts of their own"])
def test_two_processes_train_as_one_with_twice_the_batch(material, run_folder, single, averaged):
    """With one token count exactly; with their own (axolotl's way) each process weighs the same in `loss`.

    The other figures are sums over the positions of both. An evaluation counts no row twice, though 7 rows in batches
    of 2 do not come out even.
    """
    plugins = [PLUGIN, "averaging_plugin.AveragingPlugin"] if averaged else [PLUGIN]
    settings = config(
        material, run_folder, micro_batch_size=1, max_memory={"cpu": "8GiB"}, plugins=plugins, **EVALUATED
    )
    # Rows that the loaders of both processes fuse, beside rows that were fused before.
    settings["fusion"]["prepared"] = "stores" if averaged else "rows"
    entries, evaluations = two_processes(settings, run_folder, ACCELERATE_USE_CPU="true")
    losses = [float(entry["loss"]) for entry in entries]
    alone = single(EVALUATED)
    for name in ("lm_loss", "fusion_loss", "fusion_coverage", "lm_weight", "kept_mass", "share_digits"):
        assert [float(entry[name]) for entry in entries] == pytest.approx(logged(alone, name), rel=2e-3), name
        whole = logged(alone, f"eval_{name}")[-1]
        assert float(evaluations[-1][f"eval_{name}"]) == pytest.approx(whole, rel=2e-3), name
    assert float(evaluations[-1]["eval_loss"]) == pytest.approx(logged(alone, "eval_loss")[-1], rel=2e-3)
    if averaged:
        assert losses == pytest.approx(logged(alone), rel=2e-3)
        norms = [float(entry["grad_norm"]) for entry in entries]
        assert norms == pytest.approx(logged(alone, "grad_norm"), rel=2e-3)
    else:
        still = config(material, run_folder, micro_batch_size=1, **(EVALUATED | {"max_steps": 4}))
        rows = logged(train(still, run_folder))
        assert losses[0] == pytest.approx((rows[0] + rows[1]) / 2, rel=2e-3)


def test_sharded_weights_train_as_whole_ones(material, run_folder, single):
    """ZeRO-3. On a CPU both processes get the same rows, so loss and gradient are those of one process."""
    settings = config(material, run_folder, gradient_checkpointing=True, **ZERO3, **IN_ORDER)
    settings |= {"save_strategy": "steps", "save_steps": 2}
    entries, _ = two_processes(settings, run_folder)
    assert len(list((run_folder / "model" / "checkpoint-2").glob("global_step2/zero_pp_rank_*_model_states.pt"))) == 2
    alone = single(IN_ORDER)
    assert [float(entry["loss"]) for entry in entries] == pytest.approx(logged(alone), rel=2e-3)
    norms = [float(entry["grad_norm"]) for entry in entries]
    assert norms == pytest.approx(logged(alone, "grad_norm"), rel=2e-3)


def test_weights_that_fsdp2_shards_train_as_whole_ones(material, run_folder, single):
    """Two processes with half of every weight train as one with twice the batch; the first saves the whole model."""
    from safetensors.torch import load_file

    plugins = [PLUGIN, "averaging_plugin.AveragingPlugin", "cpu_mesh_plugin.CpuMeshPlugin"]
    sharding = {
        "fsdp_version": 2,
        "fsdp_config": {
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
            "state_dict_type": "FULL_STATE_DICT",
            "reshard_after_forward": True,
        },
    }
    settings = config(material, run_folder, micro_batch_size=1, plugins=plugins, **sharding, **IN_ORDER)
    entries, _ = two_processes(settings, run_folder, ACCELERATE_USE_CPU="true")
    sharded = load_file(run_folder / "model" / "model.safetensors")
    alone = single(IN_ORDER)
    for name in ("loss", "grad_norm", "lm_loss", "fusion_loss", "kept_mass", "fused_entropy", "top1_agreement"):
        assert [float(entry[name]) for entry in entries] == pytest.approx(logged(alone, name), rel=2e-3), name
    trained = alone.model.state_dict()
    assert sharded.keys() <= trained.keys()
    for name, weight in sharded.items():
        assert (weight - trained[name]).abs().max() < 1e-5, name


def test_two_workers_prepare_the_rows_that_one_prepares(material, run_folder):
    settings = config(material, run_folder)
    _, alone = prepare(settings, run_folder)
    other = settings | {"dataset_num_proc": 2, "dataset_prepared_path": str(run_folder / "by-two")}
    _, together = prepare(other, run_folder)
    assert together.to_dict() == alone.to_dict()


def test_wrpo_with_sharded_weights_trains_as_with_whole_ones(material, run_folder):
    """ZeRO-3 of two processes, which on a CPU get the same rows; model and reference are sharded."""
    near = [row for row in scored(4) if row["source"] == "near"]
    path = row_folder(
        run_folder / "scored", scored(4) + [row | {"source": "sft", "response": f"I {row['response']}"} for row in near]
    )
    pairs = {"rule": "own_answers", "own_source": "sft", "min_gap": "none", "max_gap": "none"}
    settings = config(
        material,
        run_folder,
        datasets=[{"path": str(path), "type": "fusion_plugins.multi_source_dpo"}],
        fusion={"sources": [], "pairs": pairs, "wrpo": {"alpha": 0.5}},
        rl="dpo",
        rl_beta=0.5,
        trainer_cls="fusion_plugins.axolotl.preference_trainers.WRPOTrainer",
        dataloader_num_workers=0,
        **IN_ORDER,
    )
    entries, _ = two_processes(settings | ZERO3, run_folder)
    alone = train(settings, run_folder)
    for name in ("loss", "alpha", "rewards/source", "rewards/margins"):
        expected = pytest.approx(logged(alone, name), rel=5e-3, abs=2e-4)
        assert [float(entry[name]) for entry in entries] == expected, name
    assert logged(alone, "alpha") == [0, 0.25]
