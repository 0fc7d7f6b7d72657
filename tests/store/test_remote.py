"""`fusion store push` and `pull`: the real client of the hub against a small hub on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import fake_hub
import pytest
import yaml

from fusion_plugins.store import open_store
from fusion_plugins.store.manifest import MANIFEST_NAME, TABLE_NAME

TOKEN = "hf_secretsecretsecretsecretsecretse"


@pytest.fixture(scope="module")
def hub():
    with fake_hub.serving() as server:
        yield server


def fusion(hub, *arguments):
    """Run the command in a process of its own: the client reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    command = [Path(sys.executable).with_name("fusion"), "store", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_a_store_comes_back_as_it_was_pushed(hub, sound, tmp_path):
    (sound / "notes.txt").write_text("not part of the store")
    done = fusion(hub, "push", sound, "org/pushed")
    assert done.returncode == 0, done.stderr
    files = hub.files["org/pushed"]
    shards = {shard.name for shard in open_store(sound).manifest.shards}
    assert set(files) >= {MANIFEST_NAME, TABLE_NAME, "README.md", *shards}
    assert "notes.txt" not in files
    assert hub.private["org/pushed"] is True
    assert f"Bearer {TOKEN}" in hub.tokens
    card = yaml.safe_load(files["README.md"].decode().split("---")[1])
    found = {path for pattern in card["configs"][0]["data_files"] for path in fake_hub.matching(files, pattern)}
    assert found == shards
    done = fusion(hub, "pull", "org/pushed", "--out", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert "4 records" in done.stdout
    assert open_store(tmp_path / "back").manifest.fingerprint == open_store(sound).manifest.fingerprint
    # What is damaged on the way is not taken.
    name = min(shards)
    files[name] = files[name][:-9] + bytes(9)
    done = fusion(hub, "pull", "org/pushed", "--out", tmp_path / "damaged")
    assert done.returncode == 1
    assert "damaged" in done.stderr
    # A later push takes the place of the earlier one, files that it no longer has included.
    files["shard-000099.parquet"] = b"of an earlier push"
    files["data/train.parquet"] = b"of somebody else"
    assert fusion(hub, "push", sound, "org/pushed", "--public").returncode == 0
    assert "shard-000099.parquet" not in hub.files["org/pushed"]
    assert hub.files["org/pushed"].pop("data/train.parquet") == b"of somebody else"
    assert fusion(hub, "pull", "org/pushed", "--out", tmp_path / "again").returncode == 0


def test_what_cannot_be_transferred_is_said_in_one_message(hub, sound, tmp_path):
    done = fusion(hub, "pull", "org/nowhere", "--out", tmp_path / "new")
    assert (done.returncode, done.stderr.count("StoreError")) == (1, 1)
    assert "'org/nowhere' cannot be pulled" in done.stderr
    done = fusion(hub, "pull", "org/pushed", "--out", sound)
    assert "expected a new folder" in done.stderr
    hub.status = 403
    done = fusion(hub, "push", sound, "org/forbidden")
    hub.status = None
    assert (done.returncode, done.stderr.count("StoreError")) == (1, 1)
    assert "hf auth login" in done.stderr
    done = fusion(hub, "push", tmp_path / "nothing", "org/x")
    assert "StoreError" in done.stderr
    hub.files["org/corpus"] = kept = {"README.md": b"a corpus", "data/train.parquet": b"its rows"}
    done = fusion(hub, "push", sound, "org/corpus")
    assert "'org/corpus' holds no folder of this package but data/train.parquet" in done.stderr
    assert hub.files["org/corpus"] == kept == {"README.md": b"a corpus", "data/train.parquet": b"its rows"}
