"""Every ordered pair of real tokenizers: ends, vocabulary maps, projection, doctor's verdict; texts in many scripts.

The source of these tests is certain of the next token, or nearly so: what must reach the target is then known exactly.
"""

import random
from functools import cache

import numpy as np
import pytest
import real_assets
import tiny
from tokenizer_cases import HARD_TEXTS

from fusion_plugins.core.fusion.align import align_texts
from fusion_plugins.core.fusion.common_text import common_text
from fusion_plugins.core.fusion.project import Projector
from fusion_plugins.core.fusion.record import build_record, supervised_positions
from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.fusion.vocabulary_map import map_vocabulary
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.tokenize import encoder, tokenize, tokenize_content
from fusion_plugins.doctor.examine import examine
from fusion_plugins.doctor.sides import Side

pytestmark = [pytest.mark.real, pytest.mark.slow]

SCRIPTS = (
    "Καλημέρα κόσμε, 2026! 1234567 + 89 = 1234656.",
    "नमस्ते दुनिया। வணக்கம் உலகம். สวัสดีชาวโลก",
    "안녕하세요 세계, こんにちは世界、 ሰላም ልዑል",
    "x² ≤ √2 — “quoted” … ½ ① ﬁne 𝕏 𐍈",
)
TEXTS = [*tiny.TEXTS, *SCRIPTS, *(text for text in HARD_TEXTS if text.strip() and "▁" not in text)]
CHATS = [tiny.CHAT, tiny.CHAT[:2]]
WITH_TEMPLATE = tuple(name for name in real_assets.TOKENIZERS if name != "tekken")


def likely(text, share, table):
    """A source that gives the next token ``share``, and the rest to two words that every vocabulary has."""
    following = np.append(text.input_ids[1:], -1).astype(np.int32)
    others = [table.tokens.index(word) for word in (b" of", b" and")]
    rest = [np.where(np.isin(following, others), -1, other) for other in others]
    ids = np.stack([following, *rest], axis=1).astype(np.int32)
    logprobs = np.log(np.tile([share, *[(1 - share) / 2 + 1e-30] * 2], (len(ids), 1)))
    logprobs = np.where(ids < 0, -np.inf, logprobs).astype(np.float32)
    ids[-1], logprobs[-1] = -1, -np.inf
    return build_record("r", text, TopK(ids, logprobs, np.append(logprobs[:-1, 0], np.float32(np.nan))))


@pytest.fixture(scope="module")
def tokenized(sides):
    """Name -> the texts in its tokens."""
    return {name: [tokenize(*side, text) for text in TEXTS] for name, side in sides.items()}


@pytest.fixture(scope="module")
def projectors(sides):
    """(source, target) -> the exact map and the projector, made once."""

    @cache
    def make(source, target):
        tables = sides[source][1], sides[target][1]
        vocabulary = map_vocabulary(*tables, method="exact")
        return vocabulary, Projector.of(*tables, vocabulary)

    return make


@pytest.mark.parametrize("name", real_assets.TOKENIZERS)
def test_tokens_spell_the_text_and_end_where_their_bytes_end(sides, tokenized, name):
    table = sides[name][1]
    for text, found in zip(TEXTS, tokenized[name], strict=True):
        raw, start = text.encode(), 0
        changed = name == "qwen3" and "e\u0301" in text  # NFC
        for token, end, exact in zip(found.input_ids.tolist(), found.ends.tolist(), found.exact.tolist(), strict=True):
            if exact and table.role_of(token) is None and not changed:
                assert table.bytes_of(token) in (raw[start:end], b" " + raw[start:end])
                start = end
            assert exact or changed
        assert found.ends[-1] == len(raw)


@pytest.mark.parametrize("source", real_assets.TOKENIZERS)
def test_the_next_token_and_its_mass_reach_every_target(sides, tokenized, projectors, source):
    for target in real_assets.TOKENIZERS:
        if target == source:
            continue
        tables = sides[source][1], sides[target][1]
        vocabulary, projector = projectors(source, target)
        _check_map(*tables, vocabulary)
        used = positions = 0
        for own, other in zip(tokenized[source], tokenized[target], strict=True):
            for share in (1.0, 0.6):
                record, aim = common_text(likely(own, share, tables[0]), other, tables[0].packed, tables[1].packed)
                found = projector(record, align_texts(record.text, aim), aim)
                label = np.append(aim.input_ids[1:], -1)
                present = found.distributions.present
                total = np.exp(found.distributions.logprobs[present].astype(float)).sum(axis=1)
                np.testing.assert_allclose(total + found.distributions.leftover[present], 1, atol=1e-4)
                if share == 1.0:  # nothing but the label, with all the mass
                    assert (found.distributions.ids[present, 0] == label[present]).all()
                    np.testing.assert_allclose(found.label_logprobs[present], 0, atol=1e-4)
                    used, positions = used + present.sum(), positions + supervised_positions(aim).sum()
                else:
                    _check_shares(record, aim, found, tables, vocabulary, share)
        assert used / positions > 0.3, (source, target)


def _check_map(source, target, vocabulary):
    """A mapped token has equal bytes or an equal role, and nothing that has an equal is left out."""
    chosen = random.Random(0).sample(range(source.vocab_size), 2000)
    known = {target.tokens[index] for index in np.flatnonzero(target.ordinary).tolist()}
    for token in chosen:
        mapped = int(vocabulary.target_ids[token])
        if source.role_of(token) is None:
            assert (mapped >= 0) == (source.tokens[token] in known and source.tokens[token] != b"")
            assert mapped < 0 or source.tokens[token] == target.tokens[mapped]


