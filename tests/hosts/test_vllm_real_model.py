"""A real model gives the same log-probabilities in vLLM as in transformers."""

import os

import numpy as np
import pytest
import real_assets
import source_checks
import tiny
import vllm_checks

from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.store import open_store

pytestmark = [pytest.mark.vllm, pytest.mark.real, pytest.mark.slow]
#: nats, in float32 on the CPU, for entries of 1e-4 and more
TOLERANCE = 0.01


def test_vllm_and_transformers_give_a_real_model_the_same_log_probabilities(tmp_path):
    os.environ.update(vllm_checks.ENVIRONMENT)
    rows = [{"id": str(index), "text": text} for index, text in enumerate(tiny.TEXTS)]
    path = source_checks.write_rows(tmp_path / "texts.jsonl", rows)
    engine = {"options": {"engine": vllm_checks.ENGINE}, "max_length": 256}
    for backend, options in (("transformers", {}), ("vllm", engine)):
        model, out = real_assets.model_folder(), tmp_path / backend
        capture_texts(source_checks.capture_config(model, path, out, top_k=32, backend=backend, **options))
    stores = [open_store(tmp_path / backend) for backend in ("transformers", "vllm")]
    for one, other in zip(*stores, strict=True):
        np.testing.assert_array_equal(one.text.input_ids, other.text.input_ids)
        np.testing.assert_allclose(
            other.topk.token_logprobs[:-1], one.topk.token_logprobs[:-1], rtol=2e-3, atol=TOLERANCE
        )
        assert other.ce_per_token == pytest.approx(one.ce_per_token, abs=TOLERANCE)
        for ids, logprobs, other_ids, other_logprobs in zip(
            one.topk.ids[:-1], one.topk.logprobs[:-1], other.topk.ids[:-1], other.topk.logprobs[:-1], strict=True
        ):
            found = dict(zip(other_ids.tolist(), other_logprobs.tolist(), strict=True))
            for token, logprob in zip(ids[:16].tolist(), logprobs[:16].tolist(), strict=True):
                if logprob > np.log(1e-4):
                    assert found[token] == pytest.approx(logprob, abs=TOLERANCE)
