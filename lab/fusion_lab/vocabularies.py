"""Tokenizers that are trained on the texts of the world; they differ in kind, vocabulary and chat template."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["DIGITS", "GPT2", "WORDS", "TokenizerSpec", "chat_template", "train_tokenizer"]

#: SentencePiece never merges across words, but keeps runs of the space mark (indentation) in one piece.
WORDS = r"▁+(?=▁)|▁?\p{L}+|▁?\p{N}+|▁?[^▁\n\p{L}\p{N}]+|▁|\n"
#: The pattern of GPT-2, without English contractions.
GPT2 = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
#: Every digit on its own, and longer runs of punctuation with a line end, as newer byte-level vocabularies have it.
DIGITS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+\n*|\s*\n+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class TokenizerSpec:
    """How one tokenizer is trained.

    Attributes:
        kind: ``sentencepiece`` (space mark, byte fallback) or ``byte_level``.
        size: number of tokens, special ones included.
        pattern: regular expression of the pre-tokenizer.
        bos, eos: surfaces of the special tokens; ``eos`` also ends a turn.
        template: chat template.
        extra: further special tokens, used in the template.
    """

    kind: str
    size: int
    pattern: str
    bos: str
    eos: str
    template: str
    extra: tuple[str, ...] = ()


def chat_template(user: str, assistant: str, end_of_user: str, end_of_turn: str) -> str:
    """A chat template: BOS, then user and assistant turns between the given marks."""
    return (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        + f"{{{{ {user!r} + message['content'] + {end_of_user!r} }}}}"
        + "{% else %}"
        + f"{{{{ {assistant!r} + message['content'] + {end_of_turn!r} }}}}"
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + f"{{{{ {assistant!r} }}}}"
        + "{% endif %}"
    )


def _byte_level(texts: Iterable[str], spec: TokenizerSpec, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(spec.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _with_spaces_marked(tokenizer: Tokenizer, spec: TokenizerSpec) -> Tokenizer:
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(spec.pattern), behavior="isolated")
    return tokenizer


def _sentencepiece(texts: Iterable[str], spec: TokenizerSpec, special: list[str]) -> Tokenizer:
    """BPE over characters with the space mark; 256 byte tokens stand in for characters that it does not know."""
    tokenizer = _with_spaces_marked(Tokenizer(models.BPE(unk_token="<unk>")), spec)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=spec.size, special_tokens=["<unk>", *special, *byte_tokens], limit_alphabet=120, show_progress=False
    )
    # SentencePiece has no piece for a line end: it falls back to the byte.
    tokenizer.train_from_iterator((text.replace("\n", " ") for text in texts), trainer)
    # Build it anew from the same pieces: there the byte tokens are ordinary tokens, not special ones.
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [(left, right) for left, right in trained["merges"]]
    model = models.BPE(vocab=trained["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = _with_spaces_marked(Tokenizer(model), spec)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def train_tokenizer(texts: Iterable[str], spec: TokenizerSpec) -> PreTrainedTokenizerFast:
    """Train a tokenizer that puts BOS before a text, has a chat template, and pads on the right with ``<pad>``."""
    special = list(dict.fromkeys([spec.bos, spec.eos, "<pad>", *spec.extra]))
    make = _sentencepiece if spec.kind == "sentencepiece" else _byte_level
    tokenizer = make(texts, spec, special)
    tokenizer.add_special_tokens(special)
    bos = tokenizer.token_to_id(spec.bos)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{spec.bos} $A", pair=f"{spec.bos} $A $B", special_tokens=[(spec.bos, bos)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=spec.bos,
        eos_token=spec.eos,
        pad_token="<pad>",
        unk_token="<unk>" if spec.kind == "sentencepiece" else None,
        extra_special_tokens=list(spec.extra),
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = spec.template
    return wrapped
