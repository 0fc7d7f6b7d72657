"""Source token -> target token: which target token takes over a source token's probability.

Ordinary tokens are compared as bytes, special tokens by their role.

* ``exact`` maps equal bytes only.
* ``min_edit`` takes the nearest token by edit distance, the papers' method.
* ``first_token`` takes the first token of the target's own encoding of the source token's bytes. That is what the
  source's next-token distribution says about the target's next token.
* ``statistics`` takes the token that was aligned with it most often on real texts.
* ``one_to_many`` divides its probability among all tokens that were aligned with it, in proportion to the counts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fusion_plugins.core.arrays import BoolArray, IntArray
from fusion_plugins.core.fusion.counts import AlignmentCounts, by_count, shares_by_count
from fusion_plugins.core.fusion.nearest import nearest_tokens, pair_distances
from fusion_plugins.core.fusion.types import VocabularyMap
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.errors import ConfigError

Text = str | bytes
Vocabulary = Sequence[str] | Sequence[bytes] | TokenTable
Counts = AlignmentCounts | Mapping[tuple[int, int], int]
Encode = Callable[[Any], Sequence[int]]
METHODS = ("min_edit", "exact", "statistics", "one_to_many", "first_token")
#: methods that need the counts of aligned tokens
COUNTED = ("statistics", "one_to_many")
#: methods that ask the target's tokenizer for the first token of every source token
ASKED_THE_TOKENIZER = ("first_token", "one_to_many")


def map_vocabulary(
    source: Vocabulary,
    target: Vocabulary,
    *,
    method: str = "min_edit",
    max_distance: int | None = None,
    counts: Counts | None = None,
    encode: Encode | None = None,
) -> VocabularyMap:
    """Map each source token to a target token.

    Args:
        source: (W,) tokens, ``str`` or ``bytes``, or a token table.
        target: (V,) tokens of the same type, or a token table.
        method: one of :data:`METHODS`. The default is the papers' method; a configuration takes ``first_token`` unless
            it says otherwise (``fusion.projection.vocabulary_map``).
        max_distance: leave a token unmapped when its counterpart is farther than this (in bytes; in code points for
            ``str``).
        counts: how often tokens were aligned, or (source id, target id) -> number; for ``statistics`` and
            ``one_to_many``.
        encode: bytes (or ``str``) -> ids of the target's own encoding, for ``first_token``. Without it, or where it
            returns nothing, the longest target token that the source token begins with is taken.

    Returns:
        The map. Among equally good target tokens the lowest id wins. Where both sides are tables, special tokens are
        mapped by role (``other`` by name) and ordinary tokens only to ordinary tokens. ``one_to_many`` also has
        ``shares``; its ``target_ids`` are those of ``first_token``, for the tokens that were never aligned.

    Raises:
        ConfigError: the method is unknown or lacks its counts, or the two vocabularies are not of one type.
        MismatchError: the counts are of other vocabularies.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown vocabulary map {method!r}; expected one of {', '.join(METHODS)}")
    left, right = _tokens(source), _tokens(target)
    _check_types(left, right)
    mappable, eligible = _mappable(source), _eligible(target)
    target_ids = np.full(len(left), -1, np.int32)
    distances = np.full(len(left), -1, np.int32)
    shares, counted = None, _checked_counts(counts, method)
    if method == "statistics":
        target_ids = np.where(mappable, by_count(left, right, counted, eligible), -1).astype(np.int32)
    elif method in ASKED_THE_TOKENIZER:
        target_ids[mappable] = _first_tokens(_select(left, mappable), right, eligible, encode)
    else:
        limit = 0 if method == "exact" else max_distance
        target_ids[mappable], distances[mappable] = _nearest(
            _select(left, mappable), _select(right, eligible), eligible, limit
        )
    if method == "one_to_many":
        shares = shares_by_count(left, right, counted, eligible)
    if method not in ("exact", "min_edit"):
        _measure(left, right, target_ids, distances, max_distance)
    if isinstance(source, TokenTable) and isinstance(target, TokenTable):
        _map_roles(source, target, target_ids, distances)
    return VocabularyMap(target_ids, distances, method, shares)


def same_ids(source: TokenTable, target: TokenTable) -> bool:
    """Whether the source's ids mean the same to the target, so that no map is needed.

    Tokens that were added after the source's do no harm. Two chat templates may end turns with different tokens of one
    vocabulary: then a map is needed, which maps them by role.
    """
    return target.extends(source) and source.id_of_role(Role.END_OF_TURN) == target.id_of_role(Role.END_OF_TURN)


def identity_map(source: TokenTable) -> VocabularyMap:
    """Return the map that leaves every id as it is."""
    ids = np.arange(source.vocab_size, dtype=np.int32)
    return VocabularyMap(ids, np.zeros_like(ids), "identity")


