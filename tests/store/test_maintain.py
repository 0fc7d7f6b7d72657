"""verify, merge and compact: what they refuse and what they leave."""

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import store_jobs
from store_contents import command, make_store
from store_samples import changed, manifest, record, table

from fusion_plugins.errors import ConfigError, MismatchError, StoreError
from fusion_plugins.store import RowWriter, Store, StoreWriter, maintain, open_rows, open_store, shard_writer
from fusion_plugins.store.maintain import compact, merge, verify
from fusion_plugins.store.manifest import load_manifest


def ids(store: Store) -> list[str]:
    return [item.id for item in store]


def test_merge_joins_the_parts_of_one_capture(tmp_path: Path) -> None:
    parts = [make_store(tmp_path / "a", range(4)), make_store(tmp_path / "b", range(2, 7))]
    command("merge", *parts, "--out", tmp_path / "all")
    assert "merged [{'folder': '" in command("info", tmp_path / "all").replace("│ ", "")
    store = open_store(tmp_path / "all")
    assert ids(store) == [f"text-{number:04d}" for number in range(7)]
    assert store.manifest.complete
    assert store.manifest.texts_fingerprint == manifest().texts_fingerprint
    assert store.table == table()
    assert store["text-0005"].topk.ids.tolist() == record(5).topk.ids.tolist()


def test_merge_of_unfinished_parts_is_not_complete(tmp_path: Path) -> None:
    parts = [make_store(tmp_path / "a", [1]), make_store(tmp_path / "b", [2], finish=False)]
    assert not merge(parts, tmp_path / "all").complete


def test_merge_of_other_texts_gets_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    parts = [make_store(tmp_path / "a", [1]), make_store(tmp_path / "b", [2], texts_fingerprint="others")]
    first, second = merge(parts, tmp_path / "ab"), merge(parts[::-1], tmp_path / "ba")
    assert first.texts_fingerprint == second.texts_fingerprint  # type: ignore[union-attr]
    assert first.texts_fingerprint not in {"others", manifest().texts_fingerprint}  # type: ignore[union-attr]


def test_merge_keeps_how_every_part_was_made(tmp_path: Path) -> None:
    parts = [
        make_store(tmp_path / "a", [1], provenance={"texts": "a.jsonl"}),
        make_store(tmp_path / "b", [2], provenance={"texts": "b.jsonl"}, engine="vllm", engine_version="0.9"),
    ]
    joined = merge(parts, tmp_path / "all")
    assert joined.engine == "test + vllm"  # type: ignore[union-attr]
    kept = load_manifest(tmp_path / "all").provenance["merged"]
    assert [(part["folder"], part["engine"], part["engine_version"], part["provenance"]) for part in kept] == [
        (str(parts[0]), "test", "1", {"texts": "a.jsonl"}),
        (str(parts[1]), "vllm", "0.9", {"texts": "b.jsonl"}),
    ]
    assert all(part["created"] and part["made_by"] for part in kept)


