"""Several servers: which one is asked, what is retried, when to give up, and where the key never appears."""

import json
import socket
import time

import pytest
import source_checks
from fake_server import running
from source_checks import responses
from source_checks import server_config as config

from fusion_plugins.errors import SourceError
from fusion_plugins.sources.backends import servers
from fusion_plugins.sources.backends.servers import without_key
from fusion_plugins.sources.sample import sample_prompts


@pytest.fixture
def prompts(tmp_path):
    return source_checks.prompts(tmp_path / "prompts.jsonl", 12)


@pytest.mark.parametrize("key", ["sk-secret-of-a-length", "sk-\\secret\"'of-a-length"])
def test_a_key_is_removed_before_a_message_is_cut_and_however_it_is_written(prompts, tmp_path, monkeypatch, key):
    monkeypatch.setenv("THE_KEY", key)
    with running(lambda number, body: "talkative") as server, pytest.raises(SourceError) as refusal:
        sample_prompts(config(prompts, tmp_path / "out", server, api_key_env="THE_KEY"))
    assert "***" in str(refusal.value)
    assert "sk-" not in str(refusal.value)
    assert without_key(f"{key} {key!r} {json.dumps(key)}", key).count("***") == 3


@pytest.mark.parametrize(
    "written", ["sk-a\\/b+c&<d>=", "sk-a%2Fb%2Bc%26%3Cd%3E%3D", "sk-a/b%2Bc%26%3Cd%3E%3D", "sk-a/b+c&amp;&lt;d&gt;="]
)
def test_a_key_is_removed_where_a_server_escapes_it(written):
    assert without_key(f"no such key: {written}!", "sk-a/b+c&<d>=") == "no such key: ***!"


def test_a_dead_server_is_left_alone_and_the_others_take_its_work(prompts, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    with running() as good, running(lambda number, body: "broken") as bad:
        sample_prompts(config(prompts, tmp_path / "out", dead, good, bad, rest_after=2, rest_seconds=60.0, n=5))
    assert len(responses(tmp_path / "out")) == 60
    # Eight were on their way when it failed for the first time and count once; eight more when it failed again.
    assert len(bad.requests) <= 8 + 8


def test_a_server_that_is_too_busy_is_not_taken_for_a_broken_one(prompts, tmp_path):
    """Two answers at a time, and 429 for everyone else: no reason to leave it alone for a minute."""
    with running() as server:
        server.trouble = lambda number, body: "overloaded" if server.at_once > 2 else None
        started = time.monotonic()
        settings = config(prompts, tmp_path / "out", server, n=4, concurrency=16, rest_after=1, rest_seconds=60.0)
        sample_prompts(settings)
    assert len(responses(tmp_path / "out")) == 48
    assert len(server.requests) > 48
    assert time.monotonic() - started < 30


def test_being_busy_does_not_use_up_patience_while_others_are_answered(prompts, tmp_path):
    with running() as server:

        def trouble(number, body):
            others = sum("What is 0 +" not in request["messages"][-1]["content"] for request in server.requests)
            return "overloaded" if "What is 0 +" in body["messages"][-1]["content"] and others < 20 else "slowly"

        server.trouble = trouble
        sample_prompts(config(prompts, tmp_path / "out", server, n=2, concurrency=4, patience=0.6))
    assert len(responses(tmp_path / "out")) == 24


@pytest.mark.parametrize("status", [501, 505])
def test_what_a_server_will_never_do_is_not_asked_for_again(prompts, tmp_path, status):
    with running(lambda number, body: status) as server:
        with pytest.raises(SourceError, match=f"status {status}"):
            sample_prompts(config(prompts, tmp_path / "out", server, n=1, concurrency=1))
        assert len(server.requests) == 1


def test_a_server_that_comes_back_is_asked_again(prompts, tmp_path):
    started = time.monotonic()
    with running(lambda number, body: "broken" if time.monotonic() < started + 2 else None) as server:
        sample_prompts(config(prompts, tmp_path / "out", server, rest_after=2))
    assert len(responses(tmp_path / "out")) == 24
    assert len(server.requests) < 24 + 40


def test_patience_ends_with_the_last_trouble_in_the_message(prompts, tmp_path):
    with (
        running(lambda number, body: "broken") as server,
        pytest.raises(SourceError, match="within 1 s.*out of memory"),
    ):
        sample_prompts(config(prompts, tmp_path / "out", server, patience=1.0))


def test_when_nothing_is_answered_prompts_are_not_to_blame(prompts, tmp_path):
    with running(lambda number, body: "broken") as server:
        settings = config(prompts, tmp_path / "out", server, patience=0.5).model_copy(update={"on_unusable": "skip"})
        with pytest.raises(SourceError, match="got none from any server"):
            sample_prompts(settings)


def test_a_server_is_obeyed_for_a_while_when_it_says_how_long_to_wait():
    assert servers._retry_after({"retry-after": "2.5"}) == 2.5
    assert servers._retry_after({"retry-after": "86400"}) == servers.LONGEST_RETRY_AFTER
    for value in ("-3", "Wed, 21 Oct 2026 07:28:00 GMT"):
        assert servers._retry_after({"retry-after": value}) == 0.0
    assert servers._retry_after({}) == 0.0


def test_a_wait_that_a_server_asks_for_ends_with_the_patience(prompts, tmp_path):
    started = time.monotonic()
    with running(lambda number, body: "anything") as server:
        server.raw = b"HTTP/1.1 503 Busy\r\nretry-after: 9999\r\ncontent-length: 0\r\n\r\n"
        with pytest.raises(SourceError, match="within 1 s"):
            sample_prompts(config(prompts, tmp_path / "out", server, patience=1.0))
    assert time.monotonic() - started < 30
