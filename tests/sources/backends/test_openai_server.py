"""Servers as sources: requests, answers that fail on the way, and a second independent server."""

import json
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
from datetime import date
from pathlib import Path

import pytest
import source_checks
import tiny
from fake_server import running
from source_checks import responses
from source_checks import server_config as config

from fusion_plugins.config import validate
from fusion_plugins.errors import ConfigError, MismatchError, SourceError
from fusion_plugins.scoring.judge import CUT, UNREADABLE, JudgeScorer
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.sources.sample import sample_prompts
from fusion_plugins.sources.sample_config import SampleConfig
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


@pytest.mark.parametrize(
    "written",
    [
        {"top_k": 0, "repetition_penalty": 1.0},
        {"top_k": -1},
        {"min_p": 0.0, "stop": []},
        {"temperature": 1.0, "top_p": 1, "repetition_penalty": 1},
        {"preset": "fusechat3-qwen-2.5-72b", "repetition_penalty": 1.0},
    ],
)
def test_what_is_written_is_sent_also_where_it_is_the_default(prompts, tmp_path, written):
    """Otherwise a server that applies the model's own generation config would use that one's values."""
    with running() as server:
        sample_prompts(config(prompts, tmp_path / "out", server, n=1, source=written))
    sent = written.items() - {("preset", "fusechat3-qwen-2.5-72b")} if "stop" not in written else written.items()
    assert all(
        sent <= request.items() if "stop" not in written else request["stop"] == [] for request in server.requests
    )


@pytest.mark.parametrize("owner", ["vllm", "sglang"])
def test_servers_that_know_all_settings_are_told_all_of_them(prompts, tmp_path, owner):
    with running() as server:
        server.models = {"data": [{"id": "served", "owned_by": owner}]}
        sample_prompts(config(prompts, tmp_path / "out", server, n=1, source={"top_p": 0.9}))
        sample_prompts(config(prompts, tmp_path / "limited", server, n=1, source={"top_k": 7}))
    assert {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "top_p": 0.9}.items() <= server.requests[0].items()
    assert server.requests[-1]["top_k"] == 7


def test_a_setting_in_two_places_or_without_effect_is_refused(prompts, tmp_path):
    with running() as server:
        with pytest.raises(ConfigError, match="top_k is set both for the source and in extra_body"):
            sample_prompts(
                config(prompts, tmp_path / "out", server, source={"top_k": 0}, extra_body={"top_k": 20, "min_p": 0.1})
            )
        for field in ("stream", "n", "messages", "model"):
            with pytest.raises(ConfigError, match=f"further fields of a request, got {field}, which we set"):
                sample_prompts(config(prompts, tmp_path / "out", server, extra_body={field: 2}))
        for value in (float("nan"), {1, 2}, b"x"):
            with pytest.raises(ConfigError, match="extra_body: expected values that JSON can write"):
                sample_prompts(config(prompts, tmp_path / "out", server, extra_body={"logit_bias": value}))
        values = {"model": "served", "backend": "openai", "texts": str(prompts), "out": str(tmp_path / "store")}
        options = {"base_url": server.url, "extra_body": {"top_k": 5}}
        with pytest.raises(ConfigError, match="extra_body is for sampling, and a capture does not send it"):
            capture_texts(CaptureConfig(**values, options=options, tokenizer=str(tiny_tokenizer(tmp_path))))
        assert server.requests == []


def tiny_tokenizer(folder):
    tiny.byte_level().save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def test_arguments_of_the_chat_template_are_sent_with_chats(prompts, tmp_path):
    options = {"chat_template_kwargs": {"enable_thinking": False, "day": date(2026, 1, 2)}}
    with running() as server:
        sample_prompts(config(prompts, tmp_path / "out", server, n=1, source=options))
        with pytest.raises(MismatchError, match="sampling fingerprint"):
            sample_prompts(config(prompts, tmp_path / "out", server, n=1))
    assert {json.dumps(request["chat_template_kwargs"]) for request in server.requests} == {
        '{"enable_thinking": false, "day": "2026-01-02"}'
    }


