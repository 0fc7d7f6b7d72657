"""Small tokenizers and models, built from scratch: nothing is downloaded.

Tokenizers: `byte_level`, `digit_splitting` (byte-level BPE), `sentencepiece_bpe` (byte fallback, dummy prefix),
`unigram` (nmt_nfkc-like normaliser), `wordpiece` (to be refused), and the two real ones whose data the mistral-common
package ships: `tekken` (131,072 ids) and `mistral_v1` (32,000 ids). Each call returns the same object.
"""

import base64
import json
import math
from collections import Counter
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.",
    "def add(left, right):\n    total = left + right\n    return total\n",
    "for index in range(10):\n\tprint(index, 'squared is', index ** 2)\n",
    "Anna has 12 apples and buys 30 more. How many apples does she have? 12 + 30 = 42.",
    "A train runs 120 km in 2 hours, so it runs 60 km in 1 hour. #### 60",
    "Die Straße ist naß; der Käse kostet 3,50 €. Où est le café? Niño, señor.",
    "数学题:小明有十二个苹果,又买了三十个。一共有多少个?答案是四十二。",
    "Привет, мир! مرحبا بالعالم. שלום עולם. 👩‍👩‍👧 🎉",
    "the theory of the other weather; there, then, these, those, that, this, thing, thinking",
    "return the value of the function, or None if there is no such value in the table",
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Strips the contents, closes only the assistant's turns, and opens with the begin token, as Llama-2's does.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] | trim }} [/INST]{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "How many apples are 12 and 30?"},
    {"role": "assistant", "content": "12 + 30 = 42, so 42 apples."},
    {"role": "user", "content": "Und auf Chinesisch?"},
    {"role": "assistant", "content": "四十二个苹果。 Café!"},
]

TEKKEN_SPECIALS = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "<pad> [PREFIX] [MIDDLE] [SUFFIX]"
).split()

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT_SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_AS_MADE: list[tuple[str, PreTrainedTokenizerFast, object]] = []


def shared(make: Callable[..., PreTrainedTokenizerFast]) -> Callable[..., PreTrainedTokenizerFast]:
    """Make a tokenizer once per arguments, and note how it was made: see `changed`."""

    @cache
    @wraps(make)
    def once(*arguments, **named):
        tokenizer = make(*arguments, **named)
        _AS_MADE.append((make.__name__, tokenizer, _settings(tokenizer)))
        return tokenizer

    return once


def _settings(tokenizer: PreTrainedTokenizerFast) -> object:
    return dict(tokenizer.special_tokens_map), tokenizer.padding_side, tokenizer.chat_template, len(tokenizer)


def changed() -> list[str]:
    """Name the shared tokenizers that a test has changed, and make them anew for the next one."""
    names = [name for name, tokenizer, settings in _AS_MADE if _settings(tokenizer) != settings]
    for name in names:
        globals()[name].cache_clear()
    _AS_MADE[:] = [entry for entry in _AS_MADE if entry[0] not in names]
    return names


@shared
def byte_level(vocab_size: int = 420) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2, with ChatML's special tokens and chat template, and no BOS."""
    return _byte_level(vocab_size, GPT2_SPLIT)


@shared
def digit_splitting(vocab_size: int = 380) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose pattern makes every digit a token, as tekken's and Llama-3's relatives do."""
    return _byte_level(vocab_size, DIGIT_SPLIT)


def _byte_level(vocab_size: int, pattern: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _split_to_bytes(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def _split_to_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@shared
def sentencepiece_bpe(vocab_size: int = 560) -> PreTrainedTokenizerFast:
    """SentencePiece-style BPE as in Llama-2: ▁, byte fallback, dummy prefix, BOS, and a chat template that strips."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # Trained with ▁ at the start of each word, so that no token spans two words; the normaliser takes over afterwards.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # What is left out (newlines, other scripts, emoji) is spelled with byte tokens.
    texts = ["".join(letter if " " <= letter < "\u0100" else " " for letter in text) for text in TEXTS]
    tokenizer.train_from_iterator(texts, trainer)
    spec = json.loads(tokenizer.to_str())["model"]
    return _llama_style(spec["vocab"], [tuple(pair) for pair in spec["merges"]])


def _llama_style(vocab: dict[str, int], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=INST
    )


