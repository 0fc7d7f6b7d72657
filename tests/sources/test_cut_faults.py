"""Cutting: one run at a time has a file, and a run that fails or is stopped leaves the file of before."""

import os

import pytest
import source_checks
import tiny

from fusion_plugins.errors import DataError, StoreError
from fusion_plugins.sources.cut import CutConfig, cut_texts
from fusion_plugins.store.files import FolderLock


@pytest.fixture
def settings(tmp_path):
    tiny.byte_level().save_pretrained(tmp_path / "tokenizer")
    texts = source_checks.texts(tmp_path / "texts.jsonl")
    tokenizers = [str(tmp_path / "tokenizer")]
    return CutConfig(texts=str(texts), out=str(tmp_path / "out.jsonl"), tokenizers=tokenizers, max_length=64)


def test_a_second_run_into_the_same_file_is_refused_and_one_into_another_file_is_not(settings, tmp_path):
    cut_texts(settings)
    before = (tmp_path / "out.jsonl").read_bytes()
    lock = FolderLock(tmp_path, "out.jsonl")
    with pytest.raises(
        StoreError, match=rf"out.jsonl is being written by process {os.getpid()} on .* give this run an"
    ):
        cut_texts(settings)
    cut_texts(settings.model_copy(update={"out": str(tmp_path / "other.jsonl")}))
    lock.close()
    assert (tmp_path / "out.jsonl").read_bytes() == before == (tmp_path / "other.jsonl").read_bytes()


def test_a_run_that_fails_half_way_keeps_the_file_of_before(settings, tmp_path):
    (tmp_path / "out.jsonl").write_text("before")
    chats = source_checks.write_rows(
        tmp_path / "chats.jsonl", [{"id": "a", "text": "first"}, {"id": "b", "messages": tiny.CHAT * 40}]
    )
    with pytest.raises(DataError):
        cut_texts(settings.model_copy(update={"texts": str(chats)}))
    assert (tmp_path / "out.jsonl").read_text() == "before"
    assert not list(tmp_path.glob(".*.tmp"))


def test_what_a_killed_run_left_is_removed_and_links_are_not_followed(settings, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / ".out.jsonl.0123456789abcdef.tmp").write_text("half")
    (tmp_path / ".out.jsonl.tmp").symlink_to(victim)
    (tmp_path / "out.jsonl").symlink_to(victim)
    cut_texts(settings)
    assert victim.read_text() == "kept"
    assert not (tmp_path / "out.jsonl").is_symlink()
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_only_a_file_is_written(settings, tmp_path, kind):
    out = tmp_path / "place"
    os.mkfifo(out) if kind == "pipe" else out.symlink_to("/dev/null")
    with pytest.raises(StoreError, match=f"expected a plain file, got a {kind}"):
        cut_texts(settings.model_copy(update={"out": str(out)}))
