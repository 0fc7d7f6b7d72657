"""The models of the world: sources of other architectures than the target, and other tokenizers."""

from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from fusion_lab.vocabularies import DIGITS, GPT2, WORDS, TokenizerSpec, chat_template

__all__ = ["KINDS", "SPECS", "make_model", "split_digits"]

#: Longest sequence in tokens.
POSITIONS = 256

#: model -> how its tokenizer is trained. Numbers are one token for `numbers` and `target`, digits for `digits`.
SPECS = {
    "target": TokenizerSpec(
        "byte_level",
        1024,
        GPT2,
        "<|begin|>",
        "<|end|>",
        chat_template("<|user|>", "<|assistant|>", "<|end|>", "<|end|>"),
        ("<|user|>", "<|assistant|>"),
    ),
    "numbers": TokenizerSpec(
        "sentencepiece", 1536, WORDS, "<s>", "</s>", chat_template("<q>", "", "</q>", "</s>"), ("<q>", "</q>")
    ),
    "digits": TokenizerSpec(
        "byte_level",
        800,
        DIGITS,
        "<|endoftext|>",
        "<|im_end|>",
        chat_template("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n", "<|im_end|>\n"),
        ("<|im_start|>",),
    ),
    "docs": TokenizerSpec(
        "byte_level", 2048, GPT2, "<bos>", "<eos>", chat_template("### User:\n", "### Assistant:\n", "\n", "<eos>\n")
    ),
}

#: model -> configuration class, and the factor of the width that its feed-forward layers have
KINDS: dict[str, tuple[type, float, dict[str, Any]]] = {
    "target": (LlamaConfig, 2.5, {}),
    "numbers": (MistralConfig, 3, {"num_key_value_heads": 2, "sliding_window": None}),
    "digits": (Qwen2Config, 3, {"num_key_value_heads": 4}),
    "docs": (GPTNeoXConfig, 4, {}),
}


def make_model(kind: str, tokenizer: PreTrainedTokenizerBase, *, width: int, layers: int) -> PreTrainedModel:
    """Build an untrained model (float32, tied embeddings, 4 heads) for its tokenizer; a twin is built as the target."""
    config_class, factor, more = KINDS.get(kind, KINDS["target"])
    config = config_class(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=width,
        intermediate_size=int(width * factor),
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        **more,
    )
    return AutoModelForCausalLM.from_config(config)


def split_digits(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Make a byte-level tokenizer give every digit a token of its own; the vocabulary stays."""
    parts = [
        pre_tokenizers.Split(Regex(DIGITS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return tokenizer
