"""A store may come from a stranger: no file in it names, opens, writes or deletes anything outside of it."""

import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import store_jobs
from store_contents import content, edit_manifest, make_store, record_bytes
from store_samples import manifest, record, table

from fusion_plugins.errors import ConfigError, FusionError, MismatchError, StoreError
from fusion_plugins.store import RowWriter, StoreWriter, open_rows, open_store
from fusion_plugins.store.export import export
from fusion_plugins.store.files import FolderLock, write_atomic
from fusion_plugins.store.maintain import compact, merge, verify

SECRET = "nobody may read, change or delete this"
USES: dict[str, Callable[[Path], Any]] = {
    "read": lambda folder: [record_bytes(item) for item in open_store(folder)],
    "ids": lambda folder: open_store(folder).ids(),
    "verify": lambda folder: verify(folder).problems,
    "drop": lambda folder: verify(folder, drop_damaged=True).problems,
    "compact": compact,
    "merge": lambda folder: merge([folder], folder.with_name("merged")),
    "export": lambda folder: export(folder, folder.with_name("plain")),
    "write": lambda folder: StoreWriter(folder, manifest(), table()).close(),
}
NAMES = [
    "../victim.txt",
    "{victim}",
    "shard-000000.parquet/../../victim.txt",
    "..",
    ".",
    "",
    "manifest.json",
    ".lock",
    "shard-000000.parquet\u0000",
    "shard-000000.parquet\n",
    "shard-\u0660\u0660\u0660\u0660\u0660\u0660.parquet",
    "C:\\victim.txt",
    "CON",
    "shard-0.parquet",
    "SHARD-000000.parquet",
]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim.txt"
    path.write_text(SECRET)
    return path


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """To open a pipe waits for its other end: a test that does so ends here instead of never."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("name", NAMES)
def test_a_shard_has_a_plain_name_or_the_store_is_refused(sound: Path, victim: Path, name: str) -> None:
    edit_manifest(sound, lambda fields: fields["shards"][1].update(name=name.replace("{victim}", str(victim))))
    for use in USES.values():
        with pytest.raises(StoreError, match=r"manifest.json is damaged: shards.1.name: String should match pattern"):
            use(sound)
    assert victim.read_text() == SECRET


def test_rows_have_the_same_strict_names(tmp_path: Path, victim: Path) -> None:
    store_jobs.write_rows(str(tmp_path / "rows"), 6)
    edit_manifest(tmp_path / "rows", lambda fields: fields["shards"][0].update(name="../victim.txt"))
    for use in (open_rows, lambda rows: verify(rows, drop_damaged=True), compact):
        with pytest.raises(StoreError, match=r"shards.0.name"):
            use(tmp_path / "rows")  # type: ignore[operator]
    assert victim.read_text() == SECRET


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields["files"].update({"../victim.txt": "0" * 64}),
        lambda fields: fields["shards"].append(fields["shards"][0]),
        lambda fields: fields["shards"][0].update(rows=-1),
        lambda fields: fields["shards"][0].update(tokens=10**40),
        lambda fields: fields["shards"][0].update(sha256="0"),
        lambda fields: fields["shards"][0].update(version=99),
        lambda fields: fields.update(top_k=0),
        lambda fields: fields.update(vocab_size=-5),
        lambda fields: fields.update(temperature="nan"),
        lambda fields: fields.update(schema_version="4"),
        lambda fields: fields.pop("model"),
        lambda fields: fields.update(more=1),
    ],
)
def test_a_manifest_that_no_writer_makes_is_refused(sound: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_manifest(sound, change)
    with pytest.raises(StoreError, match=r"manifest.json is damaged: "):
        open_store(sound)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"[" * 200_000, "deep in each other"),
        (b'{"provenance": ' * 140 + b"1" + b"}" * 140, "at most 128 deep"),
        (b'{"kind": "logprobs", "kind": "rows"}', "'kind' appears twice"),
        (b'{"temperature": NaN}', "finite number, got NaN"),
        (b'{"temperature": 1e999}', "finite number, got 1e999"),
        (b'{"rows": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b'{"model": "\\ud800"}', "surrogates not allowed"),
        (b'{"model": "\xff"}', "invalid start byte"),
        (b"3", "expected a JSON object, got int"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_is_no_manifest_is_named(sound: Path, data: bytes, problem: str) -> None:
    (sound / "manifest.json").write_bytes(data)
    for use in USES.values():
        with pytest.raises(StoreError, match=problem):
            use(sound)


def test_a_manifest_of_a_million_shards_is_not_even_read(sound: Path) -> None:
    with open(sound / "manifest.json", "r+b") as file:
        file.truncate(200 << 20)
    with pytest.raises(StoreError, match="expected at most 67,108,864 bytes, got 209,715,200"):
        open_store(sound)


FIELDS = {
    "model": "other",
    "revision": "main",
    "vocab_size": 299,
    "logits_width": 301,
    "top_k": 3,
    "temperature": 2.0,
    "dtype": "bfloat16",
    "texts_fingerprint": "others",
    "template_hash": "0" * 64,
    "tokenizer_fingerprint": "0" * 64,
}


def test_every_setting_is_tried() -> None:
    assert set(FIELDS) == set(manifest().identity())


@pytest.mark.parametrize("field", FIELDS)
def test_an_edited_setting_is_noticed_and_costs_no_shard(sound: Path, field: str) -> None:
    shards = sorted(sound.glob("shard-*"))
    edit_manifest(sound, lambda fields: fields.update({field: FIELDS[field]}), signed=False)
    for use in USES.values():
        with pytest.raises(StoreError, match="it was edited, or bytes of it changed"):
            use(sound)
    # The forger also made the checksum anew: the shards still carry the settings that they were made with.
    edit_manifest(sound, lambda fields: None)
    for name in ("read", "ids", "compact", "merge", "export"):
        with pytest.raises(MismatchError, match=r"(was made with other settings|One of the two files is of another)"):
            USES[name](sound)
    assert "was made with other settings" in "".join(verify(sound, drop_damaged=True).problems)
    assert sorted(sound.glob("shard-*")) == shards


def test_an_edited_note_or_a_shard_taken_off_the_list_is_noticed(sound: Path) -> None:
    whole = (sound / "manifest.json").read_bytes()
    for change in (
        lambda fields: fields.update(engine="other"),
        lambda fields: fields.update(provenance={"texts": "others"}),
        lambda fields: fields.update(complete=False),
        lambda fields: fields["shards"].pop(),
    ):
        (sound / "manifest.json").write_bytes(whole)
        edit_manifest(sound, change, signed=False)
        with pytest.raises(StoreError, match="it was edited"):
            open_store(sound)


def test_the_checksum_cannot_be_left_out(sound: Path) -> None:
    fields = json.loads((sound / "manifest.json").read_text())
    del fields["checksum"]
    (sound / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(StoreError, match="checksum: expected one, got none"):
        open_store(sound)


def test_a_store_without_checksums_is_read_and_gets_them_when_it_is_written(tmp_path: Path) -> None:
    for version in ("store_v1", "store_v2"):
        folder = shutil.copytree(Path("tests/golden") / version, tmp_path / version)
        before = content(folder)
        assert open_store(folder).manifest.files == {}
        compact(folder)
        assert version == "store_v1" or content(folder) == before  # of version 1, values are rounded
        assert set(open_store(folder).manifest.files) == {"tokens.parquet"}
        assert "checksum" in json.loads((folder / "manifest.json").read_text())
    rows = shutil.copytree(Path("tests/golden/rows_v1"), tmp_path / "rows")
    before = content(rows)
    compact(rows)
    assert content(rows) == before


# Links and things that are no files


@pytest.mark.parametrize("name", ["manifest.json", "tokens.parquet", "shard-000001.parquet"])
def test_a_link_out_of_the_folder_is_not_read(sound: Path, tmp_path: Path, name: str) -> None:
    (sound / name).rename(tmp_path / "elsewhere")
    (sound / name).symlink_to(tmp_path / "elsewhere")
    for use in (lambda: list(open_store(sound)) + [open_store(sound).table], lambda: merge([sound], tmp_path / "m")):
        with pytest.raises(StoreError, match="expected a file of its own folder, got a link to .*elsewhere"):
            use()


def test_the_folder_may_be_a_link_and_its_files_links_within_it(sound: Path, tmp_path: Path) -> None:
    before = content(sound)
    (sound / "shard-000001.parquet").rename(sound / "real")
    (sound / "shard-000001.parquet").symlink_to("real")
    (tmp_path / "way").symlink_to(sound)
    assert content(tmp_path / "way") == before


@pytest.mark.parametrize("below", ["", "stores/llama"])
def test_a_store_in_the_cache_of_the_hub_is_read(sound: Path, tmp_path: Path, below: str) -> None:
    """There, files are links to blobs of the same repository."""
    before = content(sound)
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0123" / below, tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sound.iterdir())):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    (snapshot / ".lock").unlink()
    assert content(snapshot) == before
    (snapshot / "tokens.parquet").unlink()
    (snapshot / "tokens.parquet").symlink_to(blobs / ".." / ".." / "victim.txt")
    (tmp_path / "victim.txt").write_text(SECRET)
    with pytest.raises(StoreError, match="got a link to .*victim.txt"):
        _ = open_store(snapshot).table


@pytest.mark.parametrize("name", [".lock", ".manifest.json.tmp", ".shard-000002.parquet.tmp", "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link"])
def test_no_link_is_followed_when_a_store_is_written(sound: Path, victim: Path, name: str, kind: str) -> None:
    place, missing = sound / name, victim.with_name("not there")
    if name == "manifest.json":
        victim.write_bytes(place.read_bytes())
    before = victim.read_bytes()
    place.unlink(missing_ok=True)
    if kind == "hard link":
        place.hardlink_to(victim)
    else:
        place.symlink_to(victim if kind == "link" else missing)
    with suppress(StoreError), StoreWriter(sound, manifest(), table()) as writer:
        writer.write(record(9))
    for use in USES.values():
        with suppress(FusionError):
            use(sound)
    assert victim.read_bytes() == before
    assert not missing.exists()


def test_a_lock_that_is_a_link_is_named(sound: Path, victim: Path) -> None:
    (sound / ".lock").unlink()
    (sound / ".lock").symlink_to(victim)
    with pytest.raises(StoreError, match=r"\.lock: expected a plain file, got a link"):
        StoreWriter(sound, manifest(), table())


def test_what_a_stranger_wrote_into_a_lock_is_not_repeated(sound: Path) -> None:
    (sound / ".lock").write_bytes(b"process 1 on \x1b[31mhost\n" + b"\xff" * 100)
    lock = FolderLock(sound)
    with pytest.raises(StoreError, match="is being written by another process") as refused:
        FolderLock(sound)
    assert "\x1b" not in str(refused.value)
    lock.close()
    assert (sound / ".lock").read_bytes().endswith(b"\xff")


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path may have a hundred characters
        connection.bind(path.name)
        os.chdir(here)


@pytest.mark.parametrize("name", ["manifest.json", "tokens.parquet", "shard-000001.parquet", ".lock"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, a_socket, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_an_error_and_never_a_hang(sound: Path, name: str, make: Callable[[Path], None]) -> None:
    (sound / name).unlink()
    make(sound / name)
    said = []
    for use in USES.values():
        try:
            said.append(str(use(sound)))
        except FusionError as error:
            said.append(str(error))
    assert re.search(rf"{name}: expected a plain file, got a |{name}: expected a file of its own folder", "".join(said))


def test_a_pipe_that_is_no_listed_shard_is_put_aside(sound: Path) -> None:
    before = content(sound)
    os.mkfifo(sound / "shard-000009.parquet")
    (sound / ".shard-000003.parquet.tmp").mkdir()
    StoreWriter(sound, manifest(), table()).close()
    assert (sound / "orphan-shard-000009.parquet").exists()
    assert content(sound) == before


def test_files_of_others_in_the_folder_are_left_alone(sound: Path) -> None:
    for name in (".notes.tmp", ".manifest.json.old.tmp", "notes.txt"):
        (sound / name).write_text(SECRET)
    StoreWriter(sound, manifest(), table()).close()
    for name in (".notes.tmp", ".manifest.json.old.tmp", "notes.txt"):
        assert (sound / name).read_text() == SECRET


@pytest.mark.parametrize("target", ["folder", "pipe", "/dev/null"])
def test_only_a_file_is_replaced_by_a_file(tmp_path: Path, target: str) -> None:
    path = tmp_path / "out" if target[0] != "/" else tmp_path / "null"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}.get(target, lambda: path.symlink_to(target))()
    with pytest.raises(StoreError, match=r"expected a plain file, got a (folder|pipe|device)"):
        write_atomic(path, "text")
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_link_in_place_of_a_page_is_replaced_and_not_followed(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "page.html").symlink_to(victim)
    write_atomic(tmp_path / "page.html", "<p>ä")
    assert victim.read_text() == SECRET
    assert (tmp_path / "page.html").read_bytes() == "<p>ä".encode()
    assert not (tmp_path / "page.html").is_symlink()


def test_an_export_follows_no_link_and_leaves_a_running_one_alone(sound: Path, tmp_path: Path) -> None:
    elsewhere = make_store(tmp_path / "elsewhere", [1])
    (tmp_path / ".plain.tmp").symlink_to(elsewhere)
    (tmp_path / ".plain.0123456789abcdef.tmp").symlink_to(elsewhere)
    (tmp_path / ".plain.fedcba9876543210.tmp").mkdir()
    assert export(sound, tmp_path / "plain") == 4
    assert len(open_store(elsewhere)) == 1
    assert not (tmp_path / ".plain.fedcba9876543210.tmp").exists()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    (tmp_path / "new").mkdir()
    with pytest.raises(ConfigError, match="which is a link"):
        export(sound, tmp_path / "link")


def test_two_exports_into_one_folder_give_one_whole_export(sound: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The second begins while the first is about to write."""
    from fusion_plugins.store import export as module

    real, ends = module.write_atomic, []

    def write(path: Path, data: memoryview) -> None:
        monkeypatch.setattr(module, "write_atomic", real)
        ends.append(export(sound, tmp_path / "plain"))
        real(path, data)

    monkeypatch.setattr(module, "write_atomic", write)
    with pytest.raises(StoreError, match="cannot write .*plain"):
        export(sound, tmp_path / "plain")
    assert ends == [4]
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["data-00000.parquet"]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".plain")]


