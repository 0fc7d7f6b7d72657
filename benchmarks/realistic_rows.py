"""Distributions with the statistics of a language model's, for benchmarks: real text, no download, a minute.

A byte-level BPE of 32,000 tokens is trained on the Python standard library and the documents of installed packages. The
model interpolates n-grams (absolute discounting) and mixes in a decaying cache of the document, so that rows are sharp
where the context is known, flat where it is not, and differ between any two positions. Rows are of held-out files.
"""

import random
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from records import record_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fusion_plugins.core.fusion.types import Record
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText

VOCABULARY = 32_000
RECORD_TOKENS = 500
CACHE_DECAY = 0.98
WEIGHTS = (0.75, 0.2, 0.05)  # n-grams, cache, unigram
ORDER = 3  # tokens of context


def read_texts(megabytes: float, seed: int = 0) -> list[str]:
    """Return texts of installed packages, shuffled, up to a size."""
    paths = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    patterns = ("*.py", "*.md", "*.rst", "METADATA")
    files = sorted({file for path in paths for pattern in patterns for file in path.glob(f"*/{pattern}")})
    random.Random(seed).shuffle(files)
    texts, size = [], 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")[:20_000]
        if len(text) > 1000:
            texts.append(text)
            size += len(text)
        if size > megabytes * 1e6:
            break
    return texts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train the byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


class Ngram:
    """Interpolated n-grams with absolute discounting, and a decaying cache of what the document had."""

    def __init__(self, documents: list[list[int]], size: int) -> None:
        counts = np.full(size, 0.1)
        followers: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for ids in documents:
            np.add.at(counts, ids, 1)
            for place in range(1, len(ids)):
                for order in range(1, min(place, ORDER) + 1):
                    followers[tuple(ids[place - order : place])][ids[place]] += 1
        self.unigram = counts / counts.sum()
        self.followers = {
            context: (np.fromiter(counter, np.int64), np.fromiter(counter.values(), np.float64))
            for context, counter in followers.items()
        }

    def logprobs(self, ids: list[int]) -> Iterator[np.ndarray]:
        """Yield the distribution (V,) after each token."""
        cache = np.zeros_like(self.unigram)
        for place, token in enumerate(ids):
            cache *= CACHE_DECAY
            cache[token] += 1 - CACHE_DECAY
            ngram = self.unigram.copy()
            for order in range(1, min(place + 1, ORDER) + 1):
                found = self.followers.get(tuple(ids[place + 1 - order : place + 1]))
                if found is not None:
                    tokens, counts = found
                    ngram *= 0.75 * len(tokens) / counts.sum()
                    ngram[tokens] += (counts - 0.75) / counts.sum()
            mixed = WEIGHTS[0] * ngram + WEIGHTS[1] * cache + WEIGHTS[2] * self.unigram
            yield np.log(mixed / mixed.sum())


def make_records(n_tokens: int, top_k: int, megabytes: float = 12) -> tuple[list[Record], TokenTable]:
    """Return records of together about ``n_tokens`` tokens with their ``top_k`` entries, and their token table."""
    texts = read_texts(megabytes)
    tokenizer = train_tokenizer(texts)
    n_held = max(1, len(texts) // 10)
    model = Ngram([tokenizer.encode(text).ids for text in texts[n_held:]], tokenizer.get_vocab_size())
    records: list[Record] = []
    left = n_tokens
    for number, text in enumerate(texts[:n_held]):
        encoding = tokenizer.encode(text)
        for first in range(0, len(encoding.ids), RECORD_TOKENS):
            ids = encoding.ids[first : first + RECORD_TOKENS]
            if left <= 0 or len(ids) < 20:
                break
            records.append(_record(f"{number}-{first}", ids, tokenizer, model, top_k))
            left -= len(ids)
    tokens = [tokenizer.decode([index]).encode() for index in range(tokenizer.get_vocab_size())]
    return records, TokenTable(tokens, [None] * len(tokens), {}, False, "byte_level")


def _record(id: str, ids: list[int], tokenizer: Tokenizer, model: Ngram, top_k: int) -> Record:
    top = np.empty((len(ids), top_k), np.int32)
    values = np.empty((len(ids), top_k), np.float32)
    gold = np.full(len(ids), np.nan, np.float32)
    for row, logprobs in enumerate(model.logprobs(ids)):
        best = np.argpartition(-logprobs, top_k)[:top_k]
        best = best[np.lexsort((best, -logprobs[best]))]
        top[row], values[row] = best, logprobs[best]
        if row + 1 < len(ids):
            gold[row] = logprobs[ids[row + 1]]
    widths = [len(tokenizer.id_to_token(token)) for token in ids]
    ends = np.cumsum(widths).astype(np.int32)
    spans = np.array([[0, ends[-1]]], np.int32)
    text = TokenizedText(np.array(ids, np.int32), ends, spans, np.ones(len(ids), np.bool_))
    return record_of(id, text, top, values, gold)
