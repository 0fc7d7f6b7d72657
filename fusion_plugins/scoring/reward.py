"""Rewards of a sequence-classification reward model, run by transformers: raw scores, no sigmoid.

A model whose checkpoint has no head gives random numbers that look like rewards. It is refused, and so is one that
gives every response the same reward.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import transformers
from pydantic import Field

from fusion_plugins.checkpoint_fingerprint import checkpoint_fingerprint
from fusion_plugins.config import Settings, validate
from fusion_plugins.core.text.messages import as_messages
from fusion_plugins.core.text.model_rows import beyond_the_model
from fusion_plugins.errors import ConfigError, DataError, ScoringError
from fusion_plugins.model_names import missing_folder, reason_of
from fusion_plugins.scoring.base import Row, Score

#: a good and a senseless answer; any reward model that works gives them different rewards
PROBES = (
    {"prompt": "What is 12 + 30?", "response": "12 + 30 = 42."},
    {"prompt": "What is 12 + 30?", "response": "I refuse, and the sky is a fish fish fish."},
)


#: besides the weights, what decides about a reward: tokenizer, chat template, code that comes with the model
OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")


class RewardOptions(Settings):
    """Options of the scorer ``reward``."""

    model: str = Field(description="folder or hub name, for example RLHFlow/ArmoRM-Llama3-8B-v0.1")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="bfloat16 leaves three digits of a reward, so that near ones become equal"
    )
    device: str = Field("auto", description="auto: a GPU where there is one")
    batch_size: int = Field(8, ge=1, description="responses per forward pass; 1 for a model without a padding token")
    max_length: int | None = Field(
        None,
        ge=2,
        description="longest prompt with response in tokens, default: the model's; what is longer gets no reward",
    )
    template: Literal["chat", "plain"] = Field(
        "chat",
        description="chat: the tokenizer's template; plain: prompt and response as the tokenizer joins two texts",
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model; ArmoRM needs it")
    label: int | None = Field(None, ge=0, description="which output is the reward, for a head with several")


class RewardScorer:
    """Scores (prompt, response) with a reward model; the options are those of :class:`RewardOptions`.

    Raises:
        ConfigError: an option is wrong.
        ScoringError: the model cannot be loaded, its head is not in the checkpoint, or it does not discriminate.
    """

    domains: frozenset[str] | None = None

    def __init__(self, **options: Any) -> None:
        self._options = chosen = validate(RewardOptions, options, where="scorers.reward")
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if chosen.device == "auto" else chosen.device
        self._model = _load_model(chosen).to(self._device)
        self._tokenizer = _load_tokenizer(chosen)
        text_config = self._model.config.get_text_config()
        self._pad_id = text_config.pad_token_id
        self._rows = self._model.get_input_embeddings().weight.shape[0]
        # Without a padding token the model cannot tell where a response ends that others in its batch are longer than.
        self._batch_size = chosen.batch_size if self._pad_id is not None else 1
        self._max_length = chosen.max_length or getattr(text_config, "max_position_embeddings", None) or 1 << 30
        self.facts = {
            "model": chosen.model,
            "revision": getattr(self._model.config, "_commit_hash", None) or chosen.revision,
            "checkpoint": checkpoint_fingerprint(chosen.model, also=OTHER_FILES),
            "dtype": chosen.dtype,
            "template": chosen.template,
            "label": chosen.label,
            "max_length": self._max_length,
            "transformers": transformers.__version__,
        }
        self._check_head()

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Return one reward per row; the order and the batches of the rows change it by rounding only."""
        scores: dict[int, Score] = {}
        encoded: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            try:
                encoded[place] = self._encode(row)
            except DataError as error:
                scores[place] = Score(reason=str(error))
        # Near lengths in one batch need little padding.
        fitting = sorted(encoded, key=lambda place: len(encoded[place]))
        for start in range(0, len(fitting), self._batch_size):
            batch = fitting[start : start + self._batch_size]
            for place, reward in zip(batch, self._forward([encoded[place] for place in batch]), strict=True):
                finite = math.isfinite(reward)
                scores[place] = Score(reward=reward) if finite else Score(reason=f"the reward is {reward}")
        return [scores[place] for place in range(len(rows))]

    def close(self) -> None:
        """Free the memory of the model."""
        del self._model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _encode(self, row: Row) -> list[int]:
        """Return the ids of a row.

        Raises:
            DataError: the model cannot take it; the reason is the same for all rows with that problem.
        """
        messages = as_messages(row["prompt"])
        if self._options.template == "plain":
            prompt = "\n\n".join(str(message.get("content") or "") for message in messages)
            ids = list(self._tokenizer(prompt, row["response"])["input_ids"])
        else:
            messages.append({"role": "assistant", "content": row["response"]})
            try:
                text = self._tokenizer.apply_chat_template(messages, tokenize=False)
            except Exception as error:  # templates are programs; they raise what they like
                raise DataError(f"the chat template refuses it: {error!s:.200}") from error
            # The template has written the special tokens already.
            ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) > self._max_length:
            raise DataError(f"longer than {self._max_length} tokens")
        if not ids:
            raise DataError("no token is left of prompt and response")
        if problem := beyond_the_model(self._tokenizer, ids, self._rows):
            raise DataError(problem)
        return ids

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
        width, label = output.logits.shape[-1], self._options.label
        if (width > 1 and label is None) or (label or 0) >= width:
            raise ConfigError(
                f"scorers.reward: expected a head with one output, or a `label` below the number of outputs; that of "
                f"{self._options.model!r} has {width} outputs ({self._model.config.id2label}), label is {label}; say "
                "with `label` which one is the reward"
            )
        return cast(torch.Tensor, output.logits[:, label or 0])

    def _check_head(self) -> None:
        scores = self.score(PROBES)
        rewards = [score.reward for score in scores]
        if None in rewards or rewards[0] == rewards[1]:
            why = next((f" ({score.reason})" for score in scores if score.reason), "")
            raise ScoringError(
                f"reward model {self._options.model!r}: expected different finite rewards for a good and a senseless "
                f"answer, got {rewards[0]} and {rewards[1]}{why}. Its head is broken, or dtype "
                f"({self._options.dtype}), max_length ({self._max_length}) or template ({self._options.template}) is "
                "wrong: set `dtype: float32` or `template: plain`, or take another model."
            )


