"""axolotl's features beside fusion: what each does to a fused run. The table of docs/features.md is made from this.

    python tests/support/axolotl_features.py      print the table

A feature is *equal* when stock axolotl with and without the plugin, on the same tokens and labels, with
`lm_loss_weight: 1`, logs the same losses and gradient norms in three steps of training, and the same evaluation losses.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

PLUGINS = "axolotl.integrations"
LIGER = f"{PLUGINS}.liger.LigerPlugin"


@dataclass(frozen=True)
class Feature:
    """One line of the table.

    Attributes:
        name: what it is called in the table.
        keys: axolotl's settings; `plugins` are the other plugins, "FUSION" is where ours stands among them.
        verdict: equal; refused (by us, with a reason that names the key); gpu (plain axolotl fails here without one,
            and ours in the same way); host (the same, for another reason); tested (in ways of its own).
        note: what there is to say.
        test: where it is tested, for `tested`.
        shown: the settings as the table shows them, where that is not `keys`.
        besides: settings of the run that the feature needs.
        norms: largest relative difference of the gradient norms.
    """

    name: str
    keys: dict[str, Any]
    verdict: str = "equal"
    note: str = ""
    test: str = ""
    shown: str = ""
    besides: dict[str, Any] = field(default_factory=dict)
    norms: float = 1e-4


#: axolotl switches kernels on for LoRA without dropout, which need a GPU
NO_KERNELS = {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")}
ADAPTER = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, **NO_KERNELS}
LORA = {**ADAPTER, "lora_target_linear": True}
PACKED = {"sequence_len": 256, "pad_to_sequence_len": True}
#: the whole evaluation set is one batch: plain axolotl's eval_loss is a mean over batches
EVALUATED = {"val_set_size": 8, "eval_steps": 1, "eval_batch_size": 8}
HOSTS = "tests/hosts"
LOGGED = "our figures are logged as all others"
TRACKERS = f"{HOSTS}/test_axolotl_figures.py::test_every_figure_reaches_the_trackers"

FEATURES: dict[str, list[Feature]] = {
    "Batches": [
        Feature("sample packing", {"sample_packing": True}, besides=PACKED),
        Feature("packing in order", {"sample_packing": True, "sample_packing_sequentially": True}, besides=PACKED),
        Feature("packing in real batches", {"sample_packing": True, "multipack_real_batches": True}, besides=PACKED),
        Feature(
            "packed evaluation", {"eval_sample_packing": True}, besides={"sample_packing": True, **PACKED, **EVALUATED}
        ),
        Feature(
            "gradient accumulation",
            {"gradient_accumulation_steps": 4},
            "tested",
            "equal to the same rows in one batch; plain axolotl takes the mean of the micro-batches' means",
            f"{HOSTS}/test_axolotl_fused.py::test_accumulated_micro_batches_equal_one_batch",
        ),
        Feature("automatic batch size", {"auto_find_batch_size": True}),
        Feature("padding to a multiple", {"pad_to_multiple_of": 32}),
        Feature("rows of like length together", {"group_by_length": True}),
        Feature("rows in their order", {"curriculum_sampling": True}),
        Feature("workers that load", {"dataloader_num_workers": 2}),
        Feature("incomplete last batch", {"dataloader_drop_last": True}),
        Feature(
            "batches handed out by one process",
            {"accelerator_config": {"dispatch_batches": True}},
            "refused",
            "accelerate joins tensors only",
            shown="`accelerator_config: {dispatch_batches: true}`",
        ),
        Feature(
            "batch flattening", {"batch_flattening": True}, "refused", "the collator is ours; use `sample_packing`"
        ),
    ],
    "Datasets": [
        Feature(
            "several datasets",
            {"datasets": ["fused", "fused"]},
            "tested",
            "one entry of the report for each",
            f"{HOSTS}/test_axolotl_prepared.py::test_one_file_under_several_entries_has_a_report_for_each",
            "`datasets:` of type fused",
        ),
        Feature(
            "plain chats beside fused rows",
            {"datasets": ["fused", "chat_template"]},
            "refused",
            "all rows must have fused distributions, or some would silently train without them",
            shown="a dataset of another type",
        ),
        Feature("one shard", {"dataset_shard_num": 2, "dataset_shard_idx": 1}),
        Feature("several files of the prepared dataset", {"num_dataset_shards_to_save": 2}),
        Feature("duplicates removed", {"dataset_exact_deduplication": True}),
        Feature("rows not shuffled", {"shuffle_merged_datasets": False}),
        Feature("shortest text", {"min_sample_len": 30}),
        Feature(
            "long texts cut",
            {"excess_length_strategy": "truncate"},
            "refused",
            "it would cut tokens but not their distributions; `fusion cut` splits texts before capture",
        ),
        Feature(
            "test sets of their own",
            {"test_datasets": []},
            "tested",
            test=f"{HOSTS}/test_axolotl_figures.py::test_axolotl_evaluate_writes_each_figure_in_the_column_of_its_dataset",
            shown="`test_datasets:` of type fused",
        ),
        Feature("streaming", {"streaming": True}, "refused", "rows are made when the dataset is prepared"),
        Feature("pre-training dataset", {"pretraining_dataset": "c4"}, "refused", "the same; use `datasets:`"),
        Feature("no preparation", {"skip_prepare_dataset": True}, "refused", "the same"),
        Feature(
            "prepared on another machine",
            {"dataset_prepared_path": "shared"},
            "tested",
            "stores are not needed where the rows are there",
            f"{HOSTS}/test_axolotl_guards.py::test_commands_that_train_nothing_need_no_stores",
        ),
    ],
    "Adapters": [
        Feature("LoRA", LORA),
        Feature("LoRA on the output layer", {**ADAPTER, "lora_target_modules": ["q_proj", "lm_head"]}),
        Feature("LoRA with trained embeddings", {**LORA, "lora_modules_to_save": ["embed_tokens", "lm_head"]}),
        Feature("LoRA on the embedding", {**ADAPTER, "lora_target_modules": ["embed_tokens", "q_proj"]}),
        Feature("LoRA+", {**LORA, "loraplus_lr_ratio": 4}),
        Feature("rank-stabilised LoRA", {**LORA, "peft_use_rslora": True}),
        Feature("DoRA", {**LORA, "peft_use_dora": True}),
        Feature("QLoRA", {**LORA, "adapter": "qlora", "load_in_4bit": True}),
        Feature(
            "LoRA on 8-bit weights",
            {**LORA, "load_in_8bit": True},
            note="gradient norms to 1e-3: activations are rounded to 8 bits, which makes more of the last bits",
            norms=1e-3,
        ),
        Feature(
            "ReLoRA",
            {**LORA, "relora": True, "relora_prune_ratio": 0.9},
            besides={"jagged_restart_steps": 2, "jagged_restart_warmup_steps": 1, "jagged_restart_anneal_steps": 1},
        ),
        Feature(
            "MoRA", LORA, shown="plugin `MoraPlugin`", besides={"plugins": [f"{PLUGINS}.mora.MoraPlugin", "FUSION"]}
        ),
        Feature("LoRA kernels", {**LORA, **dict.fromkeys(NO_KERNELS, True)}, "gpu"),
    ],
    "What is trained": [
        Feature("some parameters", {"unfrozen_parameters": ["model.layers.0.*"]}),
        Feature(
            "Spectrum",
            {"spectrum_top_fraction": 0.5, "spectrum_model_name": "tiny"},
            shown="plugin `SpectrumPlugin`",
            besides={"plugins": [f"{PLUGINS}.spectrum.SpectrumPlugin", "FUSION"]},
        ),
        Feature("added tokens", {"tokens": ["<extra>"]}),
        Feature("vocabulary of a multiple of 32", {"tokens": ["<extra>"], "resize_token_embeddings_to_32x": True}),
        Feature("vocabulary as small as the tokenizer's", {"shrink_embeddings": True}),
        Feature("untrained tokens repaired", {"fix_untrained_tokens": [5]}),
        Feature("weights drawn anew", {"reinit_weights": True}),
        Feature(
            "router of a mixture of experts",
            {},
            "tested",
            "its loss is kept",
            f"{HOSTS}/test_axolotl_figures.py::test_the_loss_of_a_router_is_kept",
            "`output_router_logits` of the model",
        ),
        Feature("reward models", {"reward_model": True}, "refused", "they have another loss"),
    ],
    "Losses": [
        Feature("chunked cross-entropy", {"chunked_cross_entropy": True}, note="ours is chunked in any case"),
        Feature(
            "Liger's fused linear cross-entropy",
            {"liger_fused_linear_cross_entropy": True},
            note="replaced by ours",
            besides={"plugins": [LIGER, "FUSION"]},
        ),
        Feature(
            "the same, behind our plugin",
            {"liger_fused_linear_cross_entropy": True},
            note="the order of the plugins does not matter",
            besides={"plugins": ["FUSION", LIGER]},
        ),
        Feature(
            "Liger's cross-entropy",
            {"liger_cross_entropy": True},
            note="replaced by ours",
            besides={"plugins": [LIGER, "FUSION"]},
        ),
        Feature(
            "Liger's token scaling",
            {"liger_use_token_scaling": True},
            "refused",
            "it weighs the positions of a loss that fusion replaces",
            besides={"liger_fused_linear_cross_entropy": True, "plugins": [LIGER, "FUSION"]},
        ),
        Feature(
            "cut cross-entropy",
            {"cut_cross_entropy": True},
            "gpu",
            besides={"plugins": [f"{PLUGINS}.cut_cross_entropy.CutCrossEntropyPlugin", "FUSION"]},
        ),
        Feature(
            "knowledge distillation",
            {"kd_trainer": True},
            "refused",
            "it has a trainer and a collator of its own",
            shown="plugin `KDPlugin`",
            besides={"plugins": [f"{PLUGINS}.kd.KDPlugin", "FUSION"]},
        ),
        Feature(
            "label smoothing", {"label_smoothing_factor": 0.1}, "refused", "it would apply to one of the two losses"
        ),
        Feature("entropy-aware tuning", {"use_eaft": True}, "refused", "it replaces the loss"),
        Feature("a trainer of one's own", {"trainer_cls": "my.Trainer"}, "refused", "fusion has one"),
        Feature("noisy embeddings", {"neftune_noise_alpha": 5}),
        Feature("a limit for the loss", {"loss_watchdog_threshold": 100, "loss_watchdog_patience": 2}),
    ],
    "Speed and memory": [
        Feature("gradient checkpointing", {"gradient_checkpointing": True}),
        Feature(
            "gradient checkpointing, not reentrant",
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        ),
        Feature("selective checkpointing", {"gradient_checkpointing": True, "selective_checkpointing": True}),
        Feature("layers kept in main memory", {"layer_offloading": True}),
        Feature(
            "activations kept in main memory", {"gradient_checkpointing": True, "activation_offloading": True}, "gpu"
        ),
        Feature("feed-forward layers in tiles", {"tiled_mlp": True}),
        Feature(
            "torch.compile",
            {"torch_compile": True},
            shown="`torch_compile`",
            besides={"torch_compile_backend": "eager"},
            note="compared with the backend `eager`",
        ),
        Feature("Liger's rotary positions", {"liger_rope": True}, besides={"plugins": [LIGER, "FUSION"]}),
        Feature("Liger's gated layers", {"liger_glu_activation": True}, besides={"plugins": [LIGER, "FUSION"]}),
        Feature(
            "Liger's layers, behind our plugin",
            {"liger_rope": True, "liger_glu_activation": True, "liger_layer_norm": True},
            besides={"plugins": ["FUSION", LIGER]},
        ),
        Feature("Liger's norm", {"liger_rms_norm": True}, "gpu", besides={"plugins": [LIGER, "FUSION"]}),
        Feature("plain attention", {"attn_implementation": "eager"}),
        Feature("FlexAttention", {"attn_implementation": "flex_attention"}, "gpu"),
        Feature("FlashAttention", {"attn_implementation": "flash_attention_2"}, "gpu"),
        Feature("16-bit floats", {"bf16": True}, "gpu"),
        Feature("8-bit floats", {"fp8": True}, "gpu"),
    ],
    "Optimizers": [
        Feature(f"`{name}`", {"optimizer": name}, shown="`optimizer`")
        for name in ("muon", "adafactor", "rmsprop", "schedule_free_adamw")
    ]
    + [
        Feature(
            "Grokfast",
            {"grokfast_alpha": 0.98, "grokfast_lamb": 2.0},
            shown="plugin `GrokfastPlugin`",
            besides={"plugins": [f"{PLUGINS}.grokfast.GrokfastPlugin", "FUSION"]},
        ),
        Feature("learning rates by part", {"lr_groups": [{"name": "o", "modules": ["o_proj"], "lr": 1e-4}]}),
        Feature("learning rate of the embedding", {"embedding_lr": 1e-4}),
        Feature("a schedule", {"lr_scheduler": "cosine", "warmup_steps": 1, "cosine_min_lr_ratio": 0.1}),
    ],
    "During and after training": [
        Feature(
            "evaluation",
            {"val_set_size": 8, "eval_steps": 1},
            note="over all positions; plain axolotl takes the mean of its batches' means",
            besides={"eval_batch_size": 8},
        ),
        Feature(
            "early stopping, best checkpoint at the end",
            {"early_stopping_patience": 2, "load_best_model_at_end": True},
            besides={**EVALUATED, "save_strategy": "steps", "save_steps": 1},
        ),
        Feature("answers during training", {"generate_samples": True}, besides=EVALUATED),
        Feature(
            "metrics of the evaluation",
            {"do_causal_lm_eval": True, "eval_causal_lm_metrics": ["perplexity"]},
            besides=EVALUATED,
        ),
        Feature(
            "benchmarks during training", {"do_bench_eval": True}, "refused", "its rows have no fused distributions"
        ),
        Feature("tensorboard", {"use_tensorboard": True}, "tested", LOGGED, TRACKERS),
        Feature("Weights & Biases", {"wandb_project": "fusion", "wandb_mode": "offline"}, "tested", LOGGED, TRACKERS),
        Feature("MLflow", {"use_mlflow": True}, "tested", f"{LOGGED}; where MLflow is installed", TRACKERS),
        Feature(
            "Trackio",
            {"use_trackio": True},
            "host",
            "axolotl 0.19 brings trackio 0.19, which does not know an argument that transformers 5 gives it",
        ),
        Feature("tokens per second", {"include_tkps": True}),
        Feature(
            "resuming",
            {"resume_from_checkpoint": "..."},
            "tested",
            "the same as a run that was not interrupted, with dropout and NEFTune too; with `sample_packing` axolotl "
            "itself packs other batches after a resume",
            f"{HOSTS}/test_axolotl_figures.py::test_a_resumed_run_draws_the_random_numbers_of_an_uninterrupted_one",
            "`resume_from_checkpoint`",
        ),
        Feature(
            "`axolotl evaluate`",
            {},
            "tested",
            test=f"{HOSTS}/test_axolotl_figures.py::test_axolotl_evaluate_writes_each_figure_in_the_column_of_its_dataset",
            shown="command",
        ),
        Feature(
            "`axolotl inference`, `merge-lora`, `quantize`",
            {},
            "tested",
            "without stores; `quantize` as far as it goes on a CPU",
            f"{HOSTS}/test_axolotl_guards.py::test_commands_that_train_nothing_need_no_stores",
            "commands",
        ),
    ],
    "Several processes": [
        Feature(
            "DDP",
            {},
            "tested",
            "two processes equal one with twice the batch",
            f"{HOSTS}/test_axolotl_distributed.py::test_two_processes_train_as_one_with_twice_the_batch",
            "`axolotl train` with a launcher",
        ),
        Feature(
            "DeepSpeed ZeRO-3",
            {},
            "tested",
            "equal to whole weights",
            f"{HOSTS}/test_axolotl_distributed.py::test_sharded_weights_train_as_whole_ones",
            "`deepspeed`",
        ),
        Feature(
            "FSDP2",
            {"fsdp_version": 2, "fsdp_config": {}},
            "tested",
            "equal to whole weights; the output layer runs once, and its weight is gathered as often as by the model "
            "alone",
            f"{HOSTS}/test_axolotl_distributed.py::test_weights_that_fsdp2_shards_train_as_whole_ones",
        ),
        Feature(
            "context parallel", {"context_parallel_size": 2}, "refused", "it splits tokens but not their distributions"
        ),
        Feature("the same, by its old name", {"sequence_parallel_degree": 2}, "refused", "the same"),
        Feature("tensor parallel", {"tensor_parallel_size": 2}, "gpu"),
    ],
}


def pairs() -> Iterator[Feature]:
    """The features that are trained with and without the plugin."""
    for features in FEATURES.values():
        yield from (feature for feature in features if feature.verdict in ("equal", "gpu", "host"))


WORDS = {
    "equal": "equal",
    "refused": "refused",
    "gpu": "not tested: needs a GPU",
    "host": "fails without the plugin, too",
    "tested": "tested",
}


def table() -> str:
    """The tables of docs/features.md."""
    parts = []
    for title, features in FEATURES.items():
        lines = [f"## {title}", "", "| feature | settings | with fused datasets | |", "|---|---|---|---|"]
        for feature in features:
            keys = feature.shown or ", ".join(f"`{key}`" for key in feature.keys if key not in NO_KERNELS)
            test = f"[test](../{feature.test.split('::')[0]})" if feature.test else ""
            note = "; ".join(text for text in (feature.note, test) if text)
            lines.append(f"| {feature.name} | {keys} | {WORDS[feature.verdict]} | {note} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def key_named(feature: Feature, message: str) -> bool:
    """Whether a refusal names what it refuses."""
    words = [*feature.keys, *(name.rpartition(".")[2] for name in feature.besides.get("plugins", []))]
    return any(re.search(rf"\b{re.escape(word)}\b", message) for word in words if word != "FUSION")


if __name__ == "__main__":
    sys.stdout.write(table())
