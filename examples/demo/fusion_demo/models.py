"""The four models: other architectures and sizes for the sources than for the target."""

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

__all__ = ["MODELS", "make_model", "untrained"]

#: Longest sequence in tokens.
POSITIONS = 1024

#: model -> configuration class and sizes; the vocabulary and the special tokens come from its tokenizer.
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "target": (
        LlamaConfig,
        {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    ),
    "code": (
        MistralConfig,
        {
            "hidden_size": 192,
            "intermediate_size": 576,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "sliding_window": None,
        },
    ),
    "maths": (
        Qwen2Config,
        {
            "hidden_size": 192,
            "intermediate_size": 640,
            "num_hidden_layers": 5,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
        },
    ),
    "prose": (
        GPTNeoXConfig,
        {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4},
    ),
}


def make_model(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build the untrained model ``name`` (float32, tied embeddings) for its tokenizer."""
    config_class, sizes = MODELS[name]
    return untrained(config_class, tokenizer, max_position_embeddings=POSITIONS, **sizes)


def untrained(config_class: type, tokenizer: PreTrainedTokenizerBase, **sizes: Any) -> PreTrainedModel:
    """Build a model of random weights (float32, tied embeddings) for a tokenizer."""
    config = config_class(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    return AutoModelForCausalLM.from_config(config)