def _load_model(options: RewardOptions) -> Any:
    if problem := missing_folder(options.model):
        raise ScoringError(f"reward model {options.model!r} cannot be loaded: {problem}. Correct `model`.")
    try:
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            options.model,
            dtype=getattr(torch, options.dtype),
            output_loading_info=True,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
    except Exception as error:
        raise ScoringError(
            f"reward model {options.model!r} cannot be loaded: {reason_of(error)}. Expected a folder or hub name of a "
            "sequence-classification model: check the name, the network and `trust_remote_code`."
        ) from error
    # transformers only warns where a weight is missing, and fills it with random numbers.
    missing = sorted({*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])})
    if missing:
        raise ScoringError(
            f"reward model {options.model!r}: {', '.join(missing[:5])} is not in the checkpoint and was filled with "
            "random numbers, so its rewards would be random. Expected a checkpoint of a sequence-classification model; "
            f"unused weights of this one: {', '.join(sorted(info['unexpected_keys'])[:5]) or 'none'}. Does it need "
            "trust_remote_code?"
        )
    return model.eval()


def _load_tokenizer(options: RewardOptions) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except Exception as error:
        raise ScoringError(
            f"the tokenizer of reward model {options.model!r} cannot be loaded: {reason_of(error)}. Check the name, "
            "the network and `trust_remote_code`."
        ) from error
    if options.template == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            f"reward model {options.model!r}: expected a tokenizer with a chat template, but it has no chat template; "
            "set `template: plain` if the model was trained on bare pairs of prompt and response"
        )
    return tokenizer
