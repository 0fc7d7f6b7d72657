"""vLLM's own server on this machine: capture, sampling, and a restart in the middle."""

import os
import threading
import time

import numpy as np
import pytest
import source_checks
import vllm_checks

from fusion_plugins.errors import SourceError
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.sources.sample import sample_prompts
from fusion_plugins.sources.sample_config import SampleConfig
from fusion_plugins.store import open_rows, open_store

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return vllm_checks.checkpoint(tmp_path_factory.mktemp("models") / "padded")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    os.environ.update(vllm_checks.ENVIRONMENT)
    made = vllm_checks.Server(model, tmp_path_factory.mktemp("server") / "log")
    made.start()
    made.wait()
    yield made
    made.kill()


def remote(server, model, **options):
    options = {"base_url": server.url, "concurrency": 4, "rest_seconds": 0.5} | options
    return {"model": "served", "backend": "openai", "tokenizer": str(model), "dtype": "float32", "options": options}


def test_a_server_fills_the_same_store_as_transformers(model, server, tmp_path):
    texts = source_checks.texts(tmp_path / "texts.jsonl")
    common = {"texts": str(texts), "top_k": 16}
    capture_texts(CaptureConfig(**remote(server, model), **common, out=str(tmp_path / "remote")))
    capture_texts(CaptureConfig(model=str(model), **common, out=str(tmp_path / "local")))
    ours, reference = open_store(tmp_path / "remote"), open_store(tmp_path / "local")
    assert ours.manifest.logits_width == reference.manifest.logits_width
    assert "vllm" in ours.manifest.engine_version
    for record, expected in zip(ours, reference, strict=True):
        np.testing.assert_array_equal(record.text.input_ids, expected.text.input_ids)
        np.testing.assert_allclose(record.topk.logprobs, expected.topk.logprobs, rtol=1.5e-3, atol=1e-3)
        np.testing.assert_allclose(record.topk.token_logprobs, expected.topk.token_logprobs, rtol=1.5e-3, atol=1e-3)
        assert (record.topk.ids != expected.topk.ids).mean() < 0.02


@pytest.mark.parametrize("written", [{}, {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "temperature": 1.0}])
def test_the_models_own_generation_config_is_not_used(model, server, tmp_path, written):
    """The server applies it where a request says nothing (top_k 1): all answers to a prompt would be the same."""
    prompts = source_checks.prompts(tmp_path / "prompts.jsonl", 3)
    entry = remote(server, model) | {"name": "s", "max_tokens": 8, **written}
    del entry["dtype"]
    sample_prompts(SampleConfig(prompts=str(prompts), out=str(tmp_path / "rows"), n=6, sources=[entry]))
    answers: dict[str, set[str]] = {}
    for row in open_rows(tmp_path / "rows"):
        answers.setdefault(row["prompt_id"], set()).add(row["response"])
    assert all(len(found) > 1 for found in answers.values())


def test_another_tokenizer_than_the_servers_is_refused(model, server, tmp_path):
    other = source_checks.checkpoint(tmp_path / "other")
    texts = source_checks.texts(tmp_path / "texts.jsonl")
    with pytest.raises(SourceError, match="with another tokenizer than"):
        capture_texts(CaptureConfig(**remote(server, other), texts=str(texts), out=str(tmp_path / "store")))


def test_a_run_outlives_a_restart_of_its_server(model, server, tmp_path):
    """Both kinds of run are under way when the server is killed; both end as an undisturbed run does."""
    prompts = source_checks.prompts(tmp_path / "prompts.jsonl", 12)
    texts = source_checks.texts(tmp_path / "texts.jsonl", repeat=12)
    entry = remote(server, model, patience=600.0) | {"name": "s", "temperature": 0, "max_tokens": 120}
    del entry["dtype"]  # the server's own when it samples
    jobs = {
        "sample": lambda: sample_prompts(
            SampleConfig(prompts=str(prompts), out=str(tmp_path / "rows"), n=3, sources=[entry], batch_requests=4)
        ),
        "capture": lambda: capture_texts(
            CaptureConfig(
                **remote(server, model, patience=600.0),
                texts=str(texts),
                out=str(tmp_path / "store"),
                top_k=8,
                batch_bytes=400,
            )
        ),
    }
    errors: list[BaseException] = []

    def run(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = {name: threading.Thread(target=run, args=(job,), daemon=True) for name, job in jobs.items()}
    for name, folder in (("sample", "rows"), ("capture", "store")):
        threads[name].start()
        while not list((tmp_path / folder).glob("shard-*")):
            time.sleep(0.005)
            assert threads[name].is_alive(), errors
    server.kill()
    done = len(open_rows(tmp_path / "rows")), len(open_store(tmp_path / "store"))
    server.start()
    server.wait()
    for thread in threads.values():
        thread.join(timeout=300)
        assert not thread.is_alive()
    assert not errors
    assert done < (36, 120)
    assert len(set(open_rows(tmp_path / "rows").keys())) == len(open_rows(tmp_path / "rows")) == 36
    answers: dict[str, set[str]] = {}
    for row in open_rows(tmp_path / "rows"):
        answers.setdefault(row["prompt_id"], set()).add(row["response"])
    # Greedy answers to one prompt are the same before and after, unless two probabilities are as good as equal.
    assert np.mean([len(texts) == 1 for texts in answers.values()]) > 0.6
    capture_texts(CaptureConfig(model=str(model), texts=str(texts), out=str(tmp_path / "whole"), top_k=8))
    resumed, whole = open_store(tmp_path / "store"), open_store(tmp_path / "whole")
    assert sorted(resumed.ids()) == sorted(whole.ids())
    for record in resumed:
        np.testing.assert_allclose(
            record.topk.token_logprobs, whole[record.id].topk.token_logprobs, rtol=1.5e-3, atol=1e-3
        )
