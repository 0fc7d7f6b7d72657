import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import source_checks
import tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.errors import ConfigError, MismatchError, SourceError
from fusion_plugins.sources import sample as sample_module
from fusion_plugins.sources.backends.base import Response, SampleRequest, Sampling, SourceSettings, open_source
from fusion_plugins.sources.estimate import estimate_samples
from fusion_plugins.sources.fingerprints import sampling_fingerprint
from fusion_plugins.sources.presets import PRESETS
from fusion_plugins.sources.sample import SampleConfig, SampledSource, sample_prompts
from fusion_plugins.store import open_rows


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny.sentencepiece_bpe()
    return {
        "llama": source_checks.checkpoint(folder / "llama"),
        "other": source_checks.checkpoint(folder / "other", tokenizer=tokenizer, vocab_size=len(tokenizer), seed=1),
    }


@pytest.fixture
def prompts(tmp_path):
    return source_checks.prompts(tmp_path / "prompts.jsonl")


def config(models, prompts, out, **changes):
    sources = [{"name": name, "model": str(model), "max_tokens": 6} for name, model in models.items()]
    return SampleConfig(**({"prompts": str(prompts), "out": str(out), "sources": sources, "n": 2} | changes))


def source(model, **options) -> object:
    return open_source(SourceSettings(model=str(model), options=options), "sample")


def test_every_source_answers_every_prompt_as_often_as_its_domain_says(models, prompts, tmp_path):
    settings = config(models, prompts, tmp_path / "out", n={"instruction": 3, "math": 1})
    report = sample_prompts(settings)
    rows = list(open_rows(tmp_path / "out"))
    assert Counter((row["source"], row["domain"]) for row in rows) == {
        (name, domain): 2 * count for name in models for domain, count in (("instruction", 3), ("math", 1), ("code", 5))
    }
    assert report.drawn == len(rows)
    assert report.tokens == sum(row["n_tokens"] for row in rows)
    row = next(row for row in rows if row["prompt_id"] == "p1" and row["source"] == "llama")
    assert (row["prompt"], row["reference"], row["index"]) == ("What is 1 + 30?", "31", 0)
    assert row["finish_reason"] in ("stop", "length")
    assert open_rows(tmp_path / "out").manifest.complete


def test_the_published_table_is_a_preset_and_its_counts_are_the_default(models, prompts, tmp_path):
    assert {name.removeprefix("fusechat3-") for name in PRESETS} == {
        "gemma-2-27b",
        "mistral-large-2407",
        "llama-3.1-70b",
        "qwen-2.5-72b",
        "qwen-2.5-math-72b",
    }
    qwen = SampledSource(model="m", preset="fusechat3-qwen-2.5-72b", max_tokens=9)
    assert (qwen.temperature, qwen.top_p, qwen.repetition_penalty, qwen.max_tokens) == (0.7, 0.8, 1.05, 9)
    gemma = SampledSource(model="m", preset="fusechat3-gemma-2-27b", temperature=0.5)
    assert (gemma.temperature, gemma.top_p, gemma.domains) == (0.5, 0.95, ["instruction", "code"])
    assert SampleConfig(prompts="p", out="o", sources=[qwen.model_dump()]).n == {
        "instruction": 5,
        "code": 8,
        "chinese": 1,
        "math": 8,
    }
    entry = {"model": str(models["llama"]), "preset": "fusechat3-qwen-2.5-math-72b", "max_tokens": 4}
    sample_prompts(config(models, prompts, tmp_path / "out", sources=[entry]))
    assert {row["domain"] for row in open_rows(tmp_path / "out")} == {"math"}


def test_a_response_depends_on_its_own_seed_alone(models, prompts, tmp_path):
    def drawn(name, **changes):
        sample_prompts(config(models, prompts, tmp_path / name, **changes))
        return {(row["prompt_id"], row["source"], row["index"]): row["response"] for row in open_rows(tmp_path / name)}

    everything = drawn("everything")
    assert drawn("few", n=1, limit=3, only=["other"]).items() <= everything.items()
    assert drawn("units", unit_requests=5) == everything
    assert drawn("seed", seed=1) != everything
    assert len(set(everything.values())) > len(everything) / 2


