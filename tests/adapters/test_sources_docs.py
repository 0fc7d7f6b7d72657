"""docs/sources.md and the settings say the same."""

import re
from pathlib import Path

import yaml

from fusion_plugins.sources.capture import CaptureConfig
from fusion_plugins.sources.openai_server import ServerOptions
from fusion_plugins.sources.presets import PRESETS
from fusion_plugins.sources.ray_data import RayOptions
from fusion_plugins.sources.sample import COLUMNS, SampleConfig, SampledSource
from fusion_plugins.sources.transformers_local import TransformersOptions

TEXT = (Path(__file__).parents[2] / "docs" / "sources.md").read_text()


def test_the_examples_are_valid():
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)]
    capture, sample = blocks
    CaptureConfig(**capture)
    settings = SampleConfig(**sample)
    assert settings.n == SampleConfig(prompts="p", out="o", sources=[{"model": "m"}]).n
    for source in settings.sources:
        if source.backend == "openai":
            ServerOptions(**source.options)


def test_every_key_and_every_option_is_documented():
    models = (CaptureConfig, SampleConfig, SampledSource, ServerOptions, RayOptions, TransformersOptions)
    names = {name for model in models for name in model.model_fields} | {"engine", "logits_gib"}
    documented = set(
        re.findall(r"`([a-z_0-9.]+)`", "\n".join(line for line in TEXT.splitlines() if line.startswith("| `")))
    )
    assert names - documented == set()
    assert all(f"`{name}`" in TEXT for name in PRESETS)
    assert all(re.search(rf"\b{name}\b", TEXT) for name in COLUMNS)
