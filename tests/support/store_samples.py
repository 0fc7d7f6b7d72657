"""Records, token tables and manifests for the tests of the store; numpy only, so that a child process starts fast."""

import numpy as np

from fusion_plugins.core.fusion.types import Record, TopK
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.store import Manifest

VOCABULARY = 300


def table(size: int = VOCABULARY) -> TokenTable:
    tokens = [b"<s>", b"</s>", *(b"t%d" % index for index in range(size - 2))]
    roles = [Role.BOS, Role.EOS] + [None] * (size - 2)
    return TokenTable(tokens, roles, {Role.BOS: 0, Role.EOS: 1}, False, "byte_level")


def manifest(top_k: int = 4, **changes: object) -> Manifest:
    fields: dict[str, object] = {
        "model": "tiny",
        "tokenizer_fingerprint": table().fingerprint,
        "vocab_size": VOCABULARY,
        "logits_width": VOCABULARY,
        "top_k": top_k,
        "dtype": "float32",
        "texts_fingerprint": "texts",
        "engine": "test",
        "engine_version": "1",
    }
    return Manifest.model_validate(fields | changes)


def record(number: int, top_k: int = 4, n_tokens: int | None = None, vocabulary: int = VOCABULARY) -> Record:
    """A record that depends on nothing but its number: full softmax rows, a blank row, a padded row."""
    rng = np.random.default_rng(number)
    n_tokens = int(rng.integers(3, 30)) if n_tokens is None else n_tokens
    logits = rng.normal(0, 3, (n_tokens, vocabulary))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    values = np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)
    if n_tokens > 2:
        ids[1], values[1] = -1, -np.inf
        ids[2, top_k // 2 :], values[2, top_k // 2 :] = -1, -np.inf
    input_ids = rng.integers(0, vocabulary, n_tokens).astype(np.int32)
    gold = np.full(n_tokens, np.nan, np.float32)
    gold[:-1] = np.take_along_axis(logprobs[:-1], input_ids[1:, None], axis=1)[:, 0]
    ends = np.cumsum(rng.integers(0, 6, n_tokens)).astype(np.int32)
    exact = rng.random(n_tokens) < 0.9
    spans = np.array([[0, ends[-1] if n_tokens else 0]], np.int32)
    return Record(
        id=f"text-{number:04d}",
        text=TokenizedText(input_ids, ends, spans, exact),
        topk=TopK(ids, values, gold),
        tail=np.clip(1 - np.exp(values.astype(np.float64)).sum(axis=1), 0, 1).astype(np.float32),
        ce_per_token=float(-np.nanmean(gold)) if n_tokens > 1 else float("nan"),
        ce_per_byte=0.25,
    )


def columns_of(record: Record) -> dict[str, object]:
    """The arrays and numbers of a record by name."""
    return {
        "id": record.id,
        "input_ids": record.text.input_ids,
        "ends": record.text.ends,
        "exact": record.text.exact,
        "spans": record.text.spans,
        "topk_ids": record.topk.ids,
        "topk_logprobs": record.topk.logprobs,
        "token_logprobs": record.topk.token_logprobs,
        "tail": record.tail,
        "ce_per_token": record.ce_per_token,
        "ce_per_byte": record.ce_per_byte,
    }


def changed(record: Record, **columns: object) -> Record:
    """A record with other arrays or numbers, by the names of `columns_of`."""
    c = columns_of(record) | columns
    text = TokenizedText(c["input_ids"], c["ends"], c["spans"], c["exact"])
    topk = TopK(c["topk_ids"], c["topk_logprobs"], c["token_logprobs"])
    return Record(c["id"], text, topk, c["tail"], c["ce_per_token"], c["ce_per_byte"])
