"""`fusion keys`: every key of every file, with all its values."""

import pytest
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.keys import sections, topics


def _keys(*arguments):
    return CliRunner().invoke(app, ["keys", *arguments])


def test_without_a_topic_the_topics_are_listed():
    output = _keys().output
    assert all(topic in output for topic in topics())
    assert {"axolotl", "capture", "sample", "score", "doctor"} <= set(topics())


@pytest.mark.parametrize(
    ("topic", "words"),
    [
        ("axolotl", ["min_edit", "exact", "statistics", "one_to_many", "bucket", "skip", "sft", "token_min_ce"]),
        ("capture", ["top_k", "all", "on_unusable", "raise, skip", "64"]),
        ("doctor", ["first_token, min_edit, exact", "200"]),
    ],
)
def test_a_topic_lists_its_keys_with_their_values_and_defaults(topic, words):
    result = _keys(topic)
    assert result.exit_code == 0
    assert [word for word in words if word not in result.output] == []


def test_every_key_has_a_meaning():
    installed = [topic for topic in topics() if topic != "vllm"]
    found = [section for topic in installed for section in sections(topic)]
    assert len(found) > 10
    assert [key.path for section in found for key in section.keys if not key.meaning] == []


def test_an_unknown_topic_is_refused_with_the_known_ones():
    assert "expected one of the topics axolotl, capture" in str(_keys("nothing").exception)
