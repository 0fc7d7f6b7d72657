"""Sampling with the transformers backend: what a folder holds, resuming, and what is refused."""

import json
from collections import Counter

import pytest
import source_checks
from source_checks import sample_config as config

from fusion_plugins.errors import DataError, MismatchError, SourceError
from fusion_plugins.sources import sample as sample_module
from fusion_plugins.sources.sample import sample_prompts
from fusion_plugins.store import open_rows


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


def test_a_response_depends_on_its_own_seed_alone(models, prompts, tmp_path):
    def drawn(name, **changes):
        sample_prompts(config(models, prompts, tmp_path / name, **changes))
        return {(row["prompt_id"], row["source"], row["index"]): row["response"] for row in open_rows(tmp_path / name)}

    everything = drawn("everything")
    assert drawn("few", n=1, limit=3, only=["other"]).items() <= everything.items()
    assert drawn("batches", batch_requests=5) == everything
    assert drawn("seed", seed=1) != everything
    assert len(set(everything.values())) > len(everything) / 2


def test_a_prompt_that_is_too_long_stops_the_run_before_it_starts_or_is_left_out(models, prompts, tmp_path):
    with prompts.open("a") as lines:
        lines.write(json.dumps({"id": "long", "text": "z" * 300}) + "\n")
    settings = config(models, prompts, tmp_path / "out", only=["llama"])
    with pytest.raises(SourceError, match="prompt 'long', source 'llama': .*exceed the model's 256 tokens"):
        sample_prompts(settings)
    assert len(open_rows(tmp_path / "out")) == 0
    report = sample_prompts(settings.model_copy(update={"on_unusable": "skip"}))
    assert list(report.skipped) == [("llama", "long")]
    assert report.drawn == len(open_rows(tmp_path / "out")) == 12


def test_rows_that_are_no_prompts_stop_the_run_or_are_left_out(models, prompts, tmp_path):
    with prompts.open("a") as lines:
        lines.write('{"id": "half", "text": "a", "reference": "\\ud83d"}\n{"id": "open", "text": \n')
    settings = config(models, prompts, tmp_path / "out", only=["llama"], n=1)
    with pytest.raises(DataError, match=r"prompts\.jsonl:7: expected a domain, a reference, tests and columns"):
        sample_prompts(settings)
    report = sample_prompts(settings.model_copy(update={"on_unusable": "skip"}))
    assert list(report.skipped) == [("all sources", "half"), ("all sources", f"{prompts}:8")]
    assert report.drawn == len(open_rows(tmp_path / "out")) == 6


def test_columns_of_the_prompts_that_nobody_reads_are_named_before_anything_is_drawn(models, tmp_path, capsys):
    rows = [{"id": "a", "text": "2+2?", "domain": "math", "answer": "4"}, {"id": "b", "text": "Hi", "dataset": "chat"}]
    prompts = source_checks.write_rows(tmp_path / "prompts.jsonl", rows)
    settings = config({"llama": models["llama"]}, prompts, tmp_path / "out", n=1)
    sample_prompts(settings)
    said = " ".join(capsys.readouterr().err.split())
    assert "columns that are not read: answer, dataset. The gold answer is read from 'reference'" in said
    sample_prompts(settings.model_copy(update={"keep_columns": ["answer", "dataset"], "out": str(tmp_path / "kept")}))
    assert "not read" not in capsys.readouterr().err
    assert [row["dataset"] for row in open_rows(tmp_path / "kept")] == [None, "chat"]


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
        return config({"llama": models["llama"]}, prompts, tmp_path / "out", n=n, batch_requests=2)

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


def test_a_run_that_stops_is_resumed_and_draws_nothing_twice(models, prompts, tmp_path, monkeypatch):
    from fusion_plugins.sources.backends.transformers_local import TransformersSource

    settings = config(models, prompts, tmp_path / "out", batch_requests=3)
    sample_prompts(config(models, prompts, tmp_path / "whole", batch_requests=3))
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
