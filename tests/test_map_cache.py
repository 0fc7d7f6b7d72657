"""The cache of vocabulary maps: used when it fits, rebuilt when it does not, never in the way."""

import numpy as np
import pytest
import tiny

from fusion_plugins import map_cache
from fusion_plugins.core.fusion.counts import AlignmentCounts
from fusion_plugins.core.fusion.vocabulary_map import map_vocabulary
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.tokenize import encoder
from fusion_plugins.map_cache import cached_map, map_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tables():
    return [TokenTable.from_tokenizer(make()) for make in (tiny.byte_level, tiny.sentencepiece_bpe)]


def files():
    return sorted(map_folder().iterdir())


def same(left, right):
    return (left.target_ids == right.target_ids).all() and (left.distances == right.distances).all()


@pytest.mark.parametrize("method", ["exact", "min_edit", "first_token"])
def test_a_map_is_the_same_from_the_cache(tables, method, monkeypatch):
    made = cached_map(*tables, method=method)
    assert same(made, map_vocabulary(*tables, method=method))
    monkeypatch.setattr(map_cache, "map_vocabulary", lambda *args, **options: pytest.fail("made again"))
    found = cached_map(*tables, method=method)
    assert same(found, made)
    assert found.method == method
    assert found.target_ids.dtype == found.distances.dtype == np.int32
    assert [path.suffix for path in files()] == [".npz"]


def test_everything_that_changes_a_map_changes_its_file(tables):
    source, target = tables
    padded = TokenTable(source.tokens, source.roles, dict(source.role_ids) | {Role.PAD: 1}, False, "byte_level")
    cached_map(source, target)
    cached_map(target, source)
    cached_map(source, target, method="exact")
    cached_map(source, target, max_distance=1)
    cached_map(padded, target)
    cached_map(source, target, method="first_token")
    cached_map(source, target, method="first_token", tokenizer=tiny.sentencepiece_bpe())
    assert len(files()) == 7


def test_first_token_follows_the_tokenizer(tables):
    source, target = tables
    found = cached_map(source, target, method="first_token", tokenizer=tiny.sentencepiece_bpe())
    encode = encoder(tiny.sentencepiece_bpe(), target)
    assert same(found, map_vocabulary(source, target, method="first_token", encode=encode))


def test_statistics_are_never_cached(tables):
    for count in (1, 2):
        counts = AlignmentCounts.from_pairs([300, 300], [300, 301], [1, count])
        assert cached_map(*tables, method="statistics", counts=counts).method == "statistics"
    assert not map_folder().exists()


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut off", b"not an archive"])
def test_a_damaged_file_is_made_again(tables, damage):
    made = cached_map(*tables)
    files()[0].write_bytes(damage)
    assert same(cached_map(*tables), made)
    assert files()[0].read_bytes() != damage


def test_a_file_with_any_byte_changed_is_made_again_or_right(tables):
    made = cached_map(*tables, method="exact")
    good = files()[0].read_bytes()
    for at in range(0, len(good), 11):
        files()[0].write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        assert same(cached_map(*tables, method="exact"), made)


def test_a_file_of_another_vocabulary_size_is_made_again(tables):
    made = cached_map(*tables)
    np.savez(files()[0], target_ids=np.zeros(3, np.int32), distances=np.zeros(3, np.int32))
    assert same(cached_map(*tables), made)


def test_a_cache_that_cannot_be_written_does_no_harm(tables, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert same(cached_map(*tables), map_vocabulary(*tables))
