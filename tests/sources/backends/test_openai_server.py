"""Servers as sources: requests, answers that fail on the way, and a second independent server."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from pathlib import Path

import pytest
import source_checks
import tiny
from fake_server import running
from source_checks import responses
from source_checks import server_config as config

from fusion_plugins.config import validate
from fusion_plugins.errors import ConfigError, MismatchError, SourceError
from fusion_plugins.sources.capture import CaptureConfig, capture_texts
from fusion_plugins.sources.sample import SampleConfig, sample_prompts
from fusion_plugins.store import open_rows

TROUBLES = ("overloaded", "broken", "half", "unfinished", "empty", "no_json", "dropped", "aborted", "failed")
TROUBLES += ("no_message", "no_text", "no_choice", "no_object", 408, 425, 502, 520, 529)


@pytest.fixture
def prompts(tmp_path):
    return source_checks.prompts(tmp_path / "prompts.jsonl", 12)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_that_passes_costs_nothing_but_time(prompts, tmp_path, trouble):
    with running(lambda number, body: trouble if number % 3 == 0 else None) as server:
        sample_prompts(config(prompts, tmp_path / "out", server))
    found = responses(tmp_path / "out")
    assert len(found) == 24
    assert found["p3", 1] == "What is 3 + 30?"[::-1]
    assert len(server.requests) > 24


def test_an_answer_that_takes_too_long_is_asked_for_again(prompts, tmp_path):
    with running(lambda number, body: "slow" if number == 2 else None) as server:
        sample_prompts(config(prompts, tmp_path / "out", server, n=1, timeout=0.7))
    assert len(responses(tmp_path / "out")) == 12
    assert len(server.requests) == 13


def test_a_request_says_what_was_configured_and_every_sample_has_its_own_seed(prompts, tmp_path):
    source = {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "max_tokens": 9,
        "stop": ["\n"],
    }
    with running() as server:
        settings = config(prompts, tmp_path / "out", server, source=source | {"system": "Be brief."})
        settings.sources[0].options["extra_body"] = {"min_p": 0.1}
        sample_prompts(settings)
    seeds = {request.pop("seed") for request in server.requests}
    assert len(seeds) == 24
    request = next(request for request in server.requests if "4 + 30" in request["messages"][-1]["content"])
    assert request == {
        "model": "served",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 4 + 30?"}],
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "max_tokens": 9,
        "stop": ["\n"],
        "min_p": 0.1,
    }


def test_plain_openai_requests_carry_no_fields_that_only_some_servers_know(prompts, tmp_path):
    with running() as server:
        sample_prompts(config(prompts, tmp_path / "out", server, n=1))
        sample_prompts(config(prompts, tmp_path / "plain", server, n=1, source={"template": "plain"}))
    assert set(server.requests[0]) == {"model", "messages", "temperature", "top_p", "max_tokens", "seed"}
    assert "prompt" in server.requests[-1]


def test_requests_run_side_by_side_up_to_the_limit(prompts, tmp_path):
    with running() as server:
        sample_prompts(config(prompts, tmp_path / "out", server, n=5, concurrency=4))
    assert 2 <= server.most_at_once <= 4


@pytest.mark.parametrize("trouble", ["broken", "refused"])
def test_a_prompt_that_always_fails_is_named_and_can_be_left_out(prompts, tmp_path, trouble):
    wrong = lambda number, body: trouble if "3 + 30" in body["messages"][-1]["content"] else "slowly"  # noqa: E731
    with running(wrong) as server:
        settings = config(prompts, tmp_path / "out", server, patience=0.5, rest_after=100, concurrency=4)
        with pytest.raises(SourceError, match="prompt 'p3', source 'remote': .*`on_unusable: skip`"):
            sample_prompts(settings)
        report = sample_prompts(settings.model_copy(update={"on_unusable": "skip"}))
        assert list(report.skipped) == [("remote", "p3")]
        assert report.drawn + report.present == len(responses(tmp_path / "out")) == 22
        server.trouble = lambda number, body: None
        assert sample_prompts(settings).drawn == 2


def test_ctrl_c_does_not_wait_for_slow_servers_and_keeps_what_is_done(prompts, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with running(lambda number, body: "hangs" if "1 + 30" in body["messages"][-1]["content"] else None) as server:
            timer = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT))
            started = time.monotonic()
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                sample_prompts(config(prompts, tmp_path / "out", server))
            assert time.monotonic() - started < 10
            for thread in threading.enumerate():
                if "_work" in thread.name:
                    assert thread.daemon
                    thread.join(5)  # the requests were ended, although their server hangs
                    assert not thread.is_alive()
    finally:
        signal.signal(signal.SIGINT, before)
    # "1 + 30" and "11 + 30" were never answered.
    assert len(responses(tmp_path / "out")) == 20


def test_a_request_that_is_refused_ends_the_run_and_what_is_done_stays(prompts, tmp_path):
    wrong = lambda number, body: "refused" if "11 + 30" in body["messages"][-1]["content"] else None  # noqa: E731
    with running(wrong) as server:
        with pytest.raises(SourceError, match="status 400: .*max_tokens is too large"):
            sample_prompts(config(prompts, tmp_path / "out", server, concurrency=2))
        assert 0 < len(responses(tmp_path / "out")) < 24
        server.trouble = lambda number, body: None
        before = len(server.requests)
        report = sample_prompts(config(prompts, tmp_path / "out", server))
    assert len(responses(tmp_path / "out")) == 24
    assert len(server.requests) - before == report.drawn == 24 - report.present


def test_the_key_comes_from_the_environment_or_a_file_and_is_written_nowhere(prompts, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("THE_KEY", "sk-secret-1")
    with running() as server:
        sample_prompts(config(prompts, tmp_path / "out", server, n=1, api_key_env="THE_KEY"))
        assert server.keys == {"Bearer sk-secret-1"}
        (tmp_path / "key").write_text("sk-secret-2\n")
        more = config(prompts, tmp_path / "out", server, api_key_env="THE_KEY", api_key_file=str(tmp_path / "key"))
        sample_prompts(more)
        assert server.keys == {"Bearer sk-secret-1", "Bearer sk-secret-2"}
        server.trouble = lambda number, body: "unauthorized"
        with pytest.raises(SourceError, match=r"wrong key Bearer \*\*\*.*`api_key_env`"):
            sample_prompts(config(prompts, tmp_path / "other", server, api_key_env="THE_KEY"))
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and file.name != "key")
    printed = "".join(capfd.readouterr())
    assert b"sk-secret" not in written
    assert "sk-secret" not in printed


def test_a_newline_behind_a_key_is_dropped_and_what_no_header_takes_is_refused_at_once(prompts, tmp_path, monkeypatch):
    with running() as server:
        monkeypatch.setenv("THE_KEY", " sk-secret-1\n")
        sample_prompts(config(prompts, tmp_path / "out", server, n=1, api_key_env="THE_KEY"))
        assert server.keys == {"Bearer sk-secret-1"}
        for key in ("sk-secret\nsk-other", "sk secret", "sk-s\u00e9cret"):
            monkeypatch.setenv("THE_KEY", key)
            with pytest.raises(ConfigError, match="environment variable 'THE_KEY': expected one key") as refusal:
                sample_prompts(config(prompts, tmp_path / "other", server, api_key_env="THE_KEY"))
            assert "cret" not in str(refusal.value)
        (tmp_path / "key").write_bytes(b"sk-secret\xff")
        with pytest.raises(ConfigError, match="bytes that are not UTF-8"):
            sample_prompts(config(prompts, tmp_path / "other", server, api_key_file=str(tmp_path / "key")))


def test_settings_that_a_server_decides_are_refused_when_it_samples(prompts, tmp_path):
    for name, value in (("dtype", "float16"), ("revision", "main"), ("chat_template", "x.jinja"), ("max_length", 9)):
        with pytest.raises(ConfigError, match=f"{name} cannot be chosen here when a server samples"):
            sample_prompts(config(prompts, tmp_path / "out", "http://127.0.0.1:9/v1", source={name: value}))


def test_rows_carry_no_seed_that_was_not_sent(prompts, tmp_path):
    with running() as server:
        sample_prompts(config(prompts, tmp_path / "out", server, n=1, send_seed=False))
        sample_prompts(config(prompts, tmp_path / "seeded", server, n=1))
    assert {row["seed"] for row in open_rows(tmp_path / "out")} == {None}
    assert {row["seed"] for row in open_rows(tmp_path / "seeded")} == {
        body.get("seed") for body in server.requests[12:]
    }


def test_more_fields_of_the_request_are_part_of_the_fingerprint(prompts, tmp_path):
    with running() as server:
        sample_prompts(config(prompts, tmp_path / "out", server))
        with pytest.raises(MismatchError, match="source 'remote' with the sampling fingerprint"):
            sample_prompts(config(prompts, tmp_path / "out", server, extra_body={"min_p": 0.2}))


def test_keys_in_the_configuration_are_refused_without_being_repeated(prompts, tmp_path):
    secret = "-".join(["sk", "secret"])  # a traceback repeats the lines of this file
    with pytest.raises(ConfigError, match="api_key: unknown key") as refusal:
        sample_prompts(config(prompts, tmp_path / "out", "http://h/v1", api_key=secret))
    assert "sk-secret" not in "".join(traceback.format_exception(refusal.value))
    entry = {"model": "m", "preset": "none", "options": {"base_url": "http://h/v1", "api_key": secret}}
    with pytest.raises(ConfigError, match="expected one of the presets .*, got 'none'") as refusal:
        validate(SampleConfig, {"prompts": "p", "out": "o", "sources": [entry]}, where="here")
    assert "sk-secret" not in "".join(traceback.format_exception(refusal.value))
    with pytest.raises(ConfigError, match="carries a user name, a password or a query") as refusal:
        sample_prompts(config(prompts, tmp_path / "out", "http://me:sk-secret@h/v1"))
    assert "sk-secret" not in str(refusal.value)
    with pytest.raises(ConfigError, match="expected a base_url such as"):
        sample_prompts(config(prompts, tmp_path / "out", "localhost:8000"))


def test_capture_is_refused_where_it_cannot_work(tmp_path):
    model = source_checks.checkpoint(tmp_path / "model")
    texts = source_checks.texts(tmp_path / "texts.jsonl")

    def capture(server, **changes):
        values = {"model": "served", "backend": "openai", "options": {"base_url": server.url}, "tokenizer": str(model)}
        capture_texts(CaptureConfig(**(values | {"texts": str(texts), "out": str(tmp_path / "store")} | changes)))

    with running() as server:
        with pytest.raises(SourceError, match="gives no prompt_logprobs: capture needs vLLM's server"):
            capture(server)
        with pytest.raises(ConfigError, match="needs `tokenizer`"):
            capture(server, tokenizer=None)
        server.tokenize = lambda text: tiny.digit_splitting()(text)["input_ids"]
        with pytest.raises(SourceError, match="with another tokenizer than"):
            capture(server)


@pytest.mark.slow
def test_an_independent_server_answers(prompts, tmp_path):
    """``transformers serve``: its greedy answers are those of the transformers backend."""
    model = source_checks.checkpoint(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(model), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=environment, stdout=log, stderr=log
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, tmp_path / "log")
        greedy = {"model": str(model), "temperature": 0, "max_tokens": 6}
        settings = config(prompts, tmp_path / "out", f"http://127.0.0.1:{port}/v1", n=1, source=greedy, concurrency=2)
        sample_prompts(settings)
    finally:
        process.terminate()
        process.wait()
    local = {"name": "remote", "model": str(model), "temperature": 0, "max_tokens": 6}
    sample_prompts(SampleConfig(prompts=str(prompts), out=str(tmp_path / "local"), n=1, sources=[local]))
    assert responses(tmp_path / "out") == responses(tmp_path / "local")


def wait_for(url, process, log, seconds=240):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(0.5 + random.random() / 10)
    raise AssertionError(f"{url} did not answer in {seconds} s: {log.read_text()[-2000:]}")
