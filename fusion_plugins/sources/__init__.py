"""What asks source models: texts and prompts in, top-k log-probabilities and responses out.

``capture`` and ``sample`` work with any backend (``transformers``, ``vllm``, ``openai``, ``ray``). Importing this
package loads none of them. Reading order: ``capture_config`` and ``capture`` (or ``sample_config`` and ``sample``),
``batches``, ``backends/base``, one backend.
"""

from typing import TYPE_CHECKING

from fusion_plugins._lazy import lazy_names

if TYPE_CHECKING:
    from fusion_plugins.sources.capture import capture_texts
    from fusion_plugins.sources.capture_config import CaptureConfig
    from fusion_plugins.sources.sample import sample_prompts
    from fusion_plugins.sources.sample_config import SampleConfig

__all__ = ["CaptureConfig", "SampleConfig", "capture_texts", "sample_prompts"]

__getattr__ = lazy_names(
    __name__,
    {
        "capture_config": ("CaptureConfig",),
        "capture": ("capture_texts",),
        "sample_config": ("SampleConfig",),
        "sample": ("sample_prompts",),
    },
)
