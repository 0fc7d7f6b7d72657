"""Lists of printed tokens: their mark for spaces and their bytes."""

import pytest

from fusion_plugins.core.text.surfaces import common_bytes, space_marker
from fusion_plugins.errors import AlignmentError


@pytest.mark.parametrize(("tokens", "marker"), [
    (["▁a", "b"], "▁"),
    (["a", "Ġb"], "Ġ"),
    (["▁a", "Ġb", "Ġc"], "Ġ"),
    (["▁a", "Ġb"], "▁"),
    (["a", " b", "c▁"], ""),
    (["▁a".encode()], ""),
    ([], ""),
])  # fmt: skip
def test_the_mark_for_spaces_is_the_one_that_more_tokens_begin_with(tokens, marker):
    assert space_marker(tokens) == marker


@pytest.mark.parametrize(("source", "target", "expected"), [
    # byte-level, SentencePiece, plain text and bytes of one text
    (["Ġfox", "Ġjumps"], ["▁fo", "x", "▁j", "umps"], ([b" fox", b" jumps"], [b" fo", b"x", b" j", b"umps"])),
    (["Ġfox"], [b" fo", b"x"], ([b" fox"], [b" fo", b"x"])),
    ([" fox"], ["▁fox"], ([b" fox"], [b" fox"])),
    # a dummy prefix on one side, also behind an empty token
    (["fox", "Ġjumps"], ["▁fo", "x", "▁jumps"], ([b"fox", b" jumps"], [b"fo", b"x", b" jumps"])),
    (["", "▁a"], ["a"], ([b"", b"a"], [b"a"])),
    (["ä½", "ł"], ["▁", "<0xE4>", "<0xBD>", "<0xA0>"], ([b"\xe4\xbd", b"\xa0"], [b"", b"\xe4", b"\xbd", b"\xa0"])),
    # marks that are part of the text
    (["a▁", "<0x0A>"], ["a", "▁<0x0A>"], (["a▁".encode(), b"<0x0A>"], [b"a", "▁<0x0A>".encode()])),
    # a special token that no byte alphabet spells
    (["Ġa", "<漢>"], ["▁a", "<漢>"], ([b" a", "<漢>".encode()], [b" a", "<漢>".encode()])),
    ([], [], ([], [])),
])  # fmt: skip
def test_both_lists_are_read_as_one_text(source, target, expected):
    assert common_bytes(source, target) == expected
    assert common_bytes(target, source) == expected[::-1]


def test_lists_of_different_texts_are_refused_with_the_place():
    with pytest.raises(AlignmentError, match=r"at byte 3 the source continues b'abcd' and the target b'abce'"):
        common_bytes([b"ab", b"cd"], [b"abc", b"e"])
    with pytest.raises(AlignmentError, match=r"at byte 2 the source .* b' ab' .* b' ac' \(lengths 3 and 3 bytes"):
        common_bytes(["Ġab"], ["▁ac"])
    with pytest.raises(AlignmentError, match=r"at byte 1 .*lengths 1 and 2 bytes.*method='dtw'"):
        common_bytes(["a"], ["ab"])
