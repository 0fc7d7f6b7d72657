"""`--shard i/n`: work divided over machines, and joined again."""

import doctest

import numpy as np
import pytest
from source_checks import capture_config as config
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.config import validate
from fusion_plugins.errors import ConfigError, MismatchError
from fusion_plugins.sources import parts
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.sources.capture_estimate import estimate_capture
from fusion_plugins.sources.parts import in_part
from fusion_plugins.sources.sample import sample_prompts
from fusion_plugins.sources.sample_config import SampleConfig
from fusion_plugins.store import open_rows, open_store
from fusion_plugins.store.maintain import compact, merge, missing_parts


def test_the_examples_run():
    assert doctest.testmod(parts).failed == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000])
def test_every_id_belongs_to_one_part(count):
    for id in ("t0", "", "数学", "a" * 500, "1"):
        assert sum(in_part(id, f"{index}/{count}") for index in range(1, count + 1)) == 1


def test_parts_are_of_about_the_same_size_and_do_not_depend_on_the_order():
    ids = [f"text {number}" for number in range(3000)]
    sizes = [sum(in_part(id, f"{index}/3") for id in ids) for index in (1, 2, 3)]
    assert sum(sizes) == 3000
    assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.parametrize("value", ["0/3", "4/3", "1", "1/0", "a/b", "-1/3", "1/3/5", "1.0/2", "", "٣/٣"])
def test_what_is_no_part_is_refused(value):
    with pytest.raises(ConfigError, match="expected i/n with i from 1 to n"):
        validate(CaptureConfig, {"model": "m", "texts": "t", "out": "o", "shard": value}, where="here")


def test_three_parts_are_together_what_one_run_captures(model, texts, tmp_path):
    capture_texts(config(model, texts, tmp_path / "whole"))
    for index in (1, 2, 3):
        flags = ["--model", str(model), "--texts", str(texts), "--top-k", "8", "--shard", f"{index}/3"]
        result = CliRunner().invoke(app, ["capture", *flags, "--out", str(tmp_path / f"part-{index}")])
        assert result.exception is None, result.output
    folders = [tmp_path / f"part-{index}" for index in (1, 2, 3)]
    sizes = [len(open_store(folder)) for folder in folders]
    whole = open_store(tmp_path / "whole")
    assert sum(sizes) == len(whole)
    assert all(sizes)
    # A part that is missing is said, and the result is not called complete.
    result = CliRunner().invoke(app, ["store", "merge", *map(str, folders[:2]), "--out", str(tmp_path / "joined")])
    assert "1 parts are missing (3/3)" in " ".join(result.output.split())
    assert not open_store(tmp_path / "joined").manifest.complete
    result = CliRunner().invoke(app, ["store", "merge", *map(str, folders), "--out", str(tmp_path / "joined")])
    assert "missing" not in result.output
    joined = open_store(tmp_path / "joined")
    assert joined.manifest.complete
    assert joined.manifest.texts_fingerprint == whole.manifest.texts_fingerprint
    assert {record.id for record in joined} == {record.id for record in whole}
    for record in whole:
        other = joined[record.id]
        np.testing.assert_array_equal(record.text.input_ids, other.text.input_ids)
        np.testing.assert_allclose(record.topk.logprobs, other.topk.logprobs, rtol=2e-3, atol=1e-3)


def test_a_part_that_was_stopped_is_resumed_and_keeps_to_its_texts(model, texts, tmp_path):
    first = config(model, texts, tmp_path / "part", shard="1/2", limit=4)
    capture_texts(first)
    capture_texts(config(model, texts, tmp_path / "part", shard="1/2"))
    store = open_store(tmp_path / "part")
    assert store.manifest.complete
    assert all(in_part(record.id, "1/2") for record in store)
    assert capture_texts(config(model, texts, tmp_path / "part", shard="1/2")).captured == 0


@pytest.mark.parametrize(("held", "asked"), [("1/2", "2/2"), ("1/2", None), (None, "1/2"), ("1/2", "1/3")])
def test_the_folder_of_another_part_is_refused(model, texts, tmp_path, held, asked):
    capture_texts(config(model, texts, tmp_path / "store", shard=held))
    with pytest.raises(MismatchError, match="Give every part a folder of its own"):
        capture_texts(config(model, texts, tmp_path / "store", shard=asked))


def test_merges_of_merges_know_their_parts(model, texts, tmp_path):
    for index in (1, 2, 3):
        capture_texts(config(model, texts, tmp_path / str(index), shard=f"{index}/3"))
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "two")
    compact(tmp_path / "two")
    assert missing_parts([open_store(tmp_path / "two").manifest]) == ["3/3"]
    assert merge([tmp_path / "two", tmp_path / "3"], tmp_path / "all").complete is False  # `two` itself was not
    assert merge([tmp_path / "1", tmp_path / "2", tmp_path / "3"], tmp_path / "three").complete


def test_a_part_is_estimated_alone(model, texts):
    sizes = [estimate_capture(config(model, texts, "unused", shard=f"{index}/2"))["texts"] for index in (1, 2)]
    assert sum(sizes) == 10


def test_prompts_are_divided_too(models, prompts, tmp_path):
    sources = [{"model": str(folder), "name": name, "max_tokens": 3} for name, folder in models.items()]
    settings = {"prompts": str(prompts), "sources": sources, "n": 2}
    sample_prompts(SampleConfig(out=str(tmp_path / "whole"), **settings))
    for index in (1, 2, 3):
        sample_prompts(SampleConfig(out=str(tmp_path / str(index)), shard=f"{index}/3", **settings))
    joined = merge([tmp_path / str(index) for index in (1, 2, 3)], tmp_path / "joined")
    assert joined.complete
    whole, found = open_rows(tmp_path / "whole"), open_rows(tmp_path / "joined")

    # Log-probabilities may differ in the last bits, because other prompts share a forward pass.
    def said(rows):
        return {key: [rows[key][name] for name in ("prompt", "response", "seed", "reference")] for key in rows.keys()}

    assert said(found) == said(whole)
    with pytest.raises(MismatchError, match="folder of its own"):
        sample_prompts(SampleConfig(out=str(tmp_path / "1"), shard="2/3", **settings))