@pytest.mark.parametrize(("name", "value"), [("model", "other"), ("dtype", "bfloat16"), ("template_hash", "x")])
def test_merge_refuses_parts_with_other_settings(tmp_path: Path, name: str, value: str) -> None:
    parts = [make_store(tmp_path / "a", [1]), make_store(tmp_path / "b", [2], **{name: value})]
    with pytest.raises(MismatchError, match=f"b does not fit. {name}: the folder has '{value}'"):
        merge(parts, tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_merge_refuses_parts_that_disagree_about_a_record(tmp_path: Path) -> None:
    first = make_store(tmp_path / "a", [1, 2])
    with StoreWriter(tmp_path / "b", manifest(), table()) as writer:
        writer.write(changed(record(2), tail=record(2).tail / 2))
    with pytest.raises(
        MismatchError, match="expected the same 'text-0002' in all parts, got two that differ, in .*a and in .*b"
    ):
        merge([first, tmp_path / "b"], tmp_path / "all")


def test_merge_refuses_a_store_and_rows(tmp_path: Path) -> None:
    RowWriter(tmp_path / "rows", store_jobs.rows_manifest()).close()
    with pytest.raises(MismatchError, match="kind: the folder has 'rows', expected 'logprobs'"):
        merge([make_store(tmp_path / "a", [1]), tmp_path / "rows"], tmp_path / "all")


def test_merge_into_a_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected another folder to write into than the parts"):
        merge([make_store(tmp_path / "a", [1])], tmp_path / "a")


def test_rows_are_merged_too(tmp_path: Path) -> None:
    for name, numbers in {"a": range(5), "b": range(3, 9)}.items():
        with RowWriter(tmp_path / name, store_jobs.rows_manifest()) as writer:
            for number in numbers:
                writer.write(store_jobs.row(number))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert list(open_rows(tmp_path / "all")) == [store_jobs.row(number) for number in range(9)]


def test_compact_joins_shards_and_keeps_the_records(tmp_path: Path) -> None:
    make_store(tmp_path, range(5), finish=False)
    assert len(open_store(tmp_path).manifest.shards) == 5
    said = command("compact", tmp_path)
    assert "5 shards became 1" in said
    assert ids(open_store(tmp_path)) == [f"text-{number:04d}" for number in range(5)]
    assert len(compact(tmp_path).shards) == 1


def test_a_reader_of_a_compacted_store_is_told(tmp_path: Path) -> None:
    before = open_store(make_store(tmp_path, range(3), finish=False))
    compact(tmp_path)
    with pytest.raises(StoreError, match="If the folder was compacted meanwhile, open it again"):
        list(before)


def test_verify_finds_records_that_appear_twice(tmp_path: Path) -> None:
    make_store(tmp_path, range(3), finish=False)
    text = open_store(tmp_path).manifest
    again = text.shards[1].model_copy(update={"name": "shard-000007.parquet"})
    shutil.copy(tmp_path / text.shards[1].name, tmp_path / again.name)
    text.model_copy(update={"shards": [*text.shards, again]}).save(tmp_path)
    assert verify(tmp_path).problems == [
        f"{tmp_path}: expected every key once, got 1 that appear more often, the first of them 'text-0001'. Make the "
        f"folder again."
    ]


def test_verify_finds_counts_that_are_wrong(tmp_path: Path) -> None:
    make_store(tmp_path, range(3))
    text = open_store(tmp_path).manifest
    wrong = text.shards[0].model_copy(update={"tokens": 1})
    text.model_copy(update={"shards": [wrong]}).save(tmp_path)
    with pytest.raises(StoreError, match="expected 3 rows of 1 tokens, as the manifest says, got 3 of "):
        command("verify", tmp_path)


def test_an_interrupted_merge_keeps_its_records_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [make_store(tmp_path / "a", range(3)), make_store(tmp_path / "b", range(3, 6))]
    take = maintain._take_shard

    def press_ctrl_c(folder: Path, *rest: Any) -> None:
        if folder == parts[1]:
            signal.raise_signal(signal.SIGINT)
        take(folder, *rest)

    monkeypatch.setattr(maintain, "_take_shard", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        merge(parts, tmp_path / "all")
    assert "3 records are safe in" in capsys.readouterr().err
    assert ids(open_store(tmp_path / "all")) == [f"text-{number:04d}" for number in range(3)]
    monkeypatch.undo()
    merge(parts, tmp_path / "all")
    assert len(open_store(tmp_path / "all")) == 6


def large_rows(folder: Path, numbers: range, **facts: object) -> Path:
    """A folder whose shard is too large to be joined with others."""
    layout = store_jobs.rows_manifest().model_copy(update={"facts": facts})
    with RowWriter(folder, layout) as writer:
        for number in numbers:
            writer.write({"prompt_id": f"p{number}", "index": 0, "response": str(number), "extra": None})
        writer.finish()
    return folder


def inodes(folder: Path) -> dict[int, str]:
    return {path.stat().st_ino: path.name for path in folder.glob("shard-*.parquet")}


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("texts", ["the same texts", "other texts"])
def test_merge_takes_large_shards_as_they_are(
    tmp_path: Path, linked: bool, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = large_rows(tmp_path / "a", range(9000), prompts_fingerprint="the same texts")
    second = large_rows(tmp_path / "b", range(9000, 18_100), prompts_fingerprint=texts)
    small = large_rows(tmp_path / "c", range(18_000, 18_200), prompts_fingerprint=texts)
    if not linked:

        def refuse(*arguments: object) -> None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "link", refuse)
    encoded: list[int] = []
    encode = shard_writer.encode_shard

    def noted(items: list[Any], *rest: Any, **options: Any) -> Any:
        encoded.append(len(items))
        return encode(items, *rest, **options)

    monkeypatch.setattr(shard_writer, "encode_shard", noted)
    joined = merge([first, second, small], tmp_path / "all")
    assert encoded == [100]
    assert joined.complete
    assert [row["response"] for row in open_rows(tmp_path / "all")] == [str(number) for number in range(18_200)]
    assert verify(tmp_path / "all").problems == []
    shared = inodes(tmp_path / "all").keys() & {**inodes(first), **inodes(second)}.keys()
    assert len(shared) == (2 if linked else 0)
    shutil.rmtree(first)
    assert len(list(open_rows(tmp_path / "all"))) == 18_200
    assert merge([tmp_path / "all"], tmp_path / "again").rows == 18_200
    assert len(list(open_rows(tmp_path / "again"))) == 18_200


def test_merge_refuses_large_shards_that_disagree_and_does_not_link_a_damaged_one(tmp_path: Path) -> None:
    first = large_rows(tmp_path / "a", range(9000))
    with RowWriter(tmp_path / "b", store_jobs.rows_manifest()) as writer:
        writer.write({"prompt_id": "p8999", "index": 0, "response": "another", "extra": None})
    with pytest.raises(MismatchError, match=r"expected the same \('p8999', 0\) in all parts"):
        merge([first, tmp_path / "b"], tmp_path / "all")
    assert not (tmp_path / "all").exists()
    shard = first / "shard-000000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"shard-000000\.parquet is damaged"):
        merge([first], tmp_path / "all")
    assert list((tmp_path / "all").glob("shard-*")) == []


def test_a_shard_that_a_killed_merge_has_linked_and_not_listed_is_taken_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        large_rows(tmp_path / name, numbers, prompts_fingerprint=name)
        for name, numbers in {"a": range(9000), "b": range(9000, 18_000)}.items()
    ]
    link = shard_writer.link_or_copy

    def killed(*arguments: Path) -> bool:
        link(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(shard_writer, "link_or_copy", killed)
    with pytest.raises(KeyboardInterrupt):
        merge(parts, tmp_path / "all")
    assert len(inodes(tmp_path / "all")) == 1
    assert len(open_rows(tmp_path / "all")) == 0
    monkeypatch.undo()
    assert merge(parts, tmp_path / "all").rows == 18_000
    assert "recovered 9000 rows of shards" in capsys.readouterr().err
    assert [row["response"] for row in open_rows(tmp_path / "all")] == [str(number) for number in range(18_000)]
    assert list((tmp_path / "all").glob("orphan-*")) == []
