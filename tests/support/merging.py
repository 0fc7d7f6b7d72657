"""Helpers of the merge tests: tiny checkpoints, and mergekit's own commands run in this process."""

from pathlib import Path

import tiny
import yaml
from click import ClickException
from click.testing import CliRunner

from fusion_plugins.core.merging.varm import varm_merge

CONFIGS = Path(__file__).parents[2] / "mergekit_configs"


def make_models(folder: Path, **config) -> dict[str, Path]:
    """A base in bfloat16, two tuned models that changed by different amounts, and one unchanged copy."""
    base = tiny.llama_checkpoint(folder / "base", dtype="bfloat16", **config)
    return {
        "base": base,
        "one": tiny.llama_checkpoint(folder / "one", seed=1, moved=1e-2, base=base),
        "two": tiny.llama_checkpoint(folder / "two", seed=2, moved=3e-2, base=base, shard="20KB"),
        "same": tiny.llama_checkpoint(folder / "same", base=base),
    }


def config_of(models, *tuned, method="varm", **settings):
    """A merge configuration over the named models."""
    return {
        "merge_method": method,
        "base_model": str(models["base"]),
        "models": [{"model": str(models[name])} for name in tuned],
    } | settings


def run_merge(folder: Path, config, *flags, name="out"):
    """Run `mergekit-yaml` in this process; raise what stopped it, else return the folder of the merged model."""
    from mergekit.scripts.run_yaml import main

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(config))
    arguments = [str(path), str(folder / name), "--quiet", *map(str, flags)]
    result = CliRunner().invoke(main, arguments, standalone_mode=False)
    if isinstance(result.exception, ClickException):  # made for the terminal, from what was raised
        raise result.exception.__cause__ or result.exception
    if result.exception is not None:
        raise result.exception
    return folder / name


def merge(folder: Path, config, *flags, name="out"):
    """The tensors of the merged model."""
    return tiny.tensors_of(run_merge(folder, config, *flags, name=name))


def expected_of(models, *tuned, **settings):
    """What the core returns for the whole checkpoints in memory, in float32."""
    base = {key: tensor.float() for key, tensor in tiny.tensors_of(models["base"]).items()}
    return varm_merge(base, [tiny.tensors_of(models[name]) for name in tuned], **settings)
