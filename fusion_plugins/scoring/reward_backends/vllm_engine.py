"""The ``vllm`` backend: vLLM's offline engine as a pooling model, in this process.

It imports nothing of the training hosts, so that it runs in an environment of its own (``make vllm-env``).
"""

import os
from collections.abc import Sequence
from typing import Any

from pydantic import Field

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import vllm
from vllm import LLM, PoolingParams
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

from fusion_plugins.config import Settings, validate
from fusion_plugins.errors import ScoringError
from fusion_plugins.scoring.reward_backends.base import Encoded, RewardSettings, chosen_output

try:
    from vllm.exceptions import VLLMClientError
except ImportError:  # older versions raise a ValueError instead
    VLLMClientError = ValueError


class VllmRewardOptions(Settings):
    """Keys of ``options`` for the backend ``vllm`` of the scorer ``reward``."""

    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of vllm.LLM: tensor_parallel_size, gpu_memory_utilization, quantization, ...; they win",
    )


def open_model(settings: RewardSettings) -> "VllmRewardModel":
    """Start the engine; see :func:`fusion_plugins.scoring.reward_backends.base.open_reward_model`."""
    return VllmRewardModel(settings)


class VllmRewardModel:
    """One vLLM engine that classifies."""

    reads_texts = False

    def __init__(self, settings: RewardSettings) -> None:
        self._settings = settings
        options = validate(VllmRewardOptions, settings.options, where="scorers.reward.options")
        self._llm = _start(settings, options)
        config = self._llm.llm_engine.model_config
        self.max_length: int | None = config.max_model_len
        self.embedding_rows: int | None = config.get_vocab_size()
        # The default is a sigmoid or a softmax, by which near rewards become equal.
        self._params = PoolingParams(use_activation=False)
        self.facts: dict[str, Any] = {"vllm": vllm.__version__}

    def rewards(self, rows: Sequence[Encoded]) -> list[float | str]:
        """Return the raw rewards; the engine makes its own batches."""
        return [
            output
            if isinstance(output, str)
            else chosen_output(output.outputs.data.float().tolist(), self._settings.label, self._settings.model)
            for output in self._outputs([row.ids for row in rows])
        ]

    def close(self) -> None:
        """End the engine's processes."""
        del self._llm

    def _outputs(self, prompts: list[list[int]]) -> list[Any]:
        """Ask for all at once; when vLLM refuses one of them, ask one by one, to find out which."""
        if not prompts:
            return []
        try:
            return self._llm.encode(
                [{"prompt_token_ids": ids} for ids in prompts], self._params, pooling_task="classify", use_tqdm=False
            )
        except EngineDeadError as error:
            raise ScoringError(
                f"reward model {self._settings.model!r}: expected vLLM's engine to answer, but its process ended: "
                f"{error}. If it ran out of memory, lower options.engine.gpu_memory_utilization or max_length; then "
                "run the same command again."
            ) from error
        except (ValueError, VLLMClientError) as error:
            if len(prompts) == 1:
                return [f"vLLM refuses it: {error!s:.200}"]
        return [self._outputs([ids])[0] for ids in prompts]


def _start(settings: RewardSettings, options: VllmRewardOptions) -> LLM:
    arguments: dict[str, Any] = {
        "runner": "pooling",
        "revision": settings.revision,
        "dtype": settings.dtype,
        "trust_remote_code": settings.trust_remote_code,
        "load_format": "safetensors",
        "max_model_len": settings.max_length,
    }
    if current_platform.is_cpu():
        # On a CPU this is the share of the machine's memory that must be free; vLLM's 0.92 suits accelerators.
        arguments["gpu_memory_utilization"] = 0.5
    try:
        llm = LLM(settings.model, **(arguments | options.engine))
    # Engines fail in as many ways as they have parts; what they say is all that there is to say.
    except Exception as error:
        raise ScoringError(
            f"reward model {settings.model!r}: vLLM cannot start: {error!s:.500}. Give arguments of the engine under "
            "`options: {engine: {...}}`, or take the transformers backend."
        ) from error
    tasks = llm.supported_tasks
    if "classify" not in tasks:
        raise ScoringError(
            f"reward model {settings.model!r}: expected a sequence-classification model, got one with which vLLM can "
            f"{', '.join(sorted(tasks)) or 'do nothing'}. Is its head in the checkpoint, and does config.json name it "
            "under architectures?"
        )
    return llm
