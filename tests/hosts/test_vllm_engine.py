"""vLLM's offline engine, for real, on the CPU; its answers are held against those of transformers."""

import os
import sys

import numpy as np
import pytest
import source_checks
import tiny
import vllm_checks

from fusion_plugins.core.fusion.asked import AskedText
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.errors import ConfigError, DataError, SourceError
from fusion_plugins.sources import capture, sample
from fusion_plugins.sources.backends import base
from fusion_plugins.sources.backends.base import SampleRequest, Sampling, SourceSettings
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.sources.sample import sample_prompts
from fusion_plugins.sources.sample_config import SampleConfig
from fusion_plugins.store import open_rows, open_store

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return vllm_checks.checkpoint(tmp_path_factory.mktemp("models") / "padded")


class Engines:
    """Starts an engine when it is first asked for; at most one lives at a time."""

    def __init__(self, model):
        os.environ.update(vllm_checks.ENVIRONMENT)
        self.model, self.purpose, self.source = model, None, None

    def get(self, purpose):
        if purpose != self.purpose:
            self.close()
            # So little room for logits that 64 tokens are scheduled at a time: long texts come in chunks.
            options = {"logits_gib": 1e-6, "engine": vllm_checks.ENGINE}
            settings = SourceSettings(model=str(self.model), backend="vllm", options=options)
            self.source, self.purpose = base.open_source(settings, purpose), purpose
        return self.source

    def close(self):
        if self.source is not None:
            self.source.close()


@pytest.fixture(scope="module")
def engines(model):
    made = Engines(model)
    yield made
    made.close()


@pytest.fixture
def shared(engines, monkeypatch):
    """Let capture and sample use the engine that runs already."""

    class Shared:
        def __init__(self, source):
            self._source = source

        def __getattr__(self, name):
            return getattr(self._source, name)

        def close(self):
            pass

    for module in (capture, sample):
        opened = module.open_source
        monkeypatch.setattr(
            module,
            "open_source",
            lambda s, p, opened=opened: Shared(engines.get(p)) if s.backend == "vllm" else opened(s, p),
        )


def captured(model, texts, out, backend, **changes):
    capture_texts(
        CaptureConfig(**({"model": str(model), "texts": str(texts), "out": str(out), "backend": backend} | changes))
    )
    return open_store(out)


@pytest.mark.parametrize("kind", ["texts", "chats"])
@pytest.mark.parametrize("top_k", [16, "all"])
def test_vllm_and_transformers_fill_the_same_store(model, shared, tmp_path, kind, top_k):
    texts = getattr(source_checks, kind)(tmp_path / "texts.jsonl")
    ours = captured(model, texts, tmp_path / "vllm", "vllm", top_k=top_k)
    reference = captured(model, texts, tmp_path / "transformers", "transformers", top_k=top_k)
    assert ours.manifest.engine == "vllm"
    same = {"tokenizer_fingerprint", "vocab_size", "logits_width", "top_k", "dtype", "texts_fingerprint", "revision"}
    assert ours.manifest.model_dump(include=same) == reference.manifest.model_dump(include=same)
    assert max(len(record.text.input_ids) for record in ours) > 64
    for record, expected in zip(ours, reference, strict=True):
        np.testing.assert_array_equal(record.text.input_ids, expected.text.input_ids)
        np.testing.assert_allclose(record.topk.logprobs, expected.topk.logprobs, rtol=1.5e-3, atol=1e-3)
        np.testing.assert_allclose(record.topk.token_logprobs, expected.topk.token_logprobs, rtol=1.5e-3, atol=1e-3)
        np.testing.assert_allclose(record.tail, expected.tail, rtol=1e-2, atol=1e-3)
        assert record.ce_per_byte == pytest.approx(expected.ce_per_byte, rel=1e-3, nan_ok=True)
        # Ids may swap where two probabilities are the same in float16, and nowhere else.
        differ = record.topk.ids != expected.topk.ids
        assert differ.mean() < 0.02
        assert record.topk.ids.max() < ours.manifest.vocab_size


