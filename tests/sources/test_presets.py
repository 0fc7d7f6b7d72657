"""The published sampling settings."""

from source_checks import sample_config as config

from fusion_plugins.sources.presets import PRESETS
from fusion_plugins.sources.sample import sample_prompts
from fusion_plugins.sources.sample_config import SampleConfig, SampledSource
from fusion_plugins.store import open_rows


def test_the_published_table_is_a_preset_and_its_counts_are_the_default(models, prompts, tmp_path):
    assert {name.removeprefix("fusechat3-") for name in PRESETS} == {
        "gemma-2-27b",
        "mistral-large-2407",
        "llama-3.1-70b",
        "qwen-2.5-72b",
        "qwen-2.5-math-72b",
    }
    qwen = SampledSource(model="m", preset="fusechat3-qwen-2.5-72b", max_tokens=9)
    assert (qwen.temperature, qwen.top_p, qwen.repetition_penalty, qwen.max_tokens) == (0.7, 0.8, 1.05, 9)
    gemma = SampledSource(model="m", preset="fusechat3-gemma-2-27b", temperature=0.5)
    assert (gemma.temperature, gemma.top_p, gemma.domains) == (0.5, 0.95, ["instruction", "code"])
    assert SampleConfig(prompts="p", out="o", sources=[qwen.model_dump()]).n == {
        "instruction": 5,
        "code": 8,
        "chinese": 1,
        "math": 8,
    }
    entry = {"model": str(models["llama"]), "preset": "fusechat3-qwen-2.5-math-72b", "max_tokens": 4}
    sample_prompts(config(models, prompts, tmp_path / "out", sources=[entry]))
    assert {row["domain"] for row in open_rows(tmp_path / "out")} == {"math"}
