"""The sampling settings that FuseChat-3.0 publishes, by source model.

Temperatures, top-p, repetition penalty, the domains that each source answers and the samples per prompt are the
authors'. They publish neither a maximum length nor the samples per mathematics prompt; those are ours.
"""

from typing import Any

_INSTRUCTION_AND_CODE = ["instruction", "code"]

#: name -> settings of a source
PRESETS: dict[str, dict[str, Any]] = {
    "fusechat3-gemma-2-27b": {"temperature": 0.8, "top_p": 0.95, "domains": _INSTRUCTION_AND_CODE},
    "fusechat3-mistral-large-2407": {"temperature": 0.8, "top_p": 0.95, "domains": _INSTRUCTION_AND_CODE},
    "fusechat3-llama-3.1-70b": {"temperature": 0.8, "top_p": 0.95, "domains": _INSTRUCTION_AND_CODE},
    "fusechat3-qwen-2.5-72b": {
        "temperature": 0.7,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
        "domains": [*_INSTRUCTION_AND_CODE, "chinese"],
    },
    "fusechat3-qwen-2.5-math-72b": {
        "temperature": 0.7,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
        "domains": ["math"],
    },
}

#: domain -> samples per prompt and source
SAMPLES_PER_PROMPT = {"instruction": 5, "code": 8, "chinese": 1, "math": 8}
#: for any other domain
DEFAULT_SAMPLES = 5