def _checked_counts(counts: Counts | None, method: str) -> AlignmentCounts:
    if method in COUNTED and not counts:
        raise ConfigError(
            f"vocabulary map {method!r} expects `counts`, the AlignmentCounts of the two tokenizers; got "
            f"{'none' if counts is None else 'empty ones'}. Count aligned texts first."
        )
    if counts is None:
        return AlignmentCounts()
    if isinstance(counts, Mapping):
        return AlignmentCounts.from_pairs([s for s, _ in counts], [t for _, t in counts], list(counts.values()))
    if not isinstance(counts, AlignmentCounts):
        raise ConfigError(f"expected `counts` as AlignmentCounts or {{(source id, target id): n}}, got {type(counts)}")
    return counts


def _tokens(vocabulary: Vocabulary) -> Sequence[Any]:
    return vocabulary.tokens if isinstance(vocabulary, TokenTable) else list(vocabulary)


def _mappable(vocabulary: Vocabulary) -> BoolArray:
    """(W,) bool, True for tokens that are mapped by their text: not for special tokens and ids without a token."""
    if isinstance(vocabulary, TokenTable):
        mappable: BoolArray = ~vocabulary.special & (vocabulary.lengths > 0)
        return mappable
    return np.ones(len(vocabulary), np.bool_)


def _eligible(vocabulary: Vocabulary) -> BoolArray:
    """(V,) bool, True for the tokens that another token may be mapped to."""
    return vocabulary.ordinary if isinstance(vocabulary, TokenTable) else np.ones(len(vocabulary), np.bool_)


def _select(tokens: Sequence[Any], chosen: BoolArray) -> list[Any]:
    return [tokens[index] for index in np.flatnonzero(chosen)]


def _check_types(left: Sequence[Text], right: Sequence[Text]) -> None:
    kinds = {_kind(token) for tokens in (left, right) for token in tokens}
    if kinds not in ({"str"}, {"bytes"}, set()):
        raise ConfigError(
            f"expected source and target tokens that are all str or all bytes (those of a table are bytes), got "
            f"{' and '.join(sorted(kinds))}. Convert one side."
        )


def _kind(token: Any) -> str:
    """str, bytes (numpy's too), or whatever else it is."""
    return next((kind.__name__ for kind in (str, bytes) if isinstance(token, kind)), type(token).__name__)


def _nearest(
    left: Sequence[Any], right: Sequence[Any], columns: BoolArray, limit: int | None
) -> tuple[IntArray, IntArray]:
    """Take equal tokens first, then search for the rest; ids are those of the whole target vocabulary."""
    ids = np.flatnonzero(columns)
    first = {token: index for index, token in reversed(list(enumerate(right)))}
    index = np.fromiter((first.get(token, -1) for token in left), np.int32, len(left))
    distance = np.where(index >= 0, 0, -1).astype(np.int32)
    if limit != 0:
        open_rows = np.flatnonzero(index < 0)
        index[open_rows], distance[open_rows] = nearest_tokens(
            [left[row] for row in open_rows], right, max_distance=limit
        )
    return np.where(index >= 0, ids[index] if len(ids) else -1, -1).astype(np.int32), distance


def _first_tokens(left: Sequence[Any], right: Sequence[Any], columns: BoolArray, encode: Encode | None) -> IntArray:
    first = {right[index]: index for index in np.flatnonzero(columns)[::-1].tolist()}

    def choose(token: Any) -> int:
        ids = encode(token) if encode is not None else ()
        if len(ids) and columns[ids[0]]:
            return int(ids[0])
        return next((first[token[:end]] for end in range(len(token), 0, -1) if token[:end] in first), -1)

    return np.fromiter(map(choose, left), np.int32, len(left))


def _measure(
    left: Sequence[Any], right: Sequence[Any], target_ids: IntArray, distances: IntArray, limit: int | None
) -> None:
    """Fill in the distances of the chosen pairs, and undo the choices beyond the limit."""
    chosen = np.flatnonzero(target_ids >= 0)
    distances[chosen] = pair_distances([left[row] for row in chosen], [right[column] for column in target_ids[chosen]])
    if limit is not None:
        target_ids[distances > limit] = -1
        distances[distances > limit] = -1


def _map_roles(source: TokenTable, target: TokenTable, target_ids: IntArray, distances: IntArray) -> None:
    names = {target.tokens[index]: index for index in np.flatnonzero(target.special)[::-1].tolist()}
    # A token that ends both turns and texts (</s> of Mistral's chat models) is the end of a turn to a target that has
    # one: only a chat template gives it both roles.
    end_of_turn = source.role_ids.get(Role.END_OF_TURN)
    for row in np.flatnonzero(source.special).tolist():
        role = Role.END_OF_TURN if row == end_of_turn else source.roles[row]
        found = names.get(source.tokens[row]) if role in (None, Role.OTHER) else target.id_of_role(role)
        target_ids[row] = -1 if found is None else found
        distances[row] = -1 if found is None else 0
