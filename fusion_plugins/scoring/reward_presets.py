"""Reward models with settings that suit them; a key beside the preset wins.

Names, context lengths and output forms are those of the models' own pages. No preset turns on `trust_remote_code`: to
run code that comes with a model stays the user's decision.
"""

from typing import Any

_SKYWORK: dict[str, Any] = {"dtype": "bfloat16", "max_length": 16384, "template": "chat"}
_SIZES = ("Llama-3.1-8B", "Llama-3.1-8B-40M", "Llama-3.2-3B", "Llama-3.2-1B", "Qwen3-8B", "Qwen3-4B", "Qwen3-1.7B")

#: name -> options of the scorer ``reward``
REWARD_PRESETS: dict[str, dict[str, Any]] = {
    # Its gated score is computed by code that comes with it, so only the transformers backend gives it. bfloat16 leaves
    # two or three digits of rewards that lie between 0 and 0.3.
    "armorm": {
        "model": "RLHFlow/ArmoRM-Llama3-8B-v0.1",
        "dtype": "float32",
        "max_length": 4096,
        "template": "chat",
    },
    **{
        f"skywork-v2-{size.lower()}": {"model": f"Skywork/Skywork-Reward-V2-{size}", **_SKYWORK}
        for size in (*_SIZES, "Qwen3-0.6B")
    },
}
