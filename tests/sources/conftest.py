"""Tiny source models, texts and prompts."""

import pytest
import source_checks
import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A byte-level source with 256 positions."""
    return source_checks.checkpoint(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def models(model, tmp_path_factory):
    """Two sources with different tokenizers."""
    tokenizer = tiny.sentencepiece_bpe()
    folder = tmp_path_factory.mktemp("models") / "other"
    other = source_checks.checkpoint(folder, tokenizer=tokenizer, vocab_size=len(tokenizer), seed=1)
    return {"llama": model, "other": other}


@pytest.fixture(scope="session")
def padded_model(tmp_path_factory):
    """A SentencePiece source whose output matrix is 16 rows wider than its vocabulary."""
    tokenizer = tiny.sentencepiece_bpe()
    folder = tmp_path_factory.mktemp("models") / "padded"
    return source_checks.checkpoint(folder, tokenizer=tokenizer, vocab_size=len(tokenizer) + 16, seed=1)


@pytest.fixture
def texts(tmp_path):
    """Ten texts."""
    return source_checks.texts(tmp_path / "texts.jsonl")


@pytest.fixture
def prompts(tmp_path):
    """Six prompts in three domains."""
    return source_checks.prompts(tmp_path / "prompts.jsonl")
