"""A manifest is refused as what it is: damaged, missing, of another kind, or of a later version."""

import json
from pathlib import Path

import pytest
import store_jobs
from store_contents import make_store
from store_samples import manifest, table

from fusion_plugins.errors import StoreError
from fusion_plugins.store import RowWriter, StoreWriter, open_rows, open_store
from fusion_plugins.store.manifest import load_manifest


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
    with pytest.raises(StoreError, match="got a folder without manifest.json"):
        open_store(sound)
    with pytest.raises(StoreError, match="expected an empty folder or a store, got shard-000000.parquet"):
        StoreWriter(sound, manifest(), table())


def test_a_folder_of_the_other_kind_is_refused_as_what_it_is(sound: Path, tmp_path: Path) -> None:
    RowWriter(tmp_path / "rows", store_jobs.rows_manifest()).close()
    with pytest.raises(
        StoreError, match="expected the manifest of a store of log.*, got a folder of responses or scored"
    ):
        open_store(tmp_path / "rows")
    with pytest.raises(StoreError, match="expected the manifest of a folder of responses or .*, got a store of log"):
        open_rows(sound)
    (sound / "manifest.json").write_text('{"kind": "other", "schema_version": 1}')
    with pytest.raises(StoreError, match="expected the manifest of a store of log-probabilities, got the kind 'other'"):
        load_manifest(sound)


@pytest.mark.parametrize("kind", ["logprobs", "rows"])
def test_a_sound_folder_of_a_later_version_is_not_called_damaged(tmp_path: Path, kind: str) -> None:
    newer = {"kind": kind, "schema_version": 9, "made_by": "fusion-plugins 7.0", "something_new": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(StoreError, match=r"version 1 to \d, got 9. .* sound: use the version that wrote it \(.* 7.0\)"):
        load_manifest(tmp_path)


def test_a_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path, [1])
    text = (tmp_path / "manifest.json").read_text().replace('"schema_version": 4', '"schema_version": 5')
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match="expected schema version 1 to 4, got 5. The folder is sound"):
        open_store(tmp_path)
