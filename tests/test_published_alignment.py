import json
from pathlib import Path

import pytest
import tiny
from published_alignment import PUBLISHED_MODES, PublishedText, PublishedVocabulary, published_map, published_rows

from fusion_plugins.core.fusion.align import align_tokens
from fusion_plugins.core.fusion.counts import AlignmentCounts
from fusion_plugins.errors import ConfigError

FOLDER = Path(__file__).parent / "golden"
RECORDS = [
    json.loads(line) for line in (FOLDER / "distribution_alignment.jsonl").read_text(encoding="utf-8").splitlines()
]
DATA = json.loads((FOLDER / "distribution_alignment_vocab.json").read_text(encoding="utf-8"))
VOCABULARY = PublishedVocabulary(
    {int(id): token for id, token in DATA["source_token_of_id"].items()},
    DATA["target_id_of_token"],
    DATA["edit_distance_mapping"],
    {int(id): target for id, target in DATA["statistical_mapping_ids"].items()},
)
CASES = [(record, mode) for record in RECORDS for mode in PUBLISHED_MODES[record["family"]]]


def published_text(record):
    prefix = "dtw_" if record["family"] == "fusechat" else ""
    aligned = align_tokens(
        record["dtw_source_tokens"], record["dtw_target_tokens"], method="dtw", tie_order=record["family"]
    )
    return PublishedText(
        record[prefix + "source_tokens"],
        record[prefix + "target_tokens"],
        record["target_ids"],
        aligned.target_to_source,
        record["source_topk_logits"],
        record["source_topk_ids"],
        DATA["source_space_marker"],
        DATA["target_space_marker"],
    )


@pytest.mark.parametrize(
    ("record", "mode"), CASES, ids=lambda x: x if isinstance(x, str) else f"{x['family']}-{x['doc']}"
)
def test_the_published_rows_are_reproduced(record, mode):
    rows = published_rows(published_text(record), VOCABULARY, family=record["family"], mode=mode)
    expected = record["expected"][mode]
    assert [list(logits) for logits, _ in rows] == expected["logits"]
    assert [ids for _, ids in rows] == expected["ids"]


def test_the_subset_holds_every_kind_of_row():
    rows = [row for record, mode in CASES for row in record["expected"][mode]["ids"]]
    assert any(not row for row in rows)
    assert any(len(row) == 1 for row in rows)
    assert any(len(row) > 5 for row in rows)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="no mode 'soft' of 'fusechat'"):
        published_rows(published_text(RECORDS[0]), VOCABULARY, family="fusechat", mode="soft")


def test_published_choice_from_statistics():
    expected = json.loads((FOLDER / "statistical_mapping.json").read_text(encoding="utf-8"))
    source, target = (t.convert_ids_to_tokens(list(range(len(t)))) for t in (tiny.tekken(), tiny.mistral_v1()))
    ids = {token: index for index, token in enumerate(source)}
    rows = [(ids[token], index, count) for token, counted, _ in expected["rows"] for _, count, index in counted]
    counts = AlignmentCounts.from_pairs(*zip(*rows, strict=True))
    found = published_map(source, target, counts)
    chosen = [target[found[ids[token]]] for token, _, _ in expected["rows"]]
    assert chosen == [row[2] for row in expected["rows"]]
    assert (found >= 0).sum() == len(expected["rows"])