def _is_own_space(text, at, table):
    """Whether a token is the space that its tokenizer puts before a text."""
    return bool(text.ends[at] == 0 and table.bytes_of(int(text.input_ids[at])) == b" ")


def _check_shares(record, aim, found, tables, vocabulary, share):
    """Where both sides have the same next token, every entry's probability is that of the entries mapped to it."""
    source_at = {int(end): at for at, end in enumerate(record.text.ends) if record.text.exact[at]}
    for t in np.flatnonzero(found.distributions.present[:-1]):
        u = source_at.get(int(aim.ends[t]))
        if u is None or u + 1 >= len(record.text.input_ids):
            continue
        own, label = int(record.text.input_ids[u + 1]), int(aim.input_ids[t + 1])
        # Behind a space of its own a source has more to say of the answer: what it gives other tokens than the space.
        if _is_own_space(record.text, u, tables[0]) and not _is_own_space(aim, t, tables[1]):
            continue
        if tables[0].role_of(own) or tables[0].bytes_of(own) != tables[1].bytes_of(label):
            continue
        if record.text.ends[u + 1] != aim.ends[t + 1] or record.text.ends[u + 1] == record.text.ends[u]:
            continue
        entries = dict(zip(found.distributions.ids[t].tolist(), found.distributions.logprobs[t].tolist(), strict=True))
        if record.topk.ids[u, 1] >= 0 and vocabulary.target_ids[own] >= 0:
            expected = {int(vocabulary.target_ids[other]): (1 - share) / 2 for other in record.topk.ids[u, 1:]}
            expected[label] = share
            assert {token: np.exp(value) for token, value in entries.items() if token >= 0} == pytest.approx(
                expected, abs=1e-4
            )


@pytest.mark.parametrize("target", real_assets.TOKENIZERS)
def test_first_tokens_are_those_of_the_targets_own_encoding(sides, target):
    tokenizer, table = sides[target]
    encode, chooser = encoder(tokenizer, table), random.Random(1)
    for source in real_assets.TOKENIZERS:
        tokens = [token for token in chooser.sample(sides[source][1].tokens, 60) if token]
        mapped = map_vocabulary(tokens, table.tokens, method="first_token", encode=encode).target_ids
        for token, found in zip(tokens, mapped.tolist(), strict=True):
            # Whatever is chosen is the beginning of the source's token.
            assert found < 0 or token.startswith(table.bytes_of(found)) or table.role_of(found) is not None
            ids = encode(token)
            assert not ids or b"".join(map(table.bytes_of, ids)) == token


@pytest.mark.parametrize("source", WITH_TEMPLATE)
def test_chats_in_each_ones_own_template_reach_every_target(sides, projectors, source):
    """Both sides render the chat on their own; the answers are common text, and the source's next token the label."""
    for target in WITH_TEMPLATE:
        tables = sides[source][1], sides[target][1]
        projector = projectors(source, target)[1]
        for chat in CHATS:
            own, _ = tokenize_content(*sides[source], chat)
            aim, text = tokenize_content(*sides[target], chat)
            record, aim = common_text(likely(own, 1.0, tables[0]), aim, tables[0].packed, tables[1].packed)
            found = projector(record, align_texts(record.text, aim), aim)
            present = found.distributions.present
            label = np.append(aim.input_ids[1:], -1)
            ends_turn = [tables[1].role_of(int(token)) in (Role.EOS, Role.END_OF_TURN) for token in label]
            right = found.distributions.ids[:, 0] == label
            assert right[present].all(), (source, target)
            assert present[_first_of_answers(aim)].all(), (source, target)
            covered = b"|".join(text.encode()[start:stop] for start, stop in aim.spans.tolist())
            for message in chat[1::2]:
                assert message["content"].encode() in covered
            assert present.sum() >= 5
            assert (present & np.array(ends_turn)).any() or source != target


def _first_of_answers(text):
    """The positions that predict the first token of each supervised piece, but the first token of a whole text."""
    spans = [(start, stop) for start, stop in text.spans.tolist() if start < stop]
    first = np.array([np.searchsorted(text.ends, start, side="right") for start, _ in spans], int)
    return first[(first > 0) & text.exact[first] & text.exact[first - 1]] - 1


def test_doctor_judges_pairs_as_their_vocabularies_are():
    """One vocabulary in two forms is best; the same script helps; a vocabulary of another kind is worse."""
    contents = {str(index): text for index, text in enumerate(TEXTS)}
    names = ("mistral_v1", "llama2", "smollm2")
    made = {
        name: Side(name, TokenTable.from_tokenizer(tokenizer), None, tokenizer, contents)
        for name, tokenizer in ((name, real_assets.tokenizer(name)) for name in names)
    }
    report = examine(made["llama2"], [made["mistral_v1"], made["smollm2"], made["llama2"]])
    near, far, own = report.sources
    assert own.diagnosis.projection.coverage >= near.diagnosis.projection.coverage
    assert near.diagnosis.projection.coverage > far.diagnosis.projection.coverage > 0.3
    assert near.verdict in ("good", "fair")
    assert [source.diagnosis.name for source in report.sources] == ["mistral_v1", "smollm2", "llama2"]
