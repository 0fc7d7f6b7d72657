"""The ``server`` backend: reward models behind HTTP, by vLLM's ``/classify`` and ``/pooling`` or TEI's ``/predict``.

vLLM gets token ids. TEI (text-embeddings-inference) takes texts and adds special tokens itself: the scorer gives it
texts of which the same tokenizer makes the same ids.
"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from fusion_plugins.config import validate
from fusion_plugins.errors import ScoringError
from fusion_plugins.scoring.reward_backends.base import Encoded, RewardSettings, chosen_output
from fusion_plugins.sources.backends.base import Refusal
from fusion_plugins.sources.backends.completions import quoted
from fusion_plugins.sources.backends.connections import ConnectionOptions, answers_in_flight, open_pool
from fusion_plugins.sources.backends.http import HttpClient, NoAnswer
from fusion_plugins.sources.backends.openai_server import DESCRIBE_SECONDS
from fusion_plugins.sources.backends.servers import Refused, Trouble


class RewardServerOptions(ConnectionOptions):
    """Keys of ``options`` for the backend ``server`` of the scorer ``reward``."""

    endpoint: Literal["classify", "pooling", "predict"] = Field(
        "classify", description="classify or pooling: vLLM's server; predict: text-embeddings-inference"
    )
    served_name: str | None = Field(None, description="name under which the server has the model; default: `model`")


def open_model(settings: RewardSettings) -> "ServerRewardModel":
    """Connect to the servers; see :func:`fusion_plugins.scoring.reward_backends.base.open_reward_model`."""
    return ServerRewardModel(settings)


class ServerRewardModel:
    """One reward model on one or more servers."""

    embedding_rows = None

    def __init__(self, settings: RewardSettings) -> None:
        self._options = options = validate(RewardServerOptions, settings.options, where="scorers.reward.options")
        self._settings = settings
        self._name = options.served_name or settings.model
        self.reads_texts = options.endpoint == "predict"
        urls = [options.base_url] if isinstance(options.base_url, str) else options.base_url
        # These endpoints are beside the OpenAI-compatible ones, whose URL is the one that people have at hand.
        roots = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self._pool = open_pool(options.model_copy(update={"base_url": roots}))
        described = [self._describe(server.client) for server in self._pool.servers]
        lengths = [length for length, _ in described if length is not None]
        self.max_length: int | None = min(lengths, default=None)
        told = [about for _, about in described if about]
        if any(about != told[0] for about in told):
            raise ScoringError(
                f"scorers.reward: expected servers with one reward model, got {told[0]!r} and others: "
                f"{next(about for about in told if about != told[0])!r}. Name servers of one model in base_url."
            )
        self.facts: dict[str, Any] = {"endpoint": options.endpoint, "served": told[0] if told else self._name}

    def rewards(self, rows: Sequence[Encoded]) -> list[float | str]:
        """Return the raw rewards, in the order of the rows; many requests are in flight."""
        found: list[float | str] = [""] * len(rows)
        most = self._options.concurrency * len(self._pool.servers)
        for (_, place), reward in answers_in_flight(self._pool, most, [rows], self._reward):
            found[place] = reward.reason if isinstance(reward, Refusal) else reward
        return found

    def close(self) -> None:
        """Close the connections."""
        self._pool.stop()

    def _reward(self, row: Encoded) -> float:
        if self._options.endpoint == "predict":
            if row.texts is None:
                raise Refused("no text is known of which the server's tokenizer makes the same tokens")
            # Two lists: a list of two texts alone would be a batch of one pair.
            body: dict[str, Any] = {"inputs": [list(row.texts)], "raw_scores": True, "truncate": False}
            return self._pool.post("/predict", body, self._of_predict, kind=list)
        body = {"model": self._name, "input": row.ids, "use_activation": False}
        if self._options.endpoint == "pooling":
            body["task"] = "classify"
        return self._pool.post(f"/{self._options.endpoint}", body, self._of_vllm)

    def _of_vllm(self, answer: dict[str, Any]) -> float:
        data = answer.get("data")
        first = data[0] if isinstance(data, list) and data and isinstance(data[0], dict) else {}
        return self._chosen(first.get("probs" if self._options.endpoint == "classify" else "data"), answer)

    def _of_predict(self, answer: list[Any]) -> float:
        first = answer[0] if answer else None
        scores = first if isinstance(first, list) else answer
        if not all(isinstance(score, dict) for score in scores):
            raise Trouble(f"expected one score per label, got {quoted(answer)}")
        # The best comes first; a label's own number is in its name, where the model gives it no other.
        by_label = sorted(scores, key=lambda score: _label_order(score.get("label")))
        return self._chosen([score.get("score") for score in by_label], answer)

    def _chosen(self, outputs: Any, answer: Any) -> float:
        numbers = isinstance(outputs, list) and all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in outputs
        )
        if not numbers or not outputs:
            raise Trouble(f"expected raw rewards, got {quoted(answer)}")
        return float(chosen_output(outputs, self._settings.label, self._settings.model))

    def _describe(self, client: HttpClient) -> tuple[int | None, dict[str, Any]]:
        """Return the longest input in tokens and what the server says of its model, where it says anything."""
        if self._options.endpoint == "predict":
            told = _ask(client, "/info")
            length = told.get("max_input_length")
            about = {name: told[name] for name in ("model_id", "model_sha", "model_dtype") if _is_word(told.get(name))}
        else:
            listed = _ask(client, "/v1/models").get("data")
            entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
            entry = next((entry for entry in entries if entry.get("id") == self._name), None)
            if entries and entry is None:
                names = ", ".join(str(entry.get("id"))[:80] for entry in entries)
                raise ScoringError(
                    f"{client.base_url}: expected the model {self._name!r}, got {names}. Set options.served_name."
                )
            told = entry or {}
            length = told.get("max_model_len")
            about = {name: told[name] for name in ("id", "root") if _is_word(told.get(name))}
        usable = isinstance(length, int) and not isinstance(length, bool) and length > 0
        return length if usable else None, about


def _label_order(label: Any) -> tuple[int, str]:
    text = str(label)
    number = text.rpartition("_")[2]
    return (int(number), "") if number.isdecimal() and len(number) < 9 else (-1, text)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= 500


def _ask(client: HttpClient, path: str) -> dict[str, Any]:
    """Return what a server says about itself; {} where it says nothing (if it is down, the first request fails)."""
    try:
        answer = client.get(client.base_url + path, seconds=DESCRIBE_SECONDS)
        found = answer.json() if answer.status == 200 else {}
    except (NoAnswer, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
