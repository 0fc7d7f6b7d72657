"""The HTTP client: total time, size, redirects, and whatever bytes a server sends."""

import asyncio
import time
from threading import Event, Thread

import pytest
import source_checks
from fake_server import running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_checks import responses
from source_checks import server_config as config

from fusion_plugins.errors import FusionError, SourceError
from fusion_plugins.sources.backends.base import Refusal, Response, SampleRequest, Sampling, SourceSettings, open_source
from fusion_plugins.sources.backends.http import HttpClient, NoAnswer
from fusion_plugins.sources.sample import sample_prompts


@pytest.fixture
def prompts(tmp_path):
    return source_checks.prompts(tmp_path / "prompts.jsonl", 3)


@pytest.mark.parametrize("trouble", ["dripping", "dripping_headers", "hangs", "endless", "compressed"])
def test_an_answer_has_a_total_time_and_a_size(prompts, tmp_path, trouble):
    """One prompt never gets a proper answer; the others are kept, and the run ends in time."""
    wrong = lambda number, body: trouble if "1 + 30" in body["messages"][-1]["content"] else None  # noqa: E731
    started = time.monotonic()
    with running(wrong) as server:
        settings = config(prompts, tmp_path / "out", server, n=1, timeout=0.6, patience=0.5)
        report = sample_prompts(settings.model_copy(update={"on_unusable": "skip"}))
    assert list(report.skipped) == [("remote", "p1")]
    assert time.monotonic() - started < 15
    assert len(responses(tmp_path / "out")) == 2
    expected = {"endless": "at most .* MiB", "compressed": "not compressed"}.get(
        trouble, "no whole answer within 0.6 s"
    )
    with running(lambda number, body: trouble) as server:
        client = HttpClient(server.url, "", 0.6 if trouble not in expected else 20.0)
        with pytest.raises(NoAnswer, match=expected):
            client.post(server.url + "/completions", {"prompt": "a"})
        client.close()
        with pytest.raises(NoAnswer, match="the client is closed|connection was closed"):
            client.post(server.url + "/completions", {"prompt": "a"}, seconds=0.1)


def test_a_request_that_comes_while_the_client_is_being_closed_ends_too():
    closing, errors = Event(), []

    def ask(client: HttpClient) -> None:
        try:
            client.post(client.base_url + "/completions", {"prompt": "a"})
        except NoAnswer as error:
            errors.append(str(error))

    with running(lambda number, body: "hangs") as server:
        client = HttpClient(server.url, "", 600.0)
        close = client._client.aclose

        async def close_slowly() -> None:
            closing.set()
            await asyncio.sleep(0.5)
            await close()

        client._client.aclose = close_slowly
        threads = [Thread(target=ask, args=(client,), daemon=True) for _ in range(2)]
        threads[0].start()
        time.sleep(0.2)
        client.close()
        assert closing.wait(10)
        threads[1].start()
        for thread in threads:
            thread.join(10)
        assert sorted(errors) == ["the client is closed", "the connection was closed"]
        assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_prompts_are_not_sent_where_a_redirect_leads(prompts, tmp_path, status):
    with running() as other, running(lambda number, body: "moved") as server:
        server.elsewhere, server.moved_status = f"{other.url}/chat/completions", status
        with pytest.raises(SourceError, match=f"status {status}.*Redirects are not followed.*`base_url`"):
            sample_prompts(config(prompts, tmp_path / "out", server, n=1))
        assert other.requests == []


@pytest.fixture(scope="module")
def asked():
    """A server, and a source on it that gives up at once."""
    with running(lambda number, body: "anything") as server:
        options = {"base_url": server.url, "patience": 0.01, "timeout": 2.0, "rest_after": 10**6}
        source = open_source(SourceSettings(model="served", backend="openai", options=options), "sample")
        yield server, source
        source.close()


HEADS = st.sampled_from(
    [
        b"",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\n\r\n",
        b"HTTP/1.1 429 \xff\r\nretry-after: nan\r\n\r\n",
        b"HTTP/1.1 400 No\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nlocation: http://\xff/\r\n\r\n",
        b"HTTP/9.9 999\r\n\r\n",
    ]
)
BODIES = st.binary(max_size=60) | st.sampled_from(
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"1" * 5000,
        b'{"choices": [{"text": "\\ud83d", "finish_reason": "stop"}]}',
        b'{"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"completion_tokens": 1e999}}',
        b'\xef\xbb\xbf{"choices": [{"text": "a", "finish_reason": "stop"}]}',
        '{"choices": [{"text": "a", "finish_reason": "stop"}]}'.encode("utf-16"),
        b'{"choices": [{"text": "\xff", "finish_reason": "stop"}]}',
        b"null",
    ]
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(head=HEADS, body=BODIES)
def test_any_bytes_of_a_server_are_a_response_a_refusal_or_an_error_of_ours(asked, head, body):
    server, source = asked
    server.raw = head + body
    # The pool stops at an error, as a run does; here it is asked again.
    pool = source._pool
    pool._stopped.clear()
    pool.stop, stop = lambda: None, pool.stop
    try:
        ((_, found),) = source.sample([[SampleRequest("a", Sampling(template="plain"), 0)]])
    except FusionError as error:
        str(error).encode()
    else:
        assert isinstance(found, Response | Refusal)
        (found.text if isinstance(found, Response) else found.reason).encode()
    finally:
        pool.stop = stop


MODELS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.text(max_size=5)
    | st.sampled_from(["served", "vllm"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["data", "id", "owned_by", "max_model_len", "version"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(models=MODELS, version=MODELS)
def test_whatever_a_server_says_of_its_models_a_source_opens(asked, models, version):
    server, _ = asked
    server.models, server.version = models, version
    settings = SourceSettings(model="served", backend="openai", options={"base_url": server.url})
    source = open_source(settings, "sample")
    assert source.max_length is None or source.max_length > 0
    assert source.facts["engine_version"].isprintable()
    source.close()
