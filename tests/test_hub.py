"""Datasets by hub name: the real `datasets` loads folders as it loads repositories, so nothing else is needed here."""

import doctest
import json

import pytest
import tiny
from typer.testing import CliRunner

from fusion_plugins import hub
from fusion_plugins.cli import app
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.inputs import open_prompts, open_texts, read_texts
from fusion_plugins.scoring.responses import open_responses
from fusion_plugins.store import open_store

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(autouse=True)
def _forget():
    """What a process has opened stays as it was; each test has folders of its own."""
    hub._opened.cache_clear()
    hub._builder.cache_clear()


@pytest.fixture(params=["downloaded", "streamed"])
def way(request, monkeypatch):
    """Both ways in which rows arrive."""
    monkeypatch.setattr(hub, "STREAMED_BYTES", (1 << 40) if request.param == "downloaded" else -1)
    return request.param


def dataset(folder, rows, name="train", kind="jsonl"):
    folder.mkdir(exist_ok=True)
    if kind == "jsonl":
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return f"hf:{folder}"


def test_the_examples_run():
    assert doctest.testmod(hub).failed == 0


@pytest.mark.parametrize("name", ["hf:", "hf:a/b:train:text:more", "hf:a/b@"])
def test_another_form_is_refused(name):
    with pytest.raises(ConfigError, match="expected hf:ORG/NAME"):
        read_texts(name)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_texts_are_those_of_the_rows(way, kind, tmp_path):
    rows = [{"id": f"r{n}", "text": f"Text {n}", "other": n} for n in range(5)]
    name = dataset(tmp_path / "set", rows, kind=kind)
    texts = open_texts(name)
    assert [(text.id, text.content) for text in texts] == [(f"r{n}", f"Text {n}") for n in range(5)]
    assert len(texts) == len(list(texts)) == 5
    (tmp_path / "file.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts.fingerprint == open_texts(tmp_path / "file.jsonl").fingerprint


def test_another_split_and_another_column_can_be_named(way, tmp_path):
    dataset(tmp_path / "set", [{"body": "a", "text": "no"}])
    name = dataset(tmp_path / "set", [{"body": "b", "text": "not this"}, {"body": "c", "text": "nor this"}], "test")
    assert [text.content for text in read_texts(f"{name}:test:body")] == ["b", "c"]
    assert [text.content for text in read_texts(f"{name}:train:body")] == ["a"]
    chats = dataset(tmp_path / "chats", [{"conversation": CHAT}] * 1)
    assert read_texts(f"{chats}::conversation")[0].content == CHAT


def test_what_is_not_there_is_named(way, tmp_path):
    name = dataset(tmp_path / "set", [{"body": "a", "id": "1"}])
    with pytest.raises(DataError, match=r"expected a column text or messages, got .*body.*Name the column"):
        read_texts(name)
    with pytest.raises(DataError, match="expected a column 'words'"):
        read_texts(f"{name}:train:words")
    with pytest.raises(DataError, match=r"split nothing.*cannot be loaded"):
        read_texts(f"{name}:nothing:body")


def test_a_name_that_cannot_be_reached_is_said():
    with pytest.raises(DataError, match=r"'nobody/nothing'.*cannot be loaded: .*gated sets"):
        read_texts("hf:nobody/nothing")


def test_a_signed_address_is_in_no_message(monkeypatch):
    def refused(*_, **__):
        raise OSError("403 Forbidden for url: https://host/file.parquet?X-Amz-Signature=secret")

    monkeypatch.setattr("datasets.load_dataset_builder", refused)
    with pytest.raises(DataError, match="403 Forbidden") as failed:
        read_texts("hf:some/signed")
    assert "secret" not in str(failed.value)


def test_one_bad_row_is_named_and_can_be_left_out(way, tmp_path):
    name = dataset(tmp_path / "set", [{"text": "a"}, {"text": ""}, {"text": "b"}])
    with pytest.raises(DataError, match=r"set:2: expected a string that is not empty"):
        open_texts(name)
    unusable = {}
    assert [text.content for text in open_texts(name, unusable=unusable)] == ["a", "b"]
    assert len(unusable) == 1


def test_prompts_and_responses_can_be_there_too(way, tmp_path):
    prompts = dataset(tmp_path / "prompts", [{"text": "2 + 3?", "domain": "math", "reference": "5"}])
    assert [(prompt.domain, prompt.reference) for prompt in open_prompts(prompts)] == [("math", "5")]
    rows = [{"prompt_id": "p", "source": "s", "prompt": "2 + 3?", "response": str(n)} for n in range(3)]
    responses = open_responses(dataset(tmp_path / "responses", rows))
    assert [row["response"] for row in responses] == ["0", "1", "2"]
    assert [row["index"] for row in responses] == [0, 1, 2]
    assert len(read_texts(dataset(tmp_path / "responses", rows))) == 3  # as chats


def test_a_dataset_is_captured_and_planned_by_its_name(way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.llama_checkpoint(tmp_path / "model")
    dataset(tmp_path / "set", [{"body": text} for text in tiny.TEXTS[:3]])
    texts = "hf:./set:train:body"
    flags = ["--model", "model", "--texts", texts, "--out", "store", "--top-k", "4"]
    result = CliRunner().invoke(app, ["capture", *flags])
    assert result.exception is None, result.output
    assert len(open_store("store")) == 3
    tiny.llama_checkpoint(tmp_path / "target")
    result = CliRunner().invoke(app, ["init", "fusellm", "--target", "target", "--sources", "model", "--texts", texts])
    assert result.exception is None, result.output
    assert "path: ../set\n    split: train\n    field: body\n" in (tmp_path / "fusellm" / "train.yml").read_text()
    assert "texts: hf:../set:train:body" in (tmp_path / "fusellm" / "capture-model.yml").read_text()
