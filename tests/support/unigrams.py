"""Unigram tokenizers as SentencePiece trains them, in the forms in which they are published as tokenizer.json."""

import io
from functools import cache

import sentencepiece
import tiny
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import sentencepiece_model_pb2_new as model_pb2

#: name -> rule of the normaliser, bytes for characters without a piece, runs of spaces made one, pipeline
FORMS = {
    "as T5": ("nmt_nfkc", False, True, "metaspace"),
    "as XLM-R": ("nmt_nfkc", False, True, "words"),
    "no rule": ("identity", False, False, "metaspace"),
    "byte fallback": ("nmt_nfkc", True, True, "metaspace"),
    "byte fallback, no rule, no prefix": ("identity", True, False, "no prefix"),
    "NFKC, no prefix": ("nfkc", False, False, "no prefix"),
}


@cache
def unigram(form: str) -> PreTrainedTokenizerFast:
    """Train a Unigram tokenizer on the tiny texts and put it together as the form says."""
    rule, byte_fallback, one_space, pipeline = FORMS[form]
    spec = _trained(rule, byte_fallback, one_space)
    pieces = [(piece.piece, piece.score) for piece in spec.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=spec.trainer_spec.unk_id, byte_fallback=byte_fallback))
    parts = [normalizers.Precompiled(rules)] if (rules := spec.normalizer_spec.precompiled_charsmap) else []
    if one_space:
        parts += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    if parts:
        tokenizer.normalizer = normalizers.Sequence(parts)
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="never" if pipeline == "no prefix" else "always")
    words = [pre_tokenizers.WhitespaceSplit()] if pipeline == "words" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, metaspace])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _trained(rule: str, byte_fallback: bool, one_space: bool) -> model_pb2.ModelProto:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in tiny.TEXTS for line in text.split("\n")] * 20),
        model_writer=written,
        model_type="unigram",
        vocab_size=500,
        hard_vocab_limit=False,
        character_coverage=0.995,  # some characters of the texts get no piece
        normalization_rule_name=rule,
        byte_fallback=byte_fallback,
        remove_extra_whitespaces=one_space,
        minloglevel=2,
    )
    spec = model_pb2.ModelProto()
    spec.ParseFromString(written.getvalue())
    return spec
