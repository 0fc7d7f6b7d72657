"""Damage to a shard is noticed before any of it is used, and named."""

import random
from pathlib import Path

import pytest
from store_contents import content, flip
from store_samples import manifest, record, table

from fusion_plugins.errors import StoreError
from fusion_plugins.store import StoreWriter, open_store
from fusion_plugins.store.maintain import merge, verify


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


def test_a_damaged_id_is_noticed_when_ids_are_listed(sound: Path) -> None:
    """It would be missing without a word otherwise."""
    flip(sound / "shard-000001.parquet", b"text-0002", 5)
    for use in (lambda: "text-0000" in open_store(sound), lambda: StoreWriter(sound, manifest(), table())):
        with pytest.raises(StoreError, match="shard-000001.parquet is damaged: "):
            use()