def test_temperature_zero_is_the_models_own_greedy_answer(models):
    tokenizer, model = tiny.byte_level(), AutoModelForCausalLM.from_pretrained(models["llama"])
    texts = ["The quick", "def add(left"]
    sampling = Sampling(temperature=0, max_tokens=10, template="plain")
    requests = [SampleRequest(text, sampling, seed) for seed, text in enumerate(texts)]
    for (_, index), response in source(models["llama"]).sample([requests]):
        ids = tokenizer(texts[index], return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
        assert response.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert response.n_prompt_tokens == ids.shape[1]


@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.3}, {"temperature": 0.5}])
def test_draws_follow_the_models_distribution(models, limits):
    tokenizer = tiny.byte_level()
    text = "The quick brown"
    sampling = Sampling(**({"temperature": 1.0, "max_tokens": 1, "template": "plain"} | limits))
    requests = [SampleRequest(text, sampling, seed) for seed in range(2000)]
    counts = Counter(response.text for _, response in source(models["llama"], batch_prompts=500).sample([requests]))
    ids = np.array(tokenizer(text)["input_ids"])
    probs = np.exp(source_checks.reference_logprobs(models["llama"], ids)[-1])
    probs = probs ** (1 / sampling.temperature)
    order = np.argsort(-probs)
    probs = probs / probs.sum()
    kept = len(probs) if not sampling.top_k else sampling.top_k
    if sampling.top_p < 1:
        kept = int((np.cumsum(probs[order]) < sampling.top_p).sum()) + 1
    allowed = order[:kept]
    expected = Counter()
    for token in allowed:
        expected[tokenizer.decode([token], skip_special_tokens=True)] += probs[token] / probs[allowed].sum()
    assert set(counts) <= set(expected)
    for answer, share in expected.items():
        deviation = (share * (1 - share) / 2000) ** 0.5
        assert abs(counts[answer] / 2000 - share) < 4.5 * deviation + 1e-9


def test_padding_does_not_let_a_repetition_penalty_see_tokens_that_are_not_there(models):
    sampling = Sampling(temperature=0, max_tokens=12, template="plain", repetition_penalty=1.8)
    texts = ["The quick brown fox jumps over the lazy dog. The dog sleeps", "return", "12 + 30 ="]
    requests = [SampleRequest(text, sampling, 0) for text in texts]
    alone = {i: r.text for i, r in source(models["llama"], batch_prompts=1).sample([requests])}
    together = {i: r.text for i, r in source(models["llama"], batch_prompts=3).sample([requests])}
    assert alone == together


def test_a_stop_string_ends_a_response_and_is_cut_off(models):
    free = Sampling(temperature=0, max_tokens=12, template="plain")
    [(_, whole)] = source(models["llama"]).sample([[SampleRequest("The quick", free, 0)]])
    stop = whole.text[3:5]
    [(_, cut)] = source(models["llama"]).sample(
        [[SampleRequest("The quick", free.model_copy(update={"stop": (stop,)}), 0)]]
    )
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_a_prompt_is_rendered_as_a_chat_with_the_system_prompt_unless_told_otherwise(models):
    asked = "What is 1 + 30?"
    chat = tiny.byte_level().apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": asked}],
        tokenize=False,
        add_generation_prompt=True,
    )
    base = Sampling(temperature=0, max_tokens=8)
    requests = [
        SampleRequest(asked, base.model_copy(update={"system": "Be brief."}), 0),
        SampleRequest(chat, base.model_copy(update={"template": "plain"}), 0),
    ]
    first, second = (response for _, response in sorted(source(models["llama"]).sample([requests])))
    assert first == second


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused_and_the_others_are_answered(models):
    sampling = Sampling(max_tokens=252, template="plain")
    requests = [SampleRequest(text, sampling, 0) for text in ("The", "The quick brown fox")]
    results = dict(source(models["llama"]).sample([requests]))
    assert isinstance(results[0, 0], Response)
    assert "exceed the model's 256 tokens; lower max_tokens" in results[0, 1].reason