def test_a_source_is_asked_for_the_targets_ids_or_says_that_it_cannot_be_asked(model, shared, engines, tmp_path):
    texts = source_checks.texts(tmp_path / "texts.jsonl")
    captured(model, texts, tmp_path / "target", "transformers", top_k=5)
    asked = {"top_k": 4, "ask_ids": str(tmp_path / "target")}
    if not engines.get("capture").asks_ids:
        with pytest.raises(ConfigError, match="got vllm .*prompt_logprob_token_ids"):
            captured(model, texts, tmp_path / "vllm", "vllm", **asked)
        return
    ours = captured(model, texts, tmp_path / "vllm", "vllm", **asked)
    for record, expected in zip(ours, captured(model, texts, tmp_path / "own", "transformers", **asked), strict=True):
        np.testing.assert_allclose(record.topk.logprobs, expected.topk.logprobs, rtol=1.5e-3, atol=1e-3)
    # A text of one token has no position to be asked about.
    none, ids = np.zeros(1, np.int32), np.array([[3, -1]], np.int32)
    alone = AskedText(np.array([5], np.int32), none, np.zeros((0, 2), np.int32), np.ones(1, bool), ids)
    [(_, topk)] = engines.get("capture").capture([[alone]], 4)
    assert topk.ids.tolist() == [[-1] * 6]


def test_nothing_of_the_training_hosts_is_imported(engines):
    engines.get("capture")
    assert not {"axolotl", "trl", "deepspeed", "mergekit"} & set(sys.modules)


def test_a_text_longer_than_the_context_is_refused_before_anything_runs(model, shared, tmp_path):
    texts = source_checks.write_rows(tmp_path / "t.jsonl", [{"id": "long", "text": "\u00df" * 300}])
    with pytest.raises(DataError, match="text 'long': expected at most 255 tokens of source 'padded', got"):
        captured(model, texts, tmp_path / "store", "vllm")


def test_a_text_that_the_engine_refuses_is_named_and_the_others_are_captured(model, shared, tmp_path, monkeypatch):
    """With the checks before it switched off, the engine itself refuses a text of 300 tokens and one of no room."""
    rows = [
        {"id": "a", "text": "The quick brown fox"},
        {"id": "long", "text": "\u00df" * 300},
        {"id": "b", "text": "dog"},
    ]
    texts = source_checks.write_rows(tmp_path / "t.jsonl", rows)
    monkeypatch.setattr(capture, "unusable_texts", lambda config, opened, texts, held: {})
    with pytest.raises(SourceError, match="text 'long': vLLM refuses it: .*`on_unusable: skip`"):
        captured(model, texts, tmp_path / "stop", "vllm", top_k=8)
    store = captured(model, texts, tmp_path / "skip", "vllm", top_k=8, on_unusable="skip")
    assert sorted(store.ids()) == ["a", "b"]


def test_log_probabilities_that_would_fill_the_memory_as_python_numbers_are_refused(
    model, shared, tmp_path, monkeypatch
):
    from fusion_plugins.sources.backends import vllm_engine

    monkeypatch.setattr(vllm_engine, "MOST_ENTRIES", 64 * 100)
    rows = [{"id": "short", "text": "The quick"}, {"id": "long", "text": "The quick brown fox " * 10}]
    texts = source_checks.write_rows(tmp_path / "t.jsonl", rows)
    with pytest.raises(
        SourceError, match=r"text 'long': vLLM hands \d+ tokens x \d+ log-prob.*lower top_k, cut the texts"
    ):
        captured(model, texts, tmp_path / "store", "vllm", top_k="all")


def test_quantization_is_part_of_what_a_store_is(model):
    engine = vllm_checks.ENGINE | {"hf_overrides": {"rms_norm_eps": 1e-5}}
    source = base.open_source(SourceSettings(model=str(model), backend="vllm", options={"engine": engine}), "capture")
    source.close()
    assert source.facts["options"] == {"hf_overrides": {"rms_norm_eps": 1e-5}}


def test_flat_log_probabilities_are_those_of_vllms_default_format(engines):
    engine = engines.get("capture")
    from vllm import SamplingParams

    tokenizer = tiny.sentencepiece_bpe()
    text = tokenize(tokenizer, TokenTable.from_tokenizer(tokenizer), tiny.TEXTS[0])
    [(_, topk)] = engine.capture([[text]], 5)
    default = SamplingParams(max_tokens=1, prompt_logprobs=5)
    prompt = {"prompt_token_ids": text.input_ids.tolist()}
    [output] = engine._llm.generate([prompt], default, use_tqdm=False)
    for number, position in enumerate(output.prompt_logprobs[1:]):
        best = {token: entry.logprob for token, entry in position.items() if entry.rank <= 5}
        kept = topk.ids[number][topk.ids[number] >= 0]
        assert set(kept) >= {token for token in best if token < engine._vocab_size}
        assert topk.token_logprobs[number] == pytest.approx(position[int(text.input_ids[number + 1])].logprob, abs=1e-5)


