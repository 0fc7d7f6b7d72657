"""Ray Data on a local cluster, for real: the same store and the same responses, also when an actor dies."""

import os
import signal
import threading
import time

import numpy as np
import psutil
import pytest
import source_checks

from fusion_plugins.errors import ConfigError
from fusion_plugins.sources.backends.base import SampleRequest, Sampling, SourceSettings, open_source
from fusion_plugins.sources.batches import LazyBatches
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.sources.sample import sample_prompts
from fusion_plugins.sources.sample_config import SampleConfig
from fusion_plugins.store import open_rows, open_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """One cluster for the module; a source that finds one running uses it and leaves it running."""
    from fusion_plugins.sources.backends import ray_data

    ray_data.connect(None)
    yield
    ray_data.ray.shutdown()


def kill_an_actor() -> bool:
    for process in psutil.Process().children(recursive=True):
        if "MapWorker" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            return True
    return False


def test_actors_fill_the_same_store_and_one_that_dies_is_replaced(model, cluster, tmp_path):
    texts = source_checks.texts(tmp_path / "texts.jsonl", repeat=12)
    common = {"model": str(model), "texts": str(texts), "top_k": 8, "batch_bytes": 700}
    settings = CaptureConfig(**common, backend="ray", out=str(tmp_path / "ray"), options={"actors": 2})
    killed = []

    def kill_after_the_first_shard():
        while not list((tmp_path / "ray").glob("shard-*")):
            time.sleep(0.01)
        killed.append(kill_an_actor())

    killer = threading.Thread(target=kill_after_the_first_shard, daemon=True)
    killer.start()
    capture_texts(settings)
    killer.join(timeout=60)
    assert killed == [True]
    capture_texts(CaptureConfig(**common, out=str(tmp_path / "plain")))
    ours, plain = open_store(tmp_path / "ray"), open_store(tmp_path / "plain")
    assert ours.manifest.engine == "ray:transformers"
    assert ours.manifest.identity() == plain.manifest.identity()
    assert source_checks.contents(ours) == source_checks.contents(plain)


def test_actors_draw_the_same_responses(model, cluster, tmp_path):
    prompts = source_checks.prompts(tmp_path / "prompts.jsonl")
    for name, backend in (("ray", "ray"), ("plain", "transformers")):
        entry = {"name": "s", "model": str(model), "backend": backend, "max_tokens": 6}
        sample_prompts(
            SampleConfig(prompts=str(prompts), out=str(tmp_path / name), n=2, sources=[entry], batch_requests=5)
        )
    ray, plain = (
        {key: rows[key] for key in rows.keys()} for rows in map(open_rows, (tmp_path / "ray", tmp_path / "plain"))
    )
    # An actor may compute with another number of threads, which changes the last bits.
    said, expected = ({key: row.pop("token_logprobs") for key, row in rows.items()} for rows in (ray, plain))
    assert ray == plain
    assert len(ray) == 12
    for key, values in expected.items():
        np.testing.assert_allclose(said[key], values, rtol=1e-5)


def test_an_error_in_an_actor_keeps_its_name_and_its_message(model, cluster):
    source = open_source(SourceSettings(model=str(model), backend="ray"), "sample")
    plain = Sampling(template="plain", max_tokens=1)
    with pytest.raises(ConfigError, match="template 'plain' takes prompts with 'text'"):
        list(source.sample([[SampleRequest([{"role": "user", "content": "hi"}], plain, 0)]]))


def test_only_a_few_batches_are_made_before_their_turn(model, cluster):
    """However large the corpus is, the driver holds the batches under way and no others."""
    from fusion_plugins.sources.backends import ray_data

    made = []

    def request(number, batch):
        made.append(number)
        return [SampleRequest("The quick", Sampling(max_tokens=1, template="plain"), number)]

    source = open_source(SourceSettings(model=str(model), backend="ray"), "sample")
    done = []
    for (number, _), _ in source.sample(LazyBatches(40, [[0]] * 40, request)):
        done.append(number)
        assert len(made) <= len(done) + ray_data.BATCHES_PER_ACTOR + 1, "one is made ahead"
    assert sorted(done) == list(range(40))


def test_wrong_options_are_refused_before_a_cluster_is_started(model):
    settings = SourceSettings(model=str(model), backend="ray", options={"actor": 2})
    with pytest.raises(ConfigError, match="actor: unknown key; known keys: actors, address, backend"):
        open_source(settings, "capture")