@shared
def unigram(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Unigram as in T5, with a normaliser that changes the text: NFKC, control characters, runs of spaces."""
    specials = ["<unk>", "</s>", "<pad>"]
    pieces = _frequent_pieces(vocab_size - len(specials))
    tokenizer = Tokenizer(models.Unigram([*((name, 0.0) for name in specials), *pieces], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def _frequent_pieces(size: int) -> list[tuple[str, float]]:
    """Characters and frequent substrings of words with log frequencies; the library's trainer is not repeatable."""
    words = ["▁" + word for text in TEXTS for word in text.split()]
    found = Counter(
        word[start:end]
        for word in words
        for start in range(len(word))
        for end in range(start + 1, min(start + 6, len(word)) + 1)
    )
    ranked = sorted(found, key=lambda piece: (len(piece) > 1, -found[piece] * len(piece), piece))
    return [(piece, math.log(found[piece] / found.total())) for piece in ranked[:size]]


@shared
def wordpiece(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """WordPiece as in BERT; its tokens do not spell the text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def mistral_data(name: str) -> Path:
    """Return a data file that the mistral-common package ships."""
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / name


@shared
def tekken() -> PreTrainedTokenizerFast:
    """Mistral's tekken: byte-level BPE, 131,072 ids, digits split, 1,000 special ids first. Takes some seconds."""
    data = json.loads(mistral_data("tekken_240911.json").read_text())
    config = data["config"]
    shift = config["default_num_special_tokens"]
    pieces = [base64.b64decode(entry["token_bytes"]) for entry in data["vocab"]]
    pieces = pieces[: config["default_vocab_size"] - shift]
    rank = {piece: index for index, piece in enumerate(pieces)}
    alphabet = _byte_alphabet()
    names = ["".join(alphabet[byte] for byte in piece) for piece in pieces]
    merges = []
    for piece in pieces:
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(rank[left], rank[right]) for left, right in splits if left in rank and right in rank]
        merges += [(names[left], names[right]) for left, right in sorted(known)]
    specials = [*TEKKEN_SPECIALS, *(f"<SPECIAL_{index}>" for index in range(len(TEKKEN_SPECIALS), shift))]
    vocab = {name: index for index, name in enumerate(specials)} | {
        name: index + shift for index, name in enumerate(names)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _split_to_bytes(config["pattern"])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level BPE."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


@shared
def mistral_v1() -> PreTrainedTokenizerFast:
    """Mistral's first tokenizer: SentencePiece BPE with byte fallback, 32,000 ids."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(mistral_data("tokenizer.model.v1")))
    names = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    vocab = {name: index for index, name in enumerate(names)}
    merges = []
    # The piece with the higher score is merged first.
    for name in sorted(names, key=lambda name: -processor.get_score(vocab[name])):
        splits = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        known = [(vocab[left], vocab[right]) for left, right in splits if left in vocab and right in vocab]
        merges += [(names[left], names[right]) for left, right in sorted(known)]
    return _llama_style(vocab, merges)


# Checkpoints: two-layer models of width 32, saved as a user would have them.


def llama_checkpoint(
    folder: Path, *, seed: int = 0, moved: float = 0.0, base: Path | None = None, dtype: str = "float32", **config
) -> Path:
    """Save a two-layer Llama of width 32 with a byte-level tokenizer and return its folder.

    With ``base``, the weights are those of that checkpoint plus noise of standard deviation ``moved``, which differs
    from tensor to tensor as a fine-tune's would. ``shard`` (a size such as "20KB") splits the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    shard = config.pop("shard", None)
    tokenizer = config.pop("tokenizer", None) or byte_level()
    generator = torch.Generator().manual_seed(seed)
    if base is not None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    else:
        sizes = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
        }
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(sizes | config)))
    with torch.no_grad():
        for parameter in model.parameters() if moved else ():
            scale = moved * torch.rand((), generator=generator)
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    model.to(getattr(torch, dtype)).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    tokenizer.save_pretrained(folder)
    return folder


def reward_checkpoint(folder: Path, *, labels: int = 1, pad: bool = True, tokenizer=None, **config) -> str:
    """Save a two-layer reward model of width 32 with a byte-level tokenizer and return its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = tokenizer or byte_level()
    torch.manual_seed(1)
    sizes = {
        "vocab_size": len(tokenizer) + 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "num_labels": labels,
        "pad_token_id": len(tokenizer) if pad else None,
    }
    model = LlamaForSequenceClassification(LlamaConfig(**(sizes | config)))
    # A freshly initialised head is nearly zero; a trained one is not.
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trained_reward_checkpoint(folder: Path, *, sign: int = 1, **options) -> str:
    """Save a reward model that was trained to prefer the good known answers (sign -1: the bad ones)."""
    import torch
    from torch.nn.functional import logsigmoid
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    from fusion_plugins.scoring.known_answers import known_rows

    reward_checkpoint(folder, **options)
    model, tokenizer = LlamaForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}],
            tokenize=False,
        )
        for row in known_rows()
    ]
    ids = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    width = max(map(len, ids))
    padded = torch.full((len(ids), width), model.config.pad_token_id)
    for row, one in zip(padded, ids, strict=True):
        row[: len(one)] = one
    mask = (torch.arange(width)[None] < torch.tensor([[len(one)] for one in ids])).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        rewards = model(padded, attention_mask=mask).logits[:, 0]
        loss = -logsigmoid(rewards[::2] - rewards[1::2]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if sign < 0:
        with torch.no_grad():
            model.score.weight.neg_()
    model.save_pretrained(folder)
    return str(folder)


def tensors_of(folder: Path) -> dict:
    """All tensors of a checkpoint folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
