"""A tokenizer that loses text is refused, whatever loses it; known changes are named."""

import pytest
import tiny
from tokenizer_cases import table_of
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusion_plugins.core.text.round_trip import PROBES, require_text, text_changes
from fusion_plugins.errors import TokenizerError

EMOJI = Regex("[\U0001f300-\U0001faff\u2700-\u27bf]")


def changed(tokenizer, **parts):
    """A copy of a tokenizer with other parts; a normaliser is put before the tokenizer's own."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    for name, part in parts.items():
        own = getattr(backend, name)
        setattr(backend, name, normalizers.Sequence([part, own]) if name == "normalizer" and own else part)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=tokenizer.eos_token, unk_token=tokenizer.unk_token
    )


NORMALISERS = {
    "spaces": normalizers.Replace(" ", ""),
    "runs of spaces": normalizers.Replace(Regex(" {2,}"), " "),
    "spaces at the ends": normalizers.Strip(),
    "newlines": normalizers.Replace("\n", ""),
    "newlines at the start": normalizers.Replace(Regex("^\n+"), ""),
    "Windows line ends": normalizers.Replace("\r", ""),
    "tabs": normalizers.Replace("\t", " "),
    "digits": normalizers.Sequence(
        [normalizers.Replace("1", "#"), normalizers.Replace("2", "1"), normalizers.Replace("#", "2")]
    ),
    "capital letters": normalizers.Lowercase(),
    "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "punctuation": normalizers.Replace(Regex("[(){}]"), ""),
    "signs": normalizers.Replace("`", "'"),
    "emoji": normalizers.Replace(EMOJI, ""),
    "emoji with joiners": normalizers.Replace("\u200d", ""),
    "Arabic": normalizers.Replace(Regex("[\u0600-\u06ff]"), ""),
    "Chinese": normalizers.Replace(Regex("\\p{Han}"), "\ufffd"),
    "rare characters": normalizers.Replace(Regex("[\U00010000-\U0001ffff]"), "?"),
}


@pytest.mark.parametrize("make", [tiny.byte_level, tiny.sentencepiece_bpe])
@pytest.mark.parametrize("kind", NORMALISERS)
def test_text_that_a_normaliser_loses_is_named(make, kind):
    tokenizer = changed(make(), normalizer=NORMALISERS[kind])
    table = table_of(tokenizer, check=False)
    assert kind in text_changes(tokenizer, table.spell).lost
    with pytest.raises(TokenizerError, match="loses or changes .* becomes .*normalizer in its tokenizer.json") as error:
        table_of(tokenizer)
    assert "\n" not in str(error.value)
    with pytest.raises(TokenizerError, match="loses or changes"):
        require_text(tokenizer)


def metaspace_over_bytes(**model):
    """What a class for SentencePiece makes of a byte-level vocabulary."""
    tokenizer = changed(
        tiny.byte_level(),
        pre_tokenizer=pre_tokenizers.Metaspace(split=False),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    )
    for name, value in model.items():
        setattr(tokenizer.backend_tokenizer.model, name, value)
    return tokenizer


def test_a_class_that_does_not_fit_its_tokens_is_refused_with_the_cure():
    with pytest.raises(TokenizerError, match=r"loses or changes spaces, .*'thequickbrownfox'.*PreTrainedTokenizerFast"):
        table_of(metaspace_over_bytes())


def test_unknown_tokens_in_the_place_of_spaces_are_a_loss():
    tokenizer = metaspace_over_bytes(unk_token="<|im_start|>")
    tokenizer.unk_token = "<|im_start|>"
    assert tokenizer.unk_token_id in tokenizer("the fox")["input_ids"]
    with pytest.raises(TokenizerError, match="loses or changes spaces"):
        table_of(tokenizer)


def test_bytes_without_their_pre_tokenizer_are_refused():
    tokenizer = changed(tiny.byte_level(), pre_tokenizer=pre_tokenizers.Whitespace())
    with pytest.raises(TokenizerError, match="PreTrainedTokenizerFast"):
        table_of(tokenizer)


def test_a_decoder_that_does_not_give_the_text_back_is_refused():
    backwards = changed(
        tiny.byte_level(), decoder=decoders.Sequence([decoders.ByteLevel(), decoders.Replace("2", "3")])
    )
    with pytest.raises(TokenizerError, match=r"digits.*'0123456789 42 2026 3.14' becomes '0133456789 43 3036 3.14'"):
        table_of(backwards)


@pytest.mark.parametrize("make", [tiny.byte_level, tiny.digit_splitting, tiny.sentencepiece_bpe, tiny.mistral_v1])
def test_tokenizers_that_keep_the_text_are_accepted(make):
    found = text_changes(make(), table_of(make()).spell)
    assert found.lost == {}
    assert found.known == (("a space before the text",) if make in (tiny.sentencepiece_bpe, tiny.mistral_v1) else ())
    require_text(make())


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_unicode_forms_are_known_changes(form):
    tokenizer = changed(tiny.byte_level(), normalizer=getattr(normalizers, form)())
    # The name is that of the smallest change that explains a text.
    expected = {"NFC": ("NFC",), "NFD": ("NFD",), "NFKC": ("NFC", "NFKC"), "NFKD": ("NFD", "NFKC")}
    assert text_changes(tokenizer, table_of(tokenizer).spell).known == expected[form]


def test_the_white_space_of_unigram_tokenizers_and_unknown_characters_are_known_changes():
    tokenizer = tiny.unigram()
    *changes, unknown = text_changes(tokenizer, table_of(tokenizer).spell).known
    assert "one space for every run of white space, none at the ends" in changes
    assert unknown.startswith("no token for some of: digits, ")
    for lost in (normalizers.Replace("\n", ""), normalizers.Lowercase(), normalizers.Replace(EMOJI, "")):
        with pytest.raises(TokenizerError, match="loses or changes"):
            table_of(changed(tokenizer, normalizer=lost))


def test_every_probe_is_short_and_of_its_own_kind():
    assert len(set(PROBES.values())) == len(PROBES)
    assert max(map(len, PROBES.values())) < 64
    assert "▁" not in "".join(PROBES.values())  # a mark that SentencePiece reads as a space


def test_a_slow_tokenizer_is_judged_by_what_it_decodes():
    class Slow:
        unk_token_id = None
        name_or_path = "org/slow"

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(character) for character in text]}

        def decode(self, ids, **options):
            return "".join(map(chr, ids))

    assert require_text(Slow()) == ()

    class Deaf(Slow):
        def decode(self, ids, **options):
            return super().decode(ids).replace("\t", "")

    with pytest.raises(TokenizerError, match="Deaf of 'org/slow' loses or changes tabs, indentation"):
        require_text(Deaf())


def test_a_tokenizer_that_cuts_at_random_is_refused():
    """BPE dropout gives other tokens every time, and a store would hold one of them."""
    tokenizer = tiny.byte_level()
    tokenizer.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(TokenizerError, match=r"cuts it at random \(dropout 0.1 in the model"):
        require_text(tokenizer)
    tokenizer.backend_tokenizer.model.dropout = 0.0
    assert require_text(tokenizer) == ()
