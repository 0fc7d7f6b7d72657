"""What every reward model offers, whatever runs it: raw rewards of texts that are tokenized already.

The scorer renders and tokenizes, so that every backend reads the same ids. A backend is a module with a function from
settings to a :class:`RewardModel`; :func:`open_reward_model` picks it by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from fusion_plugins.config import Settings
from fusion_plugins.errors import ConfigError
from fusion_plugins.install import missing_package_error

#: backend -> module that defines ``open_model(settings) -> RewardModel``
REWARD_BACKENDS: dict[str, str] = {
    "transformers": "fusion_plugins.scoring.reward_backends.transformers_local",
    "vllm": "fusion_plugins.scoring.reward_backends.vllm_engine",
    "server": "fusion_plugins.scoring.reward_backends.server",
    "ray": "fusion_plugins.scoring.reward_backends.ray_actors",
}


@dataclass(frozen=True)
class RewardSettings:
    """What a backend has to know; the fields are those of :class:`~fusion_plugins.scoring.reward.RewardOptions`."""

    model: str
    revision: str | None
    dtype: str
    device: str
    batch_size: int
    batch_tokens: int
    max_length: int | None
    trust_remote_code: bool
    label: int | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """One prompt with its response, ready for a reward model.

    Attributes:
        ids: its tokens, special ones included.
        texts: what a server that tokenizes itself makes these ids of: a text, or the two texts that the tokenizer
            joins. None where no such text is known.
    """

    ids: list[int]
    texts: tuple[str, ...] | None = None


class RewardModel(Protocol):
    """A reward model, ready to be asked.

    Attributes:
        facts: what its rewards depend on beside the model's files; for the manifest.
        max_length: longest prompt with response in tokens; None where unknown.
        embedding_rows: ids that it can read; None where unknown.
        reads_texts: it tokenizes itself, so :attr:`Encoded.texts` is needed.
    """

    facts: dict[str, Any]
    max_length: int | None
    embedding_rows: int | None
    reads_texts: bool

    def rewards(self, rows: Sequence[Encoded]) -> list[float | str]:
        """Return one raw reward per row, in order; a text says why a row has none."""
        ...

    def close(self) -> None:
        """Free memory, processes and connections."""
        ...


def open_reward_model(backend: str, settings: RewardSettings) -> RewardModel:
    """Start a reward model.

    Raises:
        ConfigError: the backend's packages are not installed here, or an option is wrong.
        ScoringError: the model cannot be loaded, or the server does not answer.
    """
    try:
        module = import_module(REWARD_BACKENDS[backend])
    except ModuleNotFoundError as error:
        otherwise = f"Or choose another backend of {', '.join(REWARD_BACKENDS)}."
        raise missing_package_error(error, f"scorers.reward: backend {backend!r}", otherwise) from error
    model: RewardModel = module.open_model(settings)
    return model


def chosen_output(outputs: Sequence[float], label: int | None, model: str, names: Any = None) -> float:
    """Return the output of a head that is the reward.

    Raises:
        ConfigError: the head has several outputs and none is chosen, or it has not so many.
    """
    if (len(outputs) > 1 and label is None) or (label or 0) >= len(outputs):
        named = f" ({names})" if names else ""
        raise ConfigError(
            f"scorers.reward: expected a head with one output, or a `label` below the number of outputs; that of "
            f"{model!r} has {len(outputs)} outputs{named}, label is {label}; say with `label` which one is the reward"
        )
    return outputs[label or 0]


class NoOptions(Settings):
    """Keys of ``options`` for a backend that has none."""
