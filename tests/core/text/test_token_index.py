"""Strings looked up among tokens, against dictionaries."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusion_plugins.core.text.token_bytes import TokenBytes
from fusion_plugins.core.text.token_index import Strings, TokenIndex

# Few different bytes, so that tokens repeat and begin with each other; 0 and 255 are bytes like any other.
STRINGS = st.lists(st.text("ab\0", max_size=6).map(str.encode) | st.sampled_from([b"\xff", b"\xffa", b"aaaaaaaa"]))


def strings_of(tokens):
    starts = np.concatenate([[0], np.cumsum([len(token) for token in tokens])]).astype(np.int64)
    return Strings(np.frombuffer(b"".join(tokens), np.uint8), starts)


def index_of(tokens, chosen):
    none = np.zeros(len(tokens), np.bool_)
    return TokenIndex.of(TokenBytes(*strings_of(tokens), none, none), np.array(chosen, np.bool_))


def texts_of(strings):
    bounds = zip(strings.starts[:-1], strings.starts[1:], strict=True)
    return [strings.flat[start:stop].tobytes() for start, stop in bounds]


@given(STRINGS, STRINGS, st.data())
def test_a_lookup_finds_what_a_dictionary_finds(tokens, strings, data):
    chosen = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    known = {}
    for at, token in enumerate(tokens):
        if chosen[at] and token:
            known.setdefault(token, at)
    index, asked = index_of(tokens, chosen), strings_of(strings)
    assert index.find(asked).tolist() == [known.get(string, -1) for string in strings]
    assert index.longest(asked).tolist() == [
        next((known[string[:end]] for end in range(len(string), 0, -1) if string[:end] in known), -1)
        for string in strings
    ]
    assert index.are_whole(index.longest(asked), asked).tolist() == [string in known for string in strings]


@given(STRINGS, st.sampled_from([b"", b"a", b"ab", b"\xff"]), st.sampled_from([b"", b"b", b" \0"]))
def test_a_prefix_is_replaced_by_another(strings, taken, put):
    asked = strings_of(strings)
    chosen = asked.start_with(taken)
    assert chosen.tolist() == [string.startswith(taken) for string in strings]
    assert texts_of(asked.replaced(chosen, len(taken), put)) == [
        put + string[len(taken) :] if string.startswith(taken) else b"" for string in strings
    ]


def test_every_token_of_a_vocabulary_is_found():
    tokens = [f"{n:x}".encode() for n in range(20_000)]
    index = index_of(tokens, [True] * len(tokens))
    assert (index.find(strings_of(tokens)) == np.arange(len(tokens))).all()
