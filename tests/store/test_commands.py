"""The commands of ``fusion store``: what they print."""

from pathlib import Path

import pytest
import store_jobs
from store_contents import command, make_store

from fusion_plugins.errors import StoreError
from fusion_plugins.store import RowWriter


def test_the_commands_say_what_they_found(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "store", range(3), finish=False)
    said = command("info", folder)
    for expected in ("top_k", "tiny", "3 in 3 shards", "bytes each", "no: run the command"):
        assert expected in said
    assert "3 records in 3 shards, no problems found" in command("verify", folder)
    (folder / "shard-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError, match="1 problem"):
        command("verify", folder)
    assert "1 damaged shards with 1 records were removed" in command("verify", folder, "--drop-damaged")
    assert "2 records in 2 shards, no problems found" in command("verify", folder)


def test_a_folder_of_rows_has_info_too(tmp_path: Path) -> None:
    RowWriter(tmp_path, store_jobs.rows_manifest()).close()
    assert "responses" in command("info", tmp_path)