def test_greedy_answers_are_those_of_transformers_and_seeds_repeat(model, shared, tmp_path):
    prompts = source_checks.prompts(tmp_path / "prompts.jsonl")

    def drawn(name, backend, **sampling):
        entry = {"name": "s", "model": str(model), "backend": backend, "max_tokens": 8, **sampling}
        sample_prompts(SampleConfig(prompts=str(prompts), out=str(tmp_path / name), n=2, sources=[entry]))
        return {
            (row["prompt_id"], row["index"]): (row["response"], row["finish_reason"], row["n_prompt_tokens"])
            for row in open_rows(tmp_path / name)
        }

    assert drawn("a", "vllm", temperature=0) == drawn("b", "transformers", temperature=0)
    first = drawn("c", "vllm", temperature=1.0)
    assert first == drawn("d", "vllm", temperature=1.0)
    assert len(set(first.values())) > len(first) / 2


def test_draws_follow_the_models_distribution(model, engines):
    sampling = Sampling(temperature=0.7, top_k=4, max_tokens=1, template="plain")
    requests = [SampleRequest("The quick brown", sampling, seed) for seed in range(600)]
    counts: dict[str, int] = {}
    for _, response in engines.get("sample").sample([requests]):
        counts[response.text] = counts.get(response.text, 0) + 1
    tokenizer = tiny.sentencepiece_bpe()
    ids = np.array(tokenizer("The quick brown")["input_ids"])
    logprobs = source_checks.reference_logprobs(model, ids)[-1]
    best = np.argsort(-logprobs)[:4]
    shares = np.exp(logprobs[best] / 0.7) / np.exp(logprobs[best] / 0.7).sum()
    for token, share in zip(best, shares, strict=True):
        deviation = (share * (1 - share) / 600) ** 0.5
        assert abs(counts[tokenizer.decode([token])] / 600 - share) < 5 * deviation


def test_drawn_tokens_and_their_log_probabilities_are_kept_as_the_model_has_them_before_temperature(model, engines):
    sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=5, template="plain")
    stopped = Sampling(temperature=0.7, max_tokens=30, template="plain", stop=("e", " ", "a"))
    requests = [SampleRequest("The quick brown", sampling, seed) for seed in range(4)]
    requests += [SampleRequest("The quick brown", stopped, seed) for seed in range(4)]
    found = dict(engines.get("sample").sample([requests]))
    tokenizer = tiny.sentencepiece_bpe()
    prompt = tokenizer("The quick brown")["input_ids"]
    for number in range(4):
        response = found[0, number]
        assert len(response.token_ids) == len(response.token_logprobs) == response.n_tokens
        assert tokenizer.decode(response.token_ids, skip_special_tokens=True) == response.text
        ids = np.array([*prompt, *response.token_ids])
        expected = source_checks.reference_logprobs(model, ids)[len(prompt) - 1 : -1]
        expected = np.take_along_axis(expected, np.array(response.token_ids)[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(response.token_logprobs, expected, rtol=2e-3, atol=2e-3)
    cut = [found[0, number] for number in range(4, 8) if found[0, number].finish_reason == "stop"]
    # What was cut off with a stop string was drawn: the tokens do not spell the text.
    assert any(response.token_ids is None for response in cut)


def test_an_argument_that_the_engine_does_not_know_is_an_error_with_a_cure(model):
    settings = SourceSettings(model=str(model), backend="vllm", options={"engine": {"tensor_parallel": 2}})
    with pytest.raises(SourceError, match="tensor_parallel.*arguments of the engine under `options: {engine: {...}}`"):
        base.open_source(settings, "capture")
    settings = SourceSettings(model=str(model), backend="vllm", options={"engine": {"data_parallel_size": 2}})
    with pytest.raises(SourceError, match="for data parallelism use the ray backend or several servers"):
        base.open_source(settings, "capture")
