"""What is to be done, in which order: the list of stages of the demonstration."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from fusion_demo.settings import SIZES, SOURCES, Settings
from fusion_demo.stages import Stage
from fusion_demo.texts import versions

__all__ = ["EVALUATED", "make_plan", "write_configs"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CONFIGS = HERE.parent / "configs"
PACKAGE = ROOT / "fusion_plugins"
BIN = Path(sys.executable).parent

#: run -> files of ``configs`` that are laid over ``axolotl.yml``, in order
AXOLOTL_RUNS = {
    "clm": ("clm",),
    "fusellm": ("fusellm",),
    "fusellm_paper": ("fusellm", "fusellm_paper"),
    "pair_code": ("fusellm", "pair_code"),
    "pair_maths": ("fusellm", "pair_maths"),
    "sft": ("sft",),
    "dpo": ("dpo",),
}
#: model folder -> what it is, in the order of the table
EVALUATED = {
    "code": "source for code (Mistral, SentencePiece 6144)",
    "maths": "source for maths (Qwen2, byte-level 3072, single digits)",
    "prose": "source for prose (GPT-NeoX, byte-level 5120)",
    "target": "target, before fusion (Llama, byte-level 4096)",
    "clm": "CLM: target trained on without fusion",
    "fusellm_paper": "FuseLLM, MinCE of all sources, lambda 0.9",
    "fusellm": "FuseLLM, MinCE of all sources, lambda 0.5",
    "pair_code": "FuseChat, target fused with code",
    "pair_maths": "FuseChat, target fused with maths",
    "merged": "FuseChat, the two merged with VaRM",
    "sft": "FuseChat-3.0, SFT on best of sources (from FuseLLM 0.5)",
    "dpo": "FuseChat-3.0, then DPO on pairs of sources",
}
#: models that one process measures, because they are finished at about the same time
EVALUATED_TOGETHER = (
    (*SOURCES, "target"),
    ("fusellm", "sft", "dpo"),
    ("pair_code", "pair_maths", "merged"),
    ("clm", "fusellm_paper"),
)
TITLES = {"merged": "mergekit-yaml varm", "sft": "axolotl train, SFT", "dpo": "axolotl train, DPO"}


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``; mappings are joined key by key, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _laid_over(below[key], value) if both else value
    return merged


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def _axolotl_config(name: str, settings: Settings) -> dict[str, Any]:
    config = _read(CONFIGS / "axolotl.yml")
    for overlay in AXOLOTL_RUNS[name]:
        config = _laid_over(config, _read(CONFIGS / f"{overlay}.yml"))
    if "sources" in config.get("fusion", {}):
        config["fusion"]["top_k"] = settings.top_k
    if settings.max_steps is not None:
        config["max_steps"] = settings.max_steps
    return config | {"output_dir": f"./models/{name}", "dataset_prepared_path": f"./prepared/{name}"}


def _configs(settings: Settings) -> dict[str, dict[str, Any]]:
    """Name -> settings of every tool that is run with a YAML file."""
    configs = {name: _axolotl_config(name, settings) for name in AXOLOTL_RUNS}
    configs["merged"] = _laid_over(_read(ROOT / "mergekit_configs" / "varm.yml"), _read(CONFIGS / "varm.yml"))
    configs["sample"] = _read(CONFIGS / "sample.yml")
    for source in configs["sample"]["sources"]:
        source |= {"n": settings.samples, "temperature": 0.6, "top_p": 0.95, "max_tokens": 120}
        source["options"] = {"batch_prompts": 64}
    return configs


def write_configs(work: Path, settings: Settings) -> None:
    """Write the YAML files of all tools to ``work/configs``."""
    (work / "configs").mkdir(parents=True, exist_ok=True)
    for name, config in _configs(settings).items():
        text = yaml.safe_dump(config, sort_keys=False)
        (work / "configs" / f"{name}.yml").write_text(text, encoding="utf-8")


def _tool(name: str, *arguments: str) -> tuple[str, ...]:
    return (str(BIN / name), *arguments)


def _step(size: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(HERE.parent / "step.py"), *arguments, "--size", size)


def _code(*modules: str) -> tuple[Path, ...]:
    return tuple(HERE / f"{module}.py" for module in modules)


def _own_stages(size: str, settings: Settings) -> list[Stage]:
    """Texts, tokenizers, and the models that fusion is given."""
    values = asdict(settings)
    written = {
        key: values[key] for key in ("seed", "heldout_problems", "prompts", *(k for k in values if "bytes" in k))
    }
    trained = {key: values[key] for key in ("seed", "source_tokens", "target_tokens", "source_share")}
    facts = {"versions": versions(), **written}
    code = _code("data", "texts", "problems")
    stages = [
        Stage("data", "texts and problems", _step(size, "data"), ("data",), code=code, facts=facts),
        Stage(
            "tokenizers",
            "4 tokenizers",
            _step(size, "tokenizers"),
            ("tokenizers",),
            ("data",),
            code=_code("vocabularies"),
        ),
    ]
    for name in ("maths", "code", "prose", "target"):
        what = "target" if name == "target" else f"source for {name}"
        command = _step(size, "pretrain", name)
        code = _code("models", "pretrain")
        stages.append(Stage(name, f"train the {what}", command, (f"models/{name}",), ("tokenizers",), code, trained))
    return stages


def _capture(name: str, settings: Settings) -> Stage:
    command = _tool("fusion", "capture", "--texts", "./data/common.jsonl", "--model", f"./models/{name}")
    command += ("--out", f"./stores/{name}", "--top-k", str(settings.top_k))
    code = (PACKAGE / "sources", PACKAGE / "store", PACKAGE / "core")
    return Stage(f"capture_{name}", f"fusion capture {name}", command, (f"stores/{name}",), (name,), code)


def _axolotl(name: str, configs: dict[str, dict[str, Any]]) -> Stage:
    config = configs[name]
    stores = [f"capture_{source['name']}" for source in config.get("fusion", {}).get("sources", [])]
    needs = [config["base_model"].removeprefix("./models/"), *stores]
    needs += ["score"] if name in ("sft", "dpo") else []
    outputs = (f"models/{name}", f"prepared/{name}")
    code = (PACKAGE / "axolotl", PACKAGE / "core") if "plugins" in config else ()
    command = _tool("axolotl", "train", f"./configs/{name}.yml", "--launcher", "python")
    title = TITLES.get(name, f"axolotl train, {name}")
    return Stage(name, title, command, outputs, tuple(dict.fromkeys(needs)), code, config)


def _evaluation(models: tuple[str, ...], size: str) -> Stage:
    outputs = tuple(f"scores/{name}.json" for name in models)
    code = _code("evaluate")
    title = f"evaluate {', '.join(models)}"
    return Stage(f"evaluate_{models[0]}", title, _step(size, "evaluate", *models), outputs, models, code)


def make_plan(size: str) -> list[Stage]:
    """The stages of a size; each stands after those that it needs, long ways first."""
    settings = SIZES[size]
    configs = _configs(settings)
    stages = _own_stages(size, settings)
    stages += [_capture(name, settings) for name in ("target", *SOURCES)]
    sample = _tool("fusion", "sample", "--config", "./configs/sample.yml")
    code = (PACKAGE / "sources", PACKAGE / "store")
    stages.append(Stage("sample", "fusion sample", sample, ("responses",), SOURCES, code, configs["sample"]))
    score = _tool("fusion", "score", "--responses", "./responses", "--out", "./scored", "--scorer", "math")
    stages.append(Stage("score", "fusion score", score, ("scored",), ("sample",), (PACKAGE / "scoring",)))
    stages += [_axolotl(name, configs) for name in ("fusellm", "sft", "dpo", "pair_code", "pair_maths")]
    merge = _tool("mergekit-yaml", "./configs/merged.yml", "./models/merged")
    code = (PACKAGE / "mergekit", PACKAGE / "core" / "merging")
    needs = ("target", "pair_code", "pair_maths")
    stages.append(Stage("merged", TITLES["merged"], merge, ("models/merged",), needs, code, configs["merged"]))
    stages += [_axolotl(name, configs) for name in ("clm", "fusellm_paper")]
    return stages + [_evaluation(models, size) for models in EVALUATED_TOGETHER]
