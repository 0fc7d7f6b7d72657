"""docs/sources.md documents the settings as they are."""

import re
from pathlib import Path

import yaml

from fusion_plugins.sources.backends.openai_server import ServerOptions
from fusion_plugins.sources.backends.ray_data import RayOptions
from fusion_plugins.sources.backends.transformers_local import TransformersOptions
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.sources.presets import PRESETS
from fusion_plugins.sources.sample import COLUMNS
from fusion_plugins.sources.sample_config import SampleConfig, SampledSource

TEXT = (Path(__file__).parents[2] / "docs" / "sources.md").read_text()


def test_the_examples_are_valid():
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)]
    samples = [block for block in blocks if "sources" in block]
    captures = [CaptureConfig(**block) for block in blocks if "sources" not in block]
    assert (len(samples), len(captures)) == (1, 3)
    assert captures[0].columns.field_messages == "conversations"
    assert captures[2].context.columns == ("reference",)
    settings = SampleConfig(**samples[0])
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