def test_answers_that_end_for_good_cost_one_request_each(prompts, tmp_path):
    """Their prompts are named and left out; those with other names for a complete answer are kept."""
    ends = {"0": "tool_calls", "1": "end_turn", "2": "STOP", "3": "SAFETY", "4": "MAX_TOKENS", "5": "unheard_of"}

    def trouble(number, body):
        number = body["messages"][-1]["content"].split()[2]
        message = {"content": "half \ud83d", "reasoning_content": "hm" if number == "1" else None}
        if number == "0":
            message = {"content": None, "tool_calls": [{"function": {"name": "look_up", "arguments": "{}"}}]}
        server.choice = {"message": message, "finish_reason": ends.get(number, "stop")}
        server.usage = {"completion_tokens": 10**30 if number == "7" else 5}
        return "chosen"

    with running(trouble) as server:
        settings = config(prompts, tmp_path / "out", server, n=1, concurrency=1, patience=900.0)
        with pytest.raises(
            SourceError, match="prompt 'p0', source 'remote': .*call of a tool.*look_up.*on_unusable: skip"
        ):
            sample_prompts(settings)
        report = sample_prompts(settings.model_copy(update={"on_unusable": "skip"}))
    assert {prompt for _, prompt in report.skipped} == {"p0", "p3", "p5"}
    assert "withheld or cut" in report.skipped["remote", "p3"]
    assert (report.drawn, report.repaired) == (9, 9)
    assert len(server.requests) == 13
    rows = {row["prompt_id"]: row for row in open_rows(tmp_path / "out")}
    assert rows["p1"]["response"] == "<think>\nhm\n</think>\n\nhalf \ufffd"
    assert {rows[name]["finish_reason"] for name in ("p1", "p2")} == {"stop"}
    assert rows["p4"]["finish_reason"] == "length"
    assert (rows["p7"]["n_tokens"], rows["p6"]["n_tokens"]) == (0, 5)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:sk-secret@h/v1",
        "ftp://me:sk-secret@h/v1",
        "me:sk-secret@h/v1",
        "sk-secret@h/v1",
        "//sk-secret@h:8000/v1",
        "HTTP:me:sk-secret@h",
        "http://me:sk-se/cr et@h@host/v1",
        "http://h/v1?key=sk-secret",
        "h/v1#sk-secret",
        "http://me:sk-secret@[::1/v1",
        "http://me:sk-secret@h:99999999/v1",
        "unix:///me:sk-secret@h",
    ],
)
def test_a_url_with_a_key_in_it_is_refused_and_never_printed_whole(prompts, tmp_path, url):
    for urls in (url, ["http://h/v1", url], [url, 5]):
        settings = config(prompts, tmp_path / "out")
        settings.sources[0].options["base_url"] = urls
        with pytest.raises(ConfigError) as refusal:
            sample_prompts(settings)
        assert "sk-se" not in "".join(traceback.format_exception(refusal.value)).replace(repr(url), "")
        assert "sk-se" not in str(refusal.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://", "http:///v1", "http://h:port/v1", "http://exa mple/v1", [], ""]
)
def test_what_is_no_url_is_refused(prompts, tmp_path, url):
    settings = config(prompts, tmp_path / "out")
    settings.sources[0].options["base_url"] = url
    with pytest.raises(ConfigError, match="base_url"):
        sample_prompts(settings)


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
        # The same server as a judge; a model that was not trained says nothing that can be read.
        judge = JudgeScorer(model=str(model), max_tokens=6, options={"base_url": f"http://127.0.0.1:{port}/v1"})
        judged = judge.score([{"prompt_id": "p", "prompt": "2 + 3?", "response": text} for text in ("5", "6")])
        assert all(score.reward is None and score.reason in (UNREADABLE, CUT) for score in judged)
        assert all(score.details["judgement"] for score in judged)
        judge.close()
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
