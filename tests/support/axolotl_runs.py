"""Real axolotl runs at toy size: checkpoints, stores captured from them, configurations, training in this process."""

import ast
import gc
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import scored_rows
import tiny
import yaml

PLUGIN = "fusion_plugins.axolotl.FusionPlugin"
FUSED = "fusion_plugins.axolotl.fused"
ROOT = Path(__file__).parents[2]
ON_CPU = str(ROOT / "tests" / "support" / "axolotl_on_cpu.py")
ENVIRONMENT = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "AXOLOTL_DATASET_NUM_PROC": "0",
    # No run may compile an extension: a folder in a file that is not a folder cannot be made.
    "TORCH_EXTENSIONS_DIR": f"{__file__}/none",
}

CHATS = [
    [
        {"role": "user", "content": f"How much is {a} plus {b}?"},
        {"role": "assistant", "content": f"It is {a + b}, of course."},
    ]
    for a in range(3, 9)
    for b in (4, 27)
]

SCORED_COLUMNS = {
    "prompt_id": "string",
    "source": "string",
    "index": "int64",
    "prompt": "json",
    "response": "string",
    "domain": "string",
    "finish_reason": "string",
    "reward": "float64",
    "correct": "bool",
}


def texts(count: int = 24) -> list[str]:
    """Short texts that differ."""
    return [f"{tiny.TEXTS[index % len(tiny.TEXTS)][:120]} No. {index}." for index in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def capture(texts: Path, model: Path, out: Path, top_k: int = 16) -> Path:
    """Capture a store with the transformers backend."""
    from fusion_plugins.sources.capture import capture_texts
    from fusion_plugins.sources.capture_config import CaptureConfig

    capture_texts(CaptureConfig(texts=str(texts), model=str(model), out=str(out), top_k=top_k))
    return out


def scored(prompts: int = 10) -> list[dict[str, Any]]:
    """Three sources with three responses each; rewards differ by 0.03 from one to the next, those of "far" by 5."""
    rows = []
    for prompt in range(prompts):
        for source, (name, step) in enumerate((("near", 0.03), ("also", 0.02), ("far", 5.0))):
            rows += [
                {
                    "prompt_id": f"p{prompt}",
                    "source": name,
                    "index": index,
                    "prompt": f"Say {prompt}!",
                    "response": f"{name} says {prompt}, {'no ' * index}more.",
                    "domain": "instruction",
                    "finish_reason": "stop",
                    "reward": 0.5 + source * 0.001 - step * index,
                    "correct": None,
                }
                for index in range(3)
            ]
    return rows


def row_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as `fusion score` does."""
    return scored_rows.write(folder, rows, SCORED_COLUMNS)


@dataclass(frozen=True)
class Material:
    """A target, two sources with other tokenizers, and stores of all three over one set of texts and one of chats."""

    folder: Path
    target: Path
    texts: Path
    chats: Path

    def sources(self, what: str = "texts", *names: str) -> list[dict[str, Any]]:
        """Entries of ``fusion.sources``."""
        return [
            {"name": name, "store": str(self.folder / f"{what}-{name}"), "is_target": name == "target"}
            for name in names or ("digits", "target")
        ]


def make_material(folder: Path) -> Material:
    """Build everything that the runs need."""
    models = {
        "target": tiny.llama_checkpoint(folder / "target", seed=1, tokenizer=tiny.sentencepiece_bpe()),
        "digits": tiny.llama_checkpoint(folder / "digits", seed=2, tokenizer=tiny.digit_splitting()),
        "bytes": tiny.llama_checkpoint(folder / "bytes", seed=3, tokenizer=tiny.byte_level()),
    }
    data = {
        "texts": write_rows(
            folder / "texts.jsonl", [{"id": f"t{index}", "text": text} for index, text in enumerate(texts())]
        ),
        "chats": write_rows(folder / "chats.jsonl", [{"messages": chat} for chat in CHATS]),
    }
    for what, path in data.items():
        for name in ("target", "digits") if what == "texts" else ("digits",):
            capture(path, models[name], folder / f"{what}-{name}")
    return Material(folder, models["target"], data["texts"], data["chats"])


def config(material: Material, out: Path, **changes: Any) -> dict[str, Any]:
    """A run on the CPU: fused texts, three steps. ``None`` removes a key; ``fusion`` is laid over the default."""
    fusion = {"sources": material.sources(), "lm_loss_weight": 0.5, "top_k": 6}
    block = changes.pop("fusion", {})
    if block and block.get("sources") == []:
        fusion = {}  # these are settings of sources
    settings: dict[str, Any] = {
        "base_model": str(material.target),
        "plugins": [PLUGIN],
        "datasets": [{"path": str(material.texts), "type": FUSED}],
        "fusion": None if block is None else fusion | block,
        "special_tokens": {"pad_token": "<unk>"},
        "sequence_len": 128,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": 0.001,
        "attn_implementation": "sdpa",
        "bf16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 7,
        "dataset_num_proc": 0,  # in this process: a worker takes many seconds to start
        "output_dir": str(out / "model"),
        "dataset_prepared_path": str(out / "prepared"),
    }
    settings |= changes
    return {key: value for key, value in settings.items() if value is not None}


def write_config(settings: dict[str, Any], out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "run.yml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def train(settings: dict[str, Any], out: Path) -> Any:
    """Do in this process what `axolotl train` does; return the trainer."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.train import train as run

    forget_plugins()
    freeze_modules()
    cfg = load_cfg(str(write_config(settings, out)))
    data = (load_preference_datasets if cfg.rl else load_datasets)(cfg=cfg)
    _, _, trainer = run(cfg=cfg, dataset_meta=data)
    return trainer


def prepare(settings: dict[str, Any], out: Path) -> tuple[Any, Any]:
    """Do what `axolotl preprocess` does; return the configuration and the training rows."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets, load_preference_datasets

    forget_plugins()
    cfg = load_cfg(str(write_config(settings, out)))
    data = (load_preference_datasets if cfg.rl else load_datasets)(cfg=cfg)
    return cfg, data.train_dataset


@cache
def freeze_modules() -> None:
    """Keep the garbage collector off the million objects of the hosts' modules.

    The hosts collect some twenty times per run, which took longer than the run.
    """
    gc.collect()
    gc.freeze()


def forget_plugins() -> None:
    """axolotl keeps plugins of earlier runs of this process."""
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().plugins.clear()


def logged(trainer: Any, name: str = "loss") -> list[float]:
    """The values that the trainer logged under a name, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the real `axolotl` command; output of both streams together."""
    return _run([str(Path(sys.executable).with_name("axolotl")), *arguments], cwd, environment)


def two_processes(settings: dict[str, Any], folder: Path, **environment: str) -> tuple[list[Any], list[Any]]:
    """Train with two processes and return what the first of them logged: steps, and evaluations."""
    path = write_config(settings, folder)
    processes = ("--nproc_per_node", "2", "--master_port", str(free_port()))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    if settings.get("deepspeed"):
        starter = [str(Path(sys.executable).with_name("torchrun")), *processes, ON_CPU]
        result = _run([*starter, "train", str(path)], folder, {"DS_ACCELERATOR": "cpu"} | environment)
    else:
        result = command("train", str(path), "--launcher", "torchrun", "--", *processes, cwd=folder, **environment)
    assert result.returncode == 0, result.stdout[-4000:]
    steps, evaluations = (
        [ast.literal_eval(line) for line in re.findall(rf"\{{'{name}'.*?\}}", result.stdout)]
        for name in ("loss", "eval_loss")
    )
    return list({float(entry["epoch"]): entry for entry in steps}.values()), evaluations


def _run(arguments: list[str], cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # A run of `preprocess` in this process leaves a mark, with which others would not start DeepSpeed.
    here = {name: value for name, value in os.environ.items() if name != "AXOLOTL_IS_PREPROCESS"}
    return subprocess.run(
        arguments,
        cwd=cwd,
        env=here | ENVIRONMENT | {"PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


def sharded_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `axolotl` with DeepSpeed in one process on the CPU."""
    return _run([sys.executable, ON_CPU, *arguments], cwd, {"DS_ACCELERATOR": "cpu"})


def free_port() -> int:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return int(connection.getsockname()[1])
