"""Token ids that a model has no row for: its tokenizer knows more tokens than its embeddings."""

from collections.abc import Iterable
from typing import Any


def beyond_the_model(tokenizer: Any, ids: Iterable[int], rows: int | None) -> str | None:
    """Say which of the ids has no row in the model, and what to do; None if all have one.

    Args:
        tokenizer: a Hugging Face tokenizer.
        ids: token ids of one text.
        rows: rows of the model's embeddings; None where they are not known.
    """
    index = int(max(ids, default=-1))
    if rows is None or index < rows:
        return None
    return (
        f"token id {index} ({tokenizer.convert_ids_to_tokens(index)!r}) has no row in the model: the tokenizer has "
        f"{max(tokenizer.get_vocab().values()) + 1} ids, the model's embeddings {rows} rows; name the tokenizer that "
        "belongs to the model, or give the model rows for all ids (`resize_token_embeddings`) and train them"
    )
