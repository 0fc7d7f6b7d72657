"""Rewards of the real vLLM, offline and through its server, held against those of transformers."""

import os
import random

import pytest
import tiny
import vllm_checks

from fusion_plugins.errors import ScoringError
from fusion_plugins.scoring.reward import RewardScorer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

#: largest difference of a reward in float32; the rewards of the tiny model have a range of about 10
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # vLLM's attention on a CPU takes heads of 32 and more.
    folder = tmp_path_factory.mktemp("reward") / "model"
    return tiny.trained_reward_checkpoint(folder, hidden_size=64, num_attention_heads=2, intermediate_size=96)


@pytest.fixture(scope="module")
def expected(model):
    return [score.reward for score in RewardScorer(model=model).score(rows())]


def rows(count=30):
    draw = random.Random(0)
    words = tiny.TEXTS[3].split()
    return [
        {"prompt": f"Question {n}?", "response": " ".join(draw.choices(words, k=draw.randint(1, 30)))}
        for n in range(count)
    ]


def test_the_offline_engine_gives_the_raw_rewards_of_transformers(model, expected):
    os.environ.update(vllm_checks.ENVIRONMENT)
    scorer = RewardScorer(model=model, backend="vllm", options={"engine": vllm_checks.ENGINE})
    try:
        found = scorer.score([*rows(), {"prompt": "Hi?", "response": "Hi. " * 200}])
        assert [score.reward for score in found[:-1]] == pytest.approx(expected, abs=TOLERANCE)
        assert found[-1].reason == "longer than 256 tokens"
        # A sigmoid would keep them between 0 and 1.
        assert min(expected) < 0
        assert scorer.facts["vllm"]
    finally:
        scorer.close()


def test_a_language_model_is_no_reward_model(tmp_path):
    os.environ.update(vllm_checks.ENVIRONMENT)
    folder = tiny.llama_checkpoint(tmp_path / "language_model")
    with pytest.raises(ScoringError, match="expected a sequence-classification model|vLLM cannot start"):
        RewardScorer(model=str(folder), backend="vllm", options={"engine": vllm_checks.ENGINE})


def test_its_server_gives_the_raw_rewards_of_transformers(model, expected, tmp_path):
    os.environ.update(vllm_checks.ENVIRONMENT)
    server = vllm_checks.Server(model, tmp_path / "log", "--runner", "pooling")
    server.start()
    try:
        server.wait()
        for endpoint in ("classify", "pooling"):
            # With and without /v1: both are at hand for users of the OpenAI-compatible endpoints.
            url = server.url if endpoint == "classify" else server.url.removesuffix("/v1")
            options = {"base_url": url, "endpoint": endpoint, "served_name": "served"}
            scorer = RewardScorer(model=model, backend="server", options=options)
            found = scorer.score([*rows(), {"prompt": "Hi?", "response": "Hi. " * 200}])
            assert [score.reward for score in found[:-1]] == pytest.approx(expected, abs=TOLERANCE)
            assert found[-1].reason == "longer than 256 tokens"
            scorer.close()
    finally:
        server.kill()
