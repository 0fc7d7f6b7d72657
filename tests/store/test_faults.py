"""A store survives kill -9 anywhere, Ctrl-C, a full disk and a second writer; damage is refused by name."""

import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import store_jobs
from store_contents import content, record_bytes, store_or_rows
from store_samples import manifest, record, table

from fusion_plugins.core.fusion.types import Record
from fusion_plugins.errors import MismatchError, StoreError
from fusion_plugins.store import RowWriter, StoreWriter, open_rows, open_store
from fusion_plugins.store.maintain import merge, verify
from fusion_plugins.store.manifest import load_manifest

JOBS = str(Path(store_jobs.__file__))
KILLS = 20


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, JOBS, *map(str, arguments)]
    return subprocess.Popen(command, text=True, env=environment(), **options)


class JobServer:
    def __init__(self) -> None:
        self.process = start("serve", stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, kill_at: str, *arguments: object) -> tuple[int, int, int]:
        """Run a job in a process of its own; return its status, the calls it made, and those that change files."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(" ".join(map(str, (kill_at, *arguments))) + "\n")
        self.process.stdin.flush()
        status, calls, file_calls = map(int, self.process.stdout.readline().split())
        return status, calls, file_calls


@pytest.fixture(scope="module")
def jobs() -> Iterator[JobServer]:
    server = JobServer()
    yield server
    assert server.process.stdin
    server.process.stdin.close()
    server.process.wait()


@pytest.mark.parametrize("job", ["write_store", "write_rows", "merge"])
def test_killed_anywhere_the_next_run_ends_with_the_same_content(jobs: JobServer, tmp_path: Path, job: str) -> None:
    parts: list[object] = []
    if job == "merge":
        parts = [tmp_path / "a", tmp_path / "b"]
        for part, (first, last) in zip(parts, [(0, 14), (10, store_jobs.N_ITEMS)], strict=True):
            assert jobs.run("never", "write_store", part, first, last)[0] == 0
    status, calls, file_calls = jobs.run("never", job, tmp_path / "whole", *parts)
    assert status == 0
    expected = content(tmp_path / "whole")
    assert len(expected) == store_jobs.N_ITEMS
    rng = random.Random(job)
    points = [str(point) for point in rng.sample(range(1, calls), KILLS // 2)]
    points += [f"f{point}" for point in rng.sample(range(1, file_calls), KILLS // 2)]
    for kill_at in points:
        folder = tmp_path / f"killed-{kill_at}"
        assert jobs.run(kill_at, job, folder, *parts)[0] == -signal.SIGKILL
        if (folder / "manifest.json").exists():
            assert set(map(str, content(folder))) <= set(map(str, expected))
        assert jobs.run("never", job, folder, *parts)[0] == 0
        assert content(folder) == expected
        left = sorted(path.name for path in folder.iterdir() if path.name not in {"manifest.json", "tokens.parquet"})
        assert left == [".lock", *sorted(shard.name for shard in store_or_rows(folder).manifest.shards)]


def test_ctrl_c_keeps_the_batch_and_a_second_writer_is_refused(tmp_path: Path) -> None:
    writer = start("write_store", tmp_path, 0, 300, 0.2, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout
    writer.stdout.readline()
    with pytest.raises(StoreError, match=rf"is being written by process {writer.pid} on "):
        StoreWriter(tmp_path, manifest(), table())
    writer.send_signal(signal.SIGINT)
    _, errors = writer.communicate(timeout=60)
    assert writer.returncode == 130
    found = re.search(r"Stopped\. (\d+) records are safe in .*; run the same command again", errors)
    assert found
    assert int(found[1]) == len(open_store(tmp_path)) >= store_jobs.BATCH
    StoreWriter(tmp_path, manifest(), table()).close()


def test_a_full_disk_keeps_what_was_there_before(tmp_path: Path) -> None:
    small = tmp_path / "limited"
    full = start("fill_disk", small, 7000, stderr=subprocess.PIPE)
    _, errors = full.communicate(timeout=60)
    assert full.returncode == 1
    assert re.search(
        r"StoreError: cannot write .*shard-\d+.parquet: File too large\. What was written before is kept", errors
    )
    kept = open_store(small)
    assert 0 < len(kept) < store_jobs.N_ITEMS or len(kept.manifest.shards) > 1
    assert verify(small).problems == []
    assert list(small.glob("*.tmp")) == list(small.glob(".*.tmp")) == []
    store_jobs.write_store(str(small))
    assert content(small) == sorted(record_bytes(read_back(tmp_path, number)) for number in range(store_jobs.N_ITEMS))


def read_back(folder: Path, number: int) -> Record:
    """A record as any store gives it back."""
    one = folder / f"one-{number}"
    with StoreWriter(one, manifest(), table()) as writer:
        writer.write(record(number))
    return open_store(one)[f"text-{number:04d}"]


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    with StoreWriter(folder, manifest(), table(), flush_records=2) as writer:
        for number in range(4):
            writer.write(record(number))
        writer.finish()
    return folder


def test_every_damaged_byte_of_a_shard_is_noticed(sound: Path) -> None:
    shard = sound / "shard-000001.parquet"
    data = shard.read_bytes()
    for place in random.Random(0).sample(range(len(data)), 25):
        shard.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(StoreError, match=r"shard-000001.parquet is damaged: "):
            list(open_store(sound))
    shard.write_bytes(data)
    assert len(list(open_store(sound))) == 4


@pytest.mark.parametrize("damage", ["short", "gone", "changed"])
def test_a_damaged_shard_is_refused_everywhere_and_can_be_made_again(sound: Path, damage: str) -> None:
    whole = content(sound)
    shard = sound / "shard-000000.parquet"
    data = shard.read_bytes()
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(data[:-1] if damage == "short" else data[:100] + b"x" + data[101:])
    uses = [lambda: open_store(sound)["text-0001"], lambda: merge([sound], sound.with_name("merged"))]
    if damage != "changed":  # opening for writing does not read all bytes
        uses.append(lambda: StoreWriter(sound, manifest(), table()))
    for use in uses:
        with pytest.raises(StoreError, match=r"shard-000000.parquet (is damaged|cannot be read).*--drop-damaged"):
            use()
    verdict = verify(sound, drop_damaged=True)
    assert [item.name for item in verdict.damaged] == ["shard-000000.parquet"]
    assert open_store(sound).ids() == ["text-0002", "text-0003"]
    assert not open_store(sound).manifest.complete
    with StoreWriter(sound, manifest(), table()) as writer:
        for number in range(4):
            if f"text-{number:04d}" not in writer.done_ids:
                writer.write(record(number))
        writer.finish()
    assert content(sound) == whole


def test_the_list_of_ids_costs_no_checksum_and_no_row_of_a_damaged_shard_is_handed_out(sound: Path) -> None:
    flip(sound / "shard-000001.parquet", b"PAR1", 1500)
    store = open_store(sound)
    assert store.ids() == [f"text-{number:04d}" for number in range(4)]
    assert store["text-0001"].id == "text-0001"
    for use in (lambda: store["text-0002"], lambda: store.get("text-0003"), lambda: list(store)):
        with pytest.raises(StoreError, match="shard-000001.parquet is damaged: its sha256"):
            use()


def test_a_damaged_id_is_noticed_when_ids_are_listed(sound: Path) -> None:
    """It would be missing without a word otherwise."""
    flip(sound / "shard-000001.parquet", b"text-0002", 5)
    for use in (lambda: "text-0000" in open_store(sound), lambda: StoreWriter(sound, manifest(), table())):
        with pytest.raises(StoreError, match="shard-000001.parquet is damaged: "):
            use()


def flip(path: Path, near: bytes, distance: int) -> None:
    """Change one bit at a distance from the first place where some bytes stand."""
    data = bytearray(path.read_bytes())
    data[data.index(near) + distance] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("length", [0, 1, 200, -3])
def test_a_truncated_manifest_is_refused(sound: Path, length: int) -> None:
    path = sound / "manifest.json"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(StoreError, match=r"manifest.json is damaged: .* Restore it from a copy"):
        open_store(sound)
    with pytest.raises(StoreError, match="is damaged"):
        StoreWriter(sound, manifest(), table())


def test_a_missing_manifest_is_not_taken_for_an_empty_folder(sound: Path) -> None:
    (sound / "manifest.json").unlink()
    with pytest.raises(StoreError, match="it has no manifest.json"):
        open_store(sound)
    with pytest.raises(StoreError, match="holds shard-000000.parquet"):
        StoreWriter(sound, manifest(), table())


def test_the_token_table_of_another_store_is_refused(sound: Path, tmp_path: Path) -> None:
    other = table(301)
    wanted = manifest(tokenizer_fingerprint=other.fingerprint, vocab_size=301)
    StoreWriter(tmp_path / "other", wanted, other).close()
    (sound / "tokens.parquet").write_bytes((tmp_path / "other" / "tokens.parquet").read_bytes())
    with pytest.raises(MismatchError, match="comes from another store"):
        _ = open_store(sound).table
    (sound / "tokens.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError, match="tokens.parquet cannot be read"):
        _ = open_store(sound).table
    assert "tokens.parquet" in verify(sound).problems[0]


def test_a_folder_of_the_other_kind_is_refused_as_what_it_is(sound: Path, tmp_path: Path) -> None:
    RowWriter(tmp_path / "rows", store_jobs.rows_manifest()).close()
    with pytest.raises(StoreError, match="rows is a folder of responses or scored responses, expected a store of log"):
        open_store(tmp_path / "rows")
    with pytest.raises(StoreError, match="store is a store of log-probabilities, expected a folder of responses"):
        open_rows(sound)
    (sound / "manifest.json").write_text('{"kind": "other", "schema_version": 1}')
    with pytest.raises(StoreError, match="is no manifest of a store: its kind is 'other'"):
        load_manifest(sound)


@pytest.mark.parametrize("kind", ["logprobs", "rows"])
def test_a_sound_folder_of_a_later_version_is_not_called_damaged(tmp_path: Path, kind: str) -> None:
    newer = {"kind": kind, "schema_version": 9, "made_by": "fusion-plugins 7.0", "something_new": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(StoreError, match=r"has schema version 9; .* sound: use the version that wrote it \(.* 7.0\)"):
        load_manifest(tmp_path)


def test_a_reader_does_not_see_what_is_not_committed(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, manifest(), table()) as writer:
        writer.write(record(0))
        assert len(open_store(tmp_path)) == 0
        writer.flush()
        assert open_store(tmp_path).ids() == ["text-0000"]


def test_a_worker_checks_what_its_parent_did_not(sound: Path) -> None:
    pickled = pickle.dumps(open_store(sound))
    shard = sound / "shard-000001.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:100] + b"x" + data[101:])
    with pytest.raises(StoreError, match="shard-000001.parquet is damaged"):
        _ = pickle.loads(pickled)["text-0002"]