def test_a_key_that_is_no_column_is_refused_when_the_manifest_is_read(tmp_path: Path) -> None:
    store_jobs.write_rows(str(tmp_path), 3)
    for key in (["other"], ["prompt_id", "extra"]):  # a json column may hold what cannot be looked up
        edit_manifest(tmp_path, lambda fields, key=key: fields.update(key=key))
        for use in (open_rows, lambda rows: RowWriter(rows, store_jobs.rows_manifest())):
            with pytest.raises(StoreError, match=r"manifest.json is damaged: key: expected columns that are declared"):
                use(tmp_path)  # type: ignore[operator]


def test_a_store_that_was_merged_many_times_can_be_read(tmp_path: Path) -> None:
    """Every merge keeps the notes of its parts within its own."""
    folder = make_store(tmp_path / "0", [1])
    for number in range(1, 12):
        merge([folder], tmp_path / str(number))
        folder = tmp_path / str(number)
    assert len(open_store(folder)) == 1


def test_a_token_table_of_many_gigabytes_is_not_read(sound: Path) -> None:
    with open(sound / "tokens.parquet", "r+b") as file:
        file.truncate(1 << 40)
    for use in (USES["verify"], USES["merge"]):
        with suppress(StoreError):
            assert "expected at most 268,435,456 bytes" in "".join(use(sound))
    with pytest.raises(StoreError, match="expected at most 268,435,456 bytes"):
        _ = open_store(sound).table
