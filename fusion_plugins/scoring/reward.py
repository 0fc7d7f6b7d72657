"""Rewards of a sequence-classification reward model: raw scores, no sigmoid, whatever runs the model.

This module renders, tokenizes and checks; :mod:`~fusion_plugins.scoring.reward_backends` runs the model, so that every
backend reads the same ids. A model whose checkpoint has no head gives random numbers that look like rewards. It is
refused, and so is one that gives every response the same reward, or orders the
:mod:`~fusion_plugins.scoring.known_answers` the wrong way round.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import transformers
from pydantic import Field, model_validator

from fusion_plugins.checkpoint_fingerprint import checkpoint_fingerprint
from fusion_plugins.config import Settings, validate, with_preset
from fusion_plugins.core.text.messages import as_messages
from fusion_plugins.core.text.model_rows import beyond_the_model
from fusion_plugins.errors import ConfigError, DataError, ScoringError
from fusion_plugins.model_names import missing_folder, reason_of
from fusion_plugins.scoring.base import Row, Score
from fusion_plugins.scoring.known_answers import REVERSED, WORKING, KnownAnswerResult, judge_order, known_rows
from fusion_plugins.scoring.reward_backends.base import (
    REWARD_BACKENDS,
    Encoded,
    RewardSettings,
    open_reward_model,
)
from fusion_plugins.scoring.reward_presets import REWARD_PRESETS
from fusion_plugins.terminal import say

#: besides the weights, what decides about a reward: tokenizer, chat template, code that comes with the model
OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
#: architecture of ArmoRM, whose rewards the published gap window belongs to
_ARMORM = "LlamaForRewardModelWithGating"


class RewardOptions(Settings):
    """Options of the scorer ``reward``."""

    preset: str | None = Field(None, description="a known reward model with settings that suit it; keys beside it win")
    model: str = Field(description="folder or hub name, for example RLHFlow/ArmoRM-Llama3-8B-v0.1")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    backend: Literal[tuple(REWARD_BACKENDS)] = Field(  # type: ignore[valid-type]  # known at run time only
        "transformers",
        description="what runs the model: transformers or vllm in this process, server for HTTP, ray for actors",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="settings of the backend")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="bfloat16 leaves three digits of a reward, so that near ones become equal"
    )
    device: str = Field("auto", description="auto: a GPU where there is one (backend transformers)")
    batch_size: int = Field(
        64, ge=1, description="most responses per forward pass; 1 for a model without a padding token"
    )
    batch_tokens: int = Field(8192, ge=1, description="most tokens of one forward pass, padding included")
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
    self_check: Literal["raise", "warn", "skip"] = Field(
        "raise",
        description="a model that orders most known answers wrongly: raise an error, warn, or skip the check",
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        return with_preset(values, REWARD_PRESETS)


class RewardScorer:
    """Scores (prompt, response) with a reward model; the options are those of :class:`RewardOptions`.

    Raises:
        ConfigError: an option is wrong.
        ScoringError: the model cannot be loaded, its head is not in the checkpoint, or it does not discriminate.
    """

    domains: frozenset[str] | None = None

    def __init__(self, **options: Any) -> None:
        self._options = chosen = validate(RewardOptions, options, where="scorers.reward")
        if problem := missing_folder(chosen.model):
            raise ScoringError(f"reward model {chosen.model!r} cannot be loaded: {problem}. Correct `model`.")
        fields = RewardSettings.__dataclass_fields__
        self._model = open_reward_model(
            chosen.backend, RewardSettings(**{name: getattr(chosen, name) for name in fields})
        )
        try:
            self._tokenizer = _load_tokenizer(chosen)
            config = _load_config(chosen)
            self._rows = self._model.embedding_rows
            self._max_length = chosen.max_length or self._model.max_length or 1 << 30
            self._scale = _scale(chosen, config)
            self.facts = {
                "model": chosen.model,
                "revision": getattr(config, "_commit_hash", None) or chosen.revision,
                "checkpoint": checkpoint_fingerprint(chosen.model, also=OTHER_FILES),
                "dtype": chosen.dtype,
                "template": chosen.template,
                "label": chosen.label,
                "max_length": self._max_length,
                **self._model.facts,
            }
            if chosen.backend == "server":
                del self.facts["dtype"]  # the server's own
            self._check_head()
            if chosen.self_check != "skip":
                self._check_order()
        except BaseException:
            self.close()
            raise

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Return one reward per row; the order and the batches of the rows change it by rounding only."""
        scores: dict[int, Score] = {}
        encoded: dict[int, Encoded] = {}
        for place, row in enumerate(rows):
            try:
                encoded[place] = self._encode(row)
            except DataError as error:
                scores[place] = Score(reason=str(error))
        for place, reward in zip(encoded, self._model.rewards(list(encoded.values())), strict=True):
            if isinstance(reward, str):
                scores[place] = Score(reason=reward)
            elif math.isfinite(reward):
                scores[place] = Score(reward=reward, details={"model": self._scale})
            else:
                scores[place] = Score(reason=f"the reward is {reward}")
        return [scores[place] for place in range(len(rows))]

    def close(self) -> None:
        """Free the memory of the model."""
        self._model.close()

    def _encode(self, row: Row) -> Encoded:
        """Return the ids of a row.

        Raises:
            DataError: the model cannot take it; the reason is the same for all rows with that problem.
        """
        messages = as_messages(row["prompt"])
        if self._options.template == "plain":
            prompt = "\n\n".join(str(message.get("content") or "") for message in messages)
            texts: tuple[str, ...] | None = (prompt, row["response"])
            ids = list(self._tokenizer(prompt, row["response"])["input_ids"])
        else:
            messages.append({"role": "assistant", "content": row["response"]})
            try:
                text = self._tokenizer.apply_chat_template(messages, tokenize=False)
            except Exception as error:  # templates are programs; they raise what they like
                raise DataError(f"the chat template refuses it: {error!s:.200}") from error
            # The template has written the special tokens already.
            ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            texts = self._text_for_server(text, ids) if self._model.reads_texts else None
        if len(ids) > self._max_length:
            raise DataError(f"longer than {self._max_length} tokens")
        if not ids:
            raise DataError("no token is left of prompt and response")
        if problem := beyond_the_model(self._tokenizer, ids, self._rows):
            raise DataError(problem)
        return Encoded(ids, texts)

    def _text_for_server(self, text: str, ids: list[int]) -> tuple[str, ...] | None:
        """Return the text of which a tokenizer that adds special tokens makes these ids; None where there is none."""
        bos = self._tokenizer.bos_token
        for candidate in (text, text.removeprefix(bos) if bos else text):
            if list(self._tokenizer(candidate)["input_ids"]) == ids:
                return (candidate,)
        return None

    def _check_head(self) -> None:
        scores = self.score(known_rows()[:2])
        rewards = [score.reward for score in scores]
        if None in rewards or rewards[0] == rewards[1]:
            why = next((f" ({score.reason})" for score in scores if score.reason), "")
            raise ScoringError(
                f"reward model {self._options.model!r}: expected different finite rewards for a good and a senseless "
                f"answer, got {rewards[0]} and {rewards[1]}{why}. Its head is broken, or dtype "
                f"({self._options.dtype}), max_length ({self._max_length}) or template ({self._options.template}) is "
                "wrong: set `dtype: float32` or `template: plain`, or take another model."
            )

    def _check_order(self) -> None:
        """Refuse a model that orders known answers the wrong way round; say so where it is not much better."""
        rewards = [score.reward for score in self.score(known_rows())]
        if self._options.backend == "server":
            # The files of a served model are not here: its rewards are its fingerprint.
            self.facts["probe_rewards"] = rewards
            _warn_of_sigmoid(self._options.model, rewards)
        found = judge_order(rewards)
        # Of a known model more is known.
        least = WORKING if self._options.preset else REVERSED
        if found.judged and (found.share < least or found.share <= REVERSED):
            message = self._problem(found)
            if self._options.self_check == "raise":
                raise ScoringError(message)
            say(f"warning: {message}", stderr=True)
        elif not found.judged or found.share < WORKING:
            say(f"warning: {self._problem(found)}", stderr=True)

    def _problem(self, found: KnownAnswerResult) -> str:
        return (
            f"reward model {self._options.model!r}: expected at least {WORKING:.0%} of {len(known_rows()) // 2} known "
            f"answers in the right order, got {found}. Its rewards may be reversed or meaningless: check `label`, "
            f"`template` and the checkpoint, take another model, or set `self_check: warn` to go on all the same."
        )


def _warn_of_sigmoid(model: str, rewards: Sequence[float | None]) -> None:
    given = [reward for reward in rewards if reward is not None]
    if given and all(0 < reward < 1 for reward in given):
        say(
            f"warning: reward model {model!r}: all rewards of the known answers lie between 0 and 1. Raw scores were "
            "asked for; a server that applies a sigmoid all the same makes near rewards equal.",
            stderr=True,
        )


def _scale(options: RewardOptions, config: Any) -> str:
    """Return whose scale the rewards have: the name of the preset, ArmoRM or the model."""
    if options.preset:
        return options.preset
    architectures = getattr(config, "architectures", None) or []
    return "armorm" if _ARMORM in architectures else options.model


def _load_config(options: RewardOptions) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except Exception as error:
        if options.backend == "server":
            return None  # a folder with a tokenizer alone is enough there
        raise ScoringError(
            f"the configuration of reward model {options.model!r} cannot be loaded: {reason_of(error)}. Check the "
            "name, the network and `trust_remote_code`."
        ) from error


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
