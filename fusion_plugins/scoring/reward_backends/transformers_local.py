"""The ``transformers`` backend: any sequence-classification model in this process, and the reference for the others."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import transformers

from fusion_plugins.config import validate
from fusion_plugins.errors import ScoringError
from fusion_plugins.model_names import reason_of
from fusion_plugins.scoring.reward_backends.base import Encoded, NoOptions, RewardSettings, chosen_output


def open_model(settings: RewardSettings) -> "TransformersRewardModel":
    """Load the model; see :func:`fusion_plugins.scoring.reward_backends.base.open_reward_model`."""
    return TransformersRewardModel(settings)


class TransformersRewardModel:
    """One sequence-classification model."""

    reads_texts = False

    def __init__(self, settings: RewardSettings) -> None:
        validate(NoOptions, settings.options, where="scorers.reward.options")
        self._settings = settings
        device = settings.device
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._model = _load_model(settings).to(self._device)
        text_config = self._model.config.get_text_config()
        self._pad_id = text_config.pad_token_id
        self.embedding_rows: int | None = self._model.get_input_embeddings().weight.shape[0]
        self.max_length: int | None = getattr(text_config, "max_position_embeddings", None)
        # Without a padding token the model cannot tell where a response ends that others in its batch are longer than.
        self._batch_size = settings.batch_size if self._pad_id is not None else 1
        self.facts: dict[str, Any] = {"transformers": transformers.__version__}

    def rewards(self, rows: Sequence[Encoded]) -> list[float | str]:
        """Return the raw rewards; rows of similar length share a forward pass."""
        found: list[float | str] = [""] * len(rows)
        for places in batches_by_length([len(row.ids) for row in rows], self._batch_size, self._settings.batch_tokens):
            for place, reward in zip(places, self._forward([rows[place].ids for place in places]), strict=True):
                found[place] = reward
        return found

    def close(self) -> None:
        """Free the memory of the model."""
        del self._model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _forward(self, encoded: Sequence[Sequence[int]]) -> list[float]:
        width = max(len(ids) for ids in encoded)
        pad = 0 if self._pad_id is None else self._pad_id
        # Padding on the right: these models read the reward at the last token that is not padding.
        ids = torch.tensor([[*one, *[pad] * (width - len(one))] for one in encoded], device=self._device)
        lengths = torch.tensor([len(one) for one in encoded], device=self._device)
        mask = (torch.arange(width, device=self._device)[None] < lengths[:, None]).long()
        with torch.inference_mode():
            output = self._model(input_ids=ids, attention_mask=mask)
        return [float(reward) for reward in self._rewards(output).float()]

    def _rewards(self, output: Any) -> torch.Tensor:
        # The code that comes with ArmoRM returns its gated preference score as `score`; its logits are 19 objectives.
        if getattr(output, "score", None) is not None:
            return cast(torch.Tensor, output.score.flatten())
        outputs, names = output.logits, self._model.config.id2label
        label = chosen_output(range(outputs.shape[-1]), self._settings.label, self._settings.model, names)
        return cast(torch.Tensor, outputs[:, label])


def batches_by_length(lengths: Sequence[int], most_rows: int, most_tokens: int) -> list[list[int]]:
    """Group places by length, so that a group needs little padding and fits into memory.

    Args:
        lengths: tokens of each row.
        most_rows: rows of a group.
        most_tokens: rows times longest row of a group; one that is longer has its own group.

    Example:
        >>> batches_by_length([5, 90, 6, 4, 120], 8, 100)
        [[4], [1], [2, 0, 3]]
    """
    groups: list[list[int]] = []
    # The longest first, so that the first of a group is as wide as its forward pass, and a lack of memory shows soon.
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        group = groups[-1] if groups else []
        if group and len(group) < most_rows and (len(group) + 1) * lengths[group[0]] <= most_tokens:
            group.append(place)
        else:
            groups.append([place])
    return groups


def _load_model(settings: RewardSettings) -> Any:
    try:
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            settings.model,
            dtype=getattr(torch, settings.dtype),
            output_loading_info=True,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
    except Exception as error:
        raise ScoringError(
            f"reward model {settings.model!r} cannot be loaded: {reason_of(error)}. Expected a folder or hub name of a "
            "sequence-classification model: check the name, the network and `trust_remote_code`."
        ) from error
    # transformers only warns where a weight is missing, and fills it with random numbers.
    missing = sorted({*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])})
    if missing:
        raise ScoringError(
            f"reward model {settings.model!r}: {', '.join(missing[:5])} is not in the checkpoint and was filled with "
            "random numbers, so its rewards would be random. Expected a checkpoint of a sequence-classification model; "
            f"unused weights of this one: {', '.join(sorted(info['unexpected_keys'])[:5]) or 'none'}. Does it need "
            "trust_remote_code?"
        )
    return model.eval()