def test_a_prompt_that_is_too_long_stops_the_run_before_it_starts_or_is_left_out(models, prompts, tmp_path):
    with prompts.open("a") as lines:
        lines.write(json.dumps({"id": "long", "text": "z" * 300}) + "\n")
    settings = config(models, prompts, tmp_path / "out", only=["llama"])
    with pytest.raises(SourceError, match="prompt 'long', source 'llama': .*exceed the model's 256 tokens"):
        sample_prompts(settings)
    assert len(open_rows(tmp_path / "out")) == 0
    report = sample_prompts(settings.model_copy(update={"unusable": "skip"}))
    assert list(report.skipped) == [("llama", "long")]
    assert report.drawn == len(open_rows(tmp_path / "out")) == 12


def test_a_source_whose_responses_are_all_there_is_not_loaded_again(models, prompts, tmp_path, monkeypatch):
    sample_prompts(config(models, prompts, tmp_path / "out", only=["llama"]))
    opened = []
    load = sample_module.open_source
    monkeypatch.setattr(sample_module, "open_source", lambda s, p: opened.append(s.source_name) or load(s, p))
    report = sample_prompts(config(models, prompts, tmp_path / "out"))
    assert opened == ["other"]
    assert (report.present, report.drawn) == (12, 12)


def test_a_folder_is_no_longer_complete_while_a_source_is_added(models, prompts, tmp_path, monkeypatch):
    from fusion_plugins.sources.backends.transformers_local import TransformersSource

    def settings(n):
        return config({"llama": models["llama"]}, prompts, tmp_path / "out", n=n, unit_requests=2)

    sample_prompts(settings(1))
    assert open_rows(tmp_path / "out").manifest.complete
    generate, calls = TransformersSource._generate, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise SourceError("the engine died")
        return generate(self, *arguments)

    monkeypatch.setattr(TransformersSource, "_generate", failing)
    with pytest.raises(SourceError, match="the engine died"):
        sample_prompts(settings(3))
    assert not open_rows(tmp_path / "out").manifest.complete
    monkeypatch.setattr(TransformersSource, "_generate", generate)
    sample_prompts(settings(3))
    assert open_rows(tmp_path / "out").manifest.complete


def test_a_corrected_reference_another_domain_and_other_tests_are_other_prompts(models, tmp_path):
    row = {"id": "p", "text": "What is 9 + 9?", "domain": "math", "reference": "18"}
    only = {"llama": models["llama"]}
    prompts = source_checks.write_rows(tmp_path / "prompts.jsonl", [row])
    sample_prompts(config(only, prompts, tmp_path / "out"))
    for change in ({"reference": "19"}, {"domain": "code"}, {"tests": ["assert True"]}):
        source_checks.write_rows(prompts, [row | change])
        with pytest.raises(MismatchError, match="prompts_fingerprint"):
            sample_prompts(config(only, prompts, tmp_path / "out"))


def test_what_changes_the_numbers_changes_the_fingerprint_and_what_changes_the_speed_does_not(models):
    def mark(**settings):
        return sampling_fingerprint(SourceSettings(model=str(models["llama"]), **settings), Sampling(), None)

    plain = mark()
    assert plain == mark(dtype="float32")  # as stored
    assert plain == mark(backend="vllm", options={"engine": {"tensor_parallel_size": 2, "max_num_seqs": 4}})
    different = [
        mark(dtype="bfloat16"),
        mark(backend="vllm", options={"engine": {"quantization": "fp8"}}),
        mark(backend="vllm", options={"engine": {"kv_cache_dtype": "fp8"}}),
        mark(backend="vllm", options={"engine": {"dtype": "float16"}}),
        mark(backend="openai", options={"extra_body": {"min_p": 0.2}}),
    ]
    assert len({plain, *different}) == 6
    ray = {"backend": "vllm", "options": {"engine": {"quantization": "fp8"}}}
    assert mark(backend="ray", options=ray) == different[1]


