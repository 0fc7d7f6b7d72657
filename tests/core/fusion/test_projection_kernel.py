import numpy as np
import pytest

from fusion_plugins.core.fusion.projection_kernel import Held, _add, _is_prefix, _slot, _write, places
from fusion_plugins.core.text.token_table import TokenTable


def packed(*tokens):
    return TokenTable([token.encode() for token in tokens], [None] * len(tokens), {}, False, "byte_level").packed


def test_a_prefix_is_compared_after_the_bytes_that_are_skipped():
    tokens = packed("abc", "bcd", "abcd", "")
    assert _is_prefix(tokens, 0, tokens, 2, 0)
    assert _is_prefix(tokens, 0, tokens, 1, 1)
    assert not _is_prefix(tokens, 2, tokens, 0, 0)
    assert not _is_prefix(tokens, 0, tokens, 1, 0)
    # Nothing begins with nothing.
    assert not _is_prefix(tokens, 3, tokens, 0, 0)
    assert not _is_prefix(tokens, 0, tokens, 1, 3)


@pytest.mark.parametrize("seed", range(20))
def test_masses_add_up_per_token_whatever_the_collisions(seed):
    """As many tokens as there is room for, ids far apart and close together, some of them several times."""
    rng, width, n_target = np.random.default_rng(seed), 40, 200_000
    tokens = np.concatenate([rng.integers(0, n_target, 20), np.arange(20) + rng.integers(0, n_target - 20)])
    held = Held(np.empty(width, np.int32), np.empty(width), np.full(128, -1, np.int32), n_target)
    size, expected = 0, {}
    for token in rng.choice(tokens, 150).tolist():
        mass = float(rng.random())
        size = _add(held, size, token, mass)
        expected[token] = expected.get(token, 0.0) + mass
    assert dict(zip(held.ids[:size].tolist(), held.mass[:size].tolist(), strict=True)) == expected
    for token in tokens.tolist():
        at = held.slots[_slot(held.ids, held.slots, token)]
        assert (at >= 0) == (token in expected)
    assert _add(held, size, n_target, 1.0) == _add(held, size, -1, 1.0) == _add(held, size, 5, 0.0) == size


def test_entries_are_written_by_descending_mass_and_then_by_id():
    ids, mass = np.array([7, 3, 9, 4], np.int32), np.array([0.1, 0.5, 0.1, 0.3])
    out_ids, out = np.full(6, -1, np.int32), np.full(6, -np.inf, np.float32)
    _write(ids, mass, out_ids, out)
    assert out_ids.tolist() == [3, 4, 7, 9, -1, -1]
    np.testing.assert_allclose(np.exp(out), [0.5, 0.3, 0.1, 0.1, 0, 0], rtol=1e-6)


def test_places_are_counted_inside_each_span():
    place, left = places(np.array([2, 5, 9, 13, 20], np.int32), np.array([[5, 9], [20, 23]], np.int32))
    assert place.tolist() == [-1, 0, 4, -1, 1 << 32]
    assert left.tolist() == [-1, 4, 0, -1, 3]
