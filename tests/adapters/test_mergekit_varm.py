"""`varm` inside stock mergekit."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner

from fusion_plugins.core.varm import varm_merge

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three fine-tunes of it, moved little, more and not at all."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny.llama_checkpoint(folder / "base", dtype="bfloat16")
    return {
        "base": base,
        "one": tiny.llama_checkpoint(folder / "one", seed=1, moved=1e-2, base=base),
        "two": tiny.llama_checkpoint(folder / "two", seed=2, moved=3e-2, base=base),
        "same": tiny.llama_checkpoint(folder / "same", base=base),
    }


def merge(tmp_path, config, *flags):
    """Run `mergekit-yaml` in this process and return the merged tensors."""
    from mergekit.scripts.run_yaml import main

    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(main, [str(path), str(tmp_path / "out"), "--quiet", *flags])
    if result.exception is not None:
        raise result.exception
    return tiny.tensors_of(tmp_path / "out")


def config_of(models, *tuned, method="varm", **settings):
    return {
        "merge_method": method,
        "base_model": str(models["base"]),
        "models": [{"model": str(models[name])} for name in tuned],
    } | settings


def expected_of(models, *tuned, **settings):
    base = {name: tensor.float() for name, tensor in tiny.tensors_of(models["base"]).items()}
    return varm_merge(base, [tiny.tensors_of(models[name]) for name in tuned], **settings)


def test_mergekit_yaml_merges_the_shipped_recipe_with_other_models(models, tmp_path):
    config = yaml.safe_load((ROOT / "mergekit_configs" / "varm.yml").read_text())
    config["base_model"] = str(models["base"])
    for entry, name in zip(config["models"], ("one", "two"), strict=True):
        entry["model"] = str(models[name])
    path = tmp_path / "varm.yml"
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run([BIN / "mergekit-yaml", path, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = expected_of(models, "one", "two")
    merged = tiny.tensors_of(tmp_path / "out")
    assert set(merged) == set(expected)
    for name, tensor in merged.items():
        assert torch.equal(tensor, expected[name].bfloat16())
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0


@pytest.mark.parametrize("granularity", ["matrix", "row", "element"])
@pytest.mark.parametrize("measure", ["square", "abs"])
def test_the_command_gives_what_the_core_gives(models, tmp_path, granularity, measure):
    chosen = {"granularity": granularity, "measure": measure}
    merged = merge(tmp_path, config_of(models, "one", "two", "same", dtype="float32", parameters=chosen))
    for name, tensor in expected_of(models, "one", "two", "same", **chosen).items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=0)


def test_all_unchanged_keeps_the_base(models, tmp_path):
    merged = merge(tmp_path, config_of(models, "same", dtype="bfloat16"))
    for name, tensor in tiny.tensors_of(models["base"]).items():
        assert torch.equal(merged[name], tensor)