def test_what_the_checkpoint_says_about_sampling_does_not_act(models, tmp_path):
    import shutil

    folder = shutil.copytree(models["llama"], tmp_path / "opinionated")
    file = folder / "generation_config.json"
    values = json.loads(file.read_text()) | {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0}
    file.write_text(json.dumps(values))
    request = SampleRequest("The quick", Sampling(temperature=0, max_tokens=12, template="plain"), 0)
    assert list(source(folder).sample([[request]])) == list(source(models["llama"]).sample([[request]]))


def test_a_run_that_stops_goes_on_and_draws_nothing_twice(models, prompts, tmp_path, monkeypatch):
    from fusion_plugins.sources.backends.transformers_local import TransformersSource

    settings = config(models, prompts, tmp_path / "out", unit_requests=3)
    sample_prompts(config(models, prompts, tmp_path / "whole", unit_requests=3))
    generate, calls = TransformersSource._generate, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise SourceError("the engine died")
        return generate(self, *arguments)

    monkeypatch.setattr(TransformersSource, "_generate", failing)
    with pytest.raises(SourceError, match="the engine died"):
        sample_prompts(settings)
    assert len(open_rows(tmp_path / "out")) == 6
    monkeypatch.setattr(TransformersSource, "_generate", generate)
    report = sample_prompts(settings)
    assert (report.present, report.drawn) == (6, 18)
    by_key = [
        {(row["prompt_id"], row["source"], row["index"]): row for row in open_rows(tmp_path / name)}
        for name in ("out", "whole")
    ]
    assert by_key[0] == by_key[1]


def test_other_settings_other_prompts_and_another_seed_are_refused_but_another_source_may_join(
    models, prompts, tmp_path
):
    out = tmp_path / "out"
    first = [{"name": "a", "model": str(models["llama"]), "max_tokens": 4}]
    sample_prompts(config(models, prompts, out, sources=first))
    with pytest.raises(MismatchError, match="source 'a' with the sampling fingerprint"):
        sample_prompts(config(models, prompts, out, sources=[{**first[0], "temperature": 0.5}]))
    with pytest.raises(MismatchError, match="seed: the folder has 0, expected 1"):
        sample_prompts(config(models, prompts, out, sources=first, seed=1))
    more = source_checks.prompts(tmp_path / "more.jsonl", 7)
    with pytest.raises(MismatchError, match="prompts_fingerprint"):
        sample_prompts(config(models, more, out, sources=first))
    second = {"name": "b", "model": str(models["other"]), "max_tokens": 4}
    report = sample_prompts(config(models, prompts, out, sources=[*first, second]))
    assert (report.present, report.drawn) == (12, 12)


def test_the_command_says_which_settings_are_wrong_and_dry_run_writes_nothing(models, prompts, tmp_path):
    file = tmp_path / "sample.yml"
    values = {
        "prompts": str(prompts),
        "out": str(tmp_path / "out"),
        "n": 2,
        "sources": [{"name": "a", "model": str(models["llama"]), "max_tokens": 4}],
    }
    file.write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["sample", "-c", str(file), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert not Path(values["out"]).exists()
    assert estimate_samples(SampleConfig(**values))["a"]["responses"] == 12
    result = CliRunner().invoke(app, ["sample", "-c", str(file), "--limit", "1"])
    assert result.exit_code == 0, result.output
    assert len(open_rows(values["out"])) == 2
    values["sources"] += [{"name": "a", "model": "m"}]
    file.write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["sample", "-c", str(file)])
    assert isinstance(result.exception, ConfigError)
    assert "a stands twice: set `name`" in str(result.exception)
    values["sources"] = [{"model": "m", "preset": "fusechat4", "temprature": 1}]
    file.write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["sample", "-c", str(file)])
    assert "no preset 'fusechat4'; known: fusechat3-gemma-2-27b" in str(result.exception)


def test_torch_and_the_engines_are_not_loaded_by_the_commands_module():
    import subprocess
    import sys

    code = (
        "import sys, fusion_plugins.sources.commands as c; print(sorted({'torch', 'vllm', 'ray'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
