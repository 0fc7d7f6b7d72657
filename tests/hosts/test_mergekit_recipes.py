"""Every file under mergekit_configs/ runs with tiny models in the place of the real ones, and passes the check."""

import json
from pathlib import Path

import merging
import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner

from fusion_plugins.core.merging.sce import sce_merge
from fusion_plugins.core.merging.varm import varm_merge
from fusion_plugins.mergekit.check import check_merge

RECIPES = sorted(path.name for path in merging.CONFIGS.glob("*.yml"))
PUBLISHED = {
    "fusechat_v1_linear.yml": ("linear", [1.0, 2.0], {}),
    "fusechat_v1_slerp.yml": ("slerp", [], {}),
    "fusechat_v1_task_arithmetic.yml": ("task_arithmetic", [0.25, 0.5], {"normalize": True}),
    "fusechat_v1_ties.yml": ("ties", [0.25, 0.5], {"normalize": True}),
    "fusechat_v1_dare.yml": ("dare_linear", [0.25, 0.5], {"normalize": True}),
    "fusechat_v2_linear.yml": ("linear", [0.2] * 5, {}),
    "fusechat_v2_task_arithmetic.yml": ("task_arithmetic", [0.3] * 5, {"normalize": False}),
    "fusechat_v2_ties.yml": ("ties", [0.2] * 5, {"normalize": True}),
    "fusechat_v2_dare.yml": ("dare_linear", [0.2] * 5, {"normalize": True}),
    "fusechat_v2_sce.yml": ("fusechat_sce", [], {"select_topk": 0.1, "variant": "paper"}),
    "fuseo1_sce.yml": ("fusechat_sce", [], {"select_topk": 1.0, "variant": "paper"}),
    "varm.yml": ("varm", [], {"granularity": "matrix", "measure": "square", "normalize": "ratio"}),
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Returns a function: name of a real model -> folder of a tiny one, always the same for the same name."""
    folder = tmp_path_factory.mktemp("stand_ins")
    base = tiny.llama_checkpoint(folder / "base", dtype="bfloat16")
    made = {}

    def stand_in(name):
        if name not in made:
            seed = len(made) + 1
            made[name] = tiny.llama_checkpoint(folder / str(seed), seed=seed, moved=1e-2, base=base, dtype="bfloat16")
        return str(base if name in ("openchat/openchat_3.5", "Qwen/Qwen2.5-32B") else made[name])

    return stand_in


def with_stand_ins(value, stand_in, kept=()):
    """The configuration with every model replaced, and the layers of a two-layer model."""
    if isinstance(value, list):
        return [with_stand_ins(item, stand_in, kept) for item in value]
    if not isinstance(value, dict):
        return value
    replaced = {}
    for key, item in value.items():
        if key in ("model", "base_model") and item not in kept:
            replaced[key] = stand_in(item)
        elif key == "layer_range":
            replaced[key] = [0, 2]
        else:
            replaced[key] = with_stand_ins(item, stand_in, kept)
    return replaced


def run(path, out, *flags, multi=False):
    from mergekit.scripts.multimerge import main as run_multi
    from mergekit.scripts.run_yaml import main as run_one

    arguments = ["--intermediate-dir", str(out.parent / "parts"), "--out-path", str(out)] if multi else [str(out)]
    result = CliRunner().invoke(run_multi if multi else run_one, [str(path), *arguments, "--quiet", *flags])
    if result.exception is not None:
        raise result.exception


def test_there_are_recipes():
    assert len(RECIPES) == 15
    assert set(PUBLISHED) <= set(RECIPES)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "lora" not in name])
def test_recipe_passes_the_check_and_runs(recipe, stand_ins, tmp_path):
    documents = list(yaml.safe_load_all((merging.CONFIGS / recipe).read_text()))
    kept = {document["name"] for document in documents if "name" in document}
    path = tmp_path / recipe
    path.write_text(yaml.safe_dump_all([with_stand_ins(document, stand_ins, kept) for document in documents]))
    check = check_merge(path, out=tmp_path)
    assert [finding for finding in check.findings if finding.level == "error"] == []
    run(path, tmp_path / "out", multi=len(documents) > 1)
    merged = tiny.tensors_of(tmp_path / "out")
    reference = tiny.tensors_of(Path(stand_ins("openchat/openchat_3.5")))
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in reference.items()}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.values())
    assert {tensor.dtype for tensor in merged.values()} <= {torch.bfloat16, torch.float16}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipe_has_the_published_settings(recipe):
    method, weights, parameters = PUBLISHED[recipe]
    config = yaml.safe_load((merging.CONFIGS / recipe).read_text())
    assert config["merge_method"] == method
    models = config.get("models") or config["slices"][0]["sources"]
    assert [model["parameters"]["weight"] for model in models if "weight" in model.get("parameters", {})] == weights
    assert {key: config.get("parameters", {}).get(key) for key in parameters} == parameters
    densities = {model["parameters"]["density"] for model in models if "density" in model.get("parameters", {})}
    wanted = {0.5 if "_v1_" in recipe else 0.6} if method in ("ties", "dare_linear") else set()
    assert densities == wanted
    if method == "slerp":
        assert config["parameters"]["t"] == [
            {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
            {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
            {"value": 0.5},
        ]


def test_the_adapter_recipe_runs(stand_ins, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((merging.CONFIGS / "varm_lora.yml").read_text())
    base = config["base_model"] = stand_ins(config["base_model"])
    for seed, entry in enumerate(config["models"]):
        torch.manual_seed(seed)
        settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapter = entry["model"].partition("+")[2]
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(adapter)
        entry["model"] = f"{base}+{adapter}"
    path = tmp_path / "varm_lora.yml"
    path.write_text(yaml.safe_dump(config))
    missing_cache = check_merge(path)
    assert [finding.cure for finding in missing_cache.findings] == ["run with --lora-merge-cache FOLDER"] * 2
    run(path, tmp_path / "out", "--lora-merge-cache", str(tmp_path / "cache"))
    merged, reference = tiny.tensors_of(tmp_path / "out"), tiny.tensors_of(Path(base))
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, reference[name])}
    assert changed == {name for name in reference if "q_proj" in name or "v_proj" in name}


def test_the_multi_recipe_is_varm_twice_and_then_sce(stand_ins, tmp_path):
    documents = list(yaml.safe_load_all((merging.CONFIGS / "multi_varm_sce.yml").read_text()))
    kept = {document.get("name") for document in documents}
    path = tmp_path / "multi.yml"
    path.write_text(yaml.safe_dump_all([with_stand_ins(document, stand_ins, kept) for document in documents]))
    run(path, tmp_path / "out", multi=True)
    base = tiny.tensors_of(Path(stand_ins("openchat/openchat_3.5")))
    parts = {}
    for document, granularity in zip(documents[:2], ("matrix", "layer"), strict=True):
        tuned = [tiny.tensors_of(Path(stand_ins(model["model"]))) for model in document["models"]]
        wide = {name: tensor.float() for name, tensor in base.items()}
        merged = varm_merge(wide, [{n: t.float() for n, t in m.items()} for m in tuned], granularity=granularity)
        parts[document["name"]] = {name: tensor.bfloat16() for name, tensor in merged.items()}
        written = tiny.tensors_of(tmp_path / "parts" / document["name"])
        assert all(torch.equal(written[name], tensor) for name, tensor in parts[document["name"]].items())
        record = json.loads((tmp_path / "parts" / document["name"] / "fusion_merge.json").read_text())
        assert record["method"] == "varm"
    final = tiny.tensors_of(tmp_path / "out")
    for name, tensor in base.items():
        tuned = [part[name].float() for part in parts.values()]
        assert torch.equal(final[name], sce_merge(tensor.float(), tuned, select_topk=0.5).bfloat16())
    assert json.loads((tmp_path / "out" / "fusion_merge.json").read_text())["method"] == "fusechat_sce"
