"""``ask_ids`` of `fusion capture`: the target's store says for which tokens a source is asked besides its top k."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusion_plugins.core.fusion.asked import IdsOfTarget
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, ConfigError, MismatchError
from fusion_plugins.sources.backends.base import Source
from fusion_plugins.store import Store, open_store
from fusion_plugins.texts import Text

#: backends that may be asked for given ids
BACKENDS = ("transformers", "vllm")


@dataclass(frozen=True)
class Asked:
    """The ids that a source is asked for, text by text.

    Attributes:
        store: of the target.
        ids: its tokens in the source's ids.
    """

    store: Store
    ids: IdsOfTarget

    @classmethod
    def of(cls, folder: str, own: TokenTable, backend: str, rows: int | None = None) -> "Asked":
        """Open the target's store.

        Args:
            folder: the store.
            own: the source's tokens.
            backend: what runs the source.
            rows: ids that the model of the source has; it is not asked for others, which its tokenizer may know.

        Raises:
            ConfigError: the backend cannot be asked.
            StoreError: the store is missing or damaged.
        """
        if backend not in BACKENDS:
            raise ConfigError(
                f"ask_ids: expected a backend that can be asked for given ids, {' or '.join(BACKENDS)}, got {backend}. "
                "Choose one of them, or remove ask_ids and capture with a larger top_k."
            )
        store = open_store(folder)
        ids = IdsOfTarget.of(own, store.table)
        if rows is not None:
            ids = replace(ids, ids=np.where(ids.ids < rows, ids.ids, -1).astype(np.int32))
        return cls(store, ids)

    @property
    def width(self) -> int:
        """Entries per position that are added at most."""
        return self.store.manifest.top_k

    def of_texts(self, texts: Sequence[Text], tokens: Sequence[TokenizedText]) -> list[TokenizedText]:
        """Return the tokens of texts with the ids that are asked for.

        Raises:
            MismatchError: the store lacks a text, or was captured from another one.
        """
        found: list[TokenizedText] = []
        for text, own in zip(texts, tokens, strict=True):
            cure = "Capture it from the same texts, to the end, or remove ask_ids."
            if text.id not in self.store:
                raise MismatchError(f"ask_ids: the store {self.store.path} lacks text {text.id!r}. {cure}")
            try:
                found.append(self.ids.asked(own, self.store[text.id]))
            except AlignmentError as error:
                raise MismatchError(f"ask_ids: {self.store.path}: text {text.id!r}: {error} {cure}") from error
        return found


def require_answers(source: Source, name: str) -> None:
    """Raise ConfigError unless an opened source can be asked for given ids."""
    if not getattr(source, "asks_ids", False):
        engine = f"{source.facts['engine']} {source.facts['engine_version']}"
        raise ConfigError(
            f"source {name!r}: ask_ids: expected an engine that can be asked for given ids at each position, got "
            f"{engine}, which cannot: vLLM needs SamplingParams.prompt_logprob_token_ids (0.33, or a build that has "
            "it) and its V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1, on a GPU). Use the transformers backend, or "
            "remove ask_ids and capture with a larger top_k."
        )
