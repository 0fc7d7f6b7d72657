"""What the plan of a run needs to know about a model: read from its config and tokenizer, never from its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from fusion_plugins.config import Settings
from fusion_plugins.core.text.round_trip import require_text
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.errors import ConfigError, SourceError, TokenizerError
from fusion_plugins.sources.backends.base import SourceSettings
from fusion_plugins.sources.loading import load_config, load_tokenizer

#: where configs write the longest sequence
_WINDOWS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
#: tokens that are padded with where the tokenizer names none, the best first; none of them ends a turn
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|endoftext|>", "<unk>")


class ModelFacts(Settings):
    """What is known about a model; each of them can be said by hand, for a model that is not at hand."""

    window: int | None = Field(None, ge=2, description="longest sequence in tokens; null: no limit")
    parameters: float = Field(gt=0, description="number of parameters, such as 6.7e9")
    model_type: str = Field(description="as in config.json: llama, qwen2, gemma2, ...")
    vocab_size: int = Field(32_000, ge=1, description="rows of the embedding")
    pad_token: str | None = Field(None, description="a token to pad with; only a target needs one")
    names_pad: bool = Field(True, description="whether the tokenizer itself names that token as its pad token")
    chat_template: bool = Field(True, description="whether the tokenizer has a chat template")
    reasons: bool = Field(False, description="whether the chat template knows reasoning")
    thinking_switch: bool = Field(False, description="whether its argument enable_thinking turns reasoning off")


@dataclass(frozen=True)
class Model:
    """One model of the run.

    Attributes:
        name: hub name or folder, as it is written into the files.
        short: its name in stores, files and reports.
        facts: sizes and tokens.
        tokenizer: the Hugging Face tokenizer; None where the facts were given by hand, or where it is unusable.
        table: the bytes of its tokens; None likewise.
        problem: why the tokenizer cannot be used; None where it can.
    """

    name: str
    short: str
    facts: ModelFacts
    tokenizer: Any = field(default=None, compare=False)
    table: TokenTable | None = field(default=None, compare=False)
    problem: str | None = None


def read_model(name: str, short: str, given: Mapping[str, Any] | None = None, template: str | None = None) -> Model:
    """Read the config and the tokenizer of a model.

    Args:
        name: folder, or name on the hub.
        short: name for files.
        given: facts said by hand; then nothing is read.
        template: file with a chat template that takes the place of the model's.

    Raises:
        ConfigError: the model cannot be read, or the file of the template; the message shows how to say facts by hand.
    """
    if given is not None:
        return Model(name, short, ModelFacts(**given))
    settings = SourceSettings.model_validate({"model": name, "chat_template": template})
    try:
        config = load_config(settings)
        tokenizer, problem = _tokenizer(settings)
    except SourceError as error:
        # The target is read in the same way: what calls it a source would mislead.
        what = str(error).removeprefix(f"source {settings.source_name!r}: ")
        raise ConfigError(
            f"{what} Name a folder, or say what the model is by hand: --facts "
            f"'{name}={{window: 4096, parameters: 7.0e9, model_type: llama, pad_token: <unk>}}'"
        ) from error
    table = None
    if tokenizer is not None:
        try:
            table = TokenTable.from_tokenizer(tokenizer)
            require_text(tokenizer, table.spell)
        except TokenizerError as error:
            problem = str(error)
    facts = {
        "window": _window(config),
        "parameters": count_parameters(config),
        "model_type": str(config.model_type),
        "vocab_size": int(config.vocab_size),
        **(_token_facts(tokenizer) if tokenizer is not None else {}),
    }
    return Model(name, short, ModelFacts(**facts), tokenizer, table, problem)


def _tokenizer(settings: SourceSettings) -> tuple[Any, str | None]:
    try:
        return load_tokenizer(settings), None
    except TokenizerError as error:
        return None, str(error)


def _window(config: Any) -> int | None:
    found = (getattr(config, name, None) for name in _WINDOWS)
    return next((value for value in found if isinstance(value, int) and value > 1), None)


def _token_facts(tokenizer: Any) -> dict[str, Any]:
    template = tokenizer.chat_template
    # Some tokenizers have several templates under names.
    text = "\n".join(template.values()) if isinstance(template, dict) else str(template or "")
    named = tokenizer.pad_token
    # Who pads with the token that ends a turn never learns to end one: its labels are masked as padding.
    vocabulary = tokenizer.get_vocab()
    others = (token for token in _PAD_TOKENS if token in vocabulary and token != tokenizer.eos_token)
    pad = named if named is not None and named != tokenizer.eos_token else next(others, named)
    return {
        "pad_token": pad,
        "names_pad": pad == named,
        "chat_template": bool(template),
        "reasons": "<think>" in text or "reasoning_content" in text,
        "thinking_switch": "enable_thinking" in text,
    }


def count_parameters(config: Any) -> float:
    """Return the number of parameters of a config's causal model, of which no memory is taken.

    Where transformers has no such model, it is that of a decoder with the config's sizes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return float(sum(parameter.numel() for parameter in model.parameters()))
    except Exception:  # models of other packages, and of code that comes with them, fail in many ways
        hidden = int(getattr(config, "hidden_size", 0) or 1)
        layers = int(getattr(config, "num_hidden_layers", 0) or 1)
        return float(12 * layers * hidden**2 + config.vocab_size * hidden)
