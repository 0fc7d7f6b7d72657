"""What the trainings of all questions have in common."""

from pathlib import Path
from typing import Any

from fusion_lab.world import Lab

__all__ = ["training"]


def training(lab: Lab, base: Path, steps: int, seed: int) -> dict[str, Any]:
    """Return axolotl's configuration of a small training in float32; datasets, rate and schedule are the caller's."""
    return {
        "base_model": str(base),
        "sequence_len": 256,
        "pad_to_sequence_len": False,
        "micro_batch_size": lab.settings["batch"],
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "optimizer": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": False,
        "dataset_num_proc": 0,
        "val_set_size": 0,
        "seed": seed,
        "output_dir": "./model",
        "dataset_prepared_path": "./prepared",
    }
