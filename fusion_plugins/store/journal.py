"""The journal: what was committed since the manifest was written as a whole, one line per commit.

To replace the whole manifest for every shard would take the longer the more shards there are. A line says which shards
were added and removed, after which state: that of the manifest, or of the line before. So a journal that belongs to
another manifest shows itself as that, and is ignored: it is what a writer leaves that was stopped after it had written
the manifest anew and before it had deleted the journal.

A line that is not whole at the end is a commit that did not happen. Its shard is on the disk and not listed, as after a
kill before the commit, and the next writer recovers it.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusion_plugins.errors import StoreError
from fusion_plugins.store.files import append_line, plain_file

JOURNAL_NAME = "manifest.log"
#: bytes of the largest journal that is read; a line takes about 400
JOURNAL_BYTES = 1 << 26

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
# A name becomes a path that is read and deleted: a plain name of the one form that writers give, never a path.
ShardName = Annotated[str, Field(pattern=r"^shard-[0-9]{6,12}\.parquet$")]


class ShardInfo(BaseModel):
    """One complete shard."""

    model_config = ConfigDict(frozen=True)

    name: ShardName
    rows: Count
    tokens: Count = Field(description="tokens in a store of log-probabilities, 0 elsewhere")
    bytes: Count = Field(description="size of the file")
    sha256: Sha256 = Field(description="of the file")
    version: int = Field(default=1, ge=1, description="of the layout of its columns")
    identity: Sha256 | None = Field(
        default=None, description="of the folder it was written for, where it was taken from a part of a merge"
    )


class Entry(BaseModel):
    """One commit.

    Attributes:
        after: checksum of the manifest, or of the entry, that it changes.
        removed: names of shards.
        added: shards that take the place of the first that is removed, or the last place.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    after: Sha256
    removed: list[ShardName] = Field(default_factory=list)
    added: list[ShardInfo] = Field(default_factory=list)

    @property
    def checksum(self) -> str:
        """sha256 of all fields."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def applied(self, shards: Sequence[ShardInfo]) -> list[ShardInfo]:
        """Return the shards after the commit."""
        if not self.removed:
            return [*shards, *self.added]
        gone = frozenset(self.removed)
        place = next((index for index, shard in enumerate(shards) if shard.name in gone), len(shards))
        kept = (shard for shard in shards[place:] if shard.name not in gone)
        return [*shards[:place], *self.added, *kept]


def append_entry(folder: Path, entry: Entry) -> None:
    """Add an entry to the journal of a folder; it is on the disk afterwards.

    Raises:
        StoreError: the disk is full or broken.
    """
    line = json.dumps({"entry": entry.model_dump(mode="json"), "checksum": entry.checksum})
    append_line(folder / JOURNAL_NAME, line)


def read_journal(folder: Path) -> bytes:
    """Return the journal of a folder, empty where there is none.

    Read it before the manifest: a writer that writes the manifest anew deletes the journal afterwards.

    Raises:
        StoreError: it is no plain file, or cannot be read.
    """
    path = folder / JOURNAL_NAME
    try:
        file = plain_file(path)
        size = file.stat().st_size
        if size > JOURNAL_BYTES:
            raise _damaged(path, f"expected at most {JOURNAL_BYTES:,} bytes, got {size:,}")
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}. Repair the permission or the disk.") from error


def entries_after(journal: bytes, checksum: str | None, path: Path) -> list[Entry]:
    """Return the entries of a journal that belongs to the manifest with that checksum; none of any other.

    Raises:
        StoreError: a line before the last is damaged.
    """
    *lines, _ = journal.split(b"\n")  # what follows the last end of a line is not whole
    entries: list[Entry] = []
    for number, line in enumerate(lines):
        entry = _entry(line)
        if entry is None and number + 1 == len(lines):
            break
        if entry is None:
            raise _damaged(path, f"line {number + 1} of {len(lines)} is not what was written")
        expected = entries[-1].checksum if entries else checksum
        if entry.after != expected and entries:
            raise _damaged(path, f"line {number + 1} does not follow the line before")
        if entry.after != expected:
            return []
        entries.append(entry)
    return entries


def _entry(line: bytes) -> Entry | None:
    try:
        found = json.loads(line)
        entry = Entry.model_validate(found["entry"])
        return entry if entry.checksum == found["checksum"] else None
    except (ValueError, RecursionError, TypeError, KeyError, ValidationError):
        return None


def applied(entries: Collection[Entry], shards: Sequence[ShardInfo]) -> list[ShardInfo]:
    """Return the shards of a folder after all entries of its journal."""
    found = list(shards)
    for entry in entries:
        if entry.removed:
            found = entry.applied(found)
        else:
            found += entry.added
    return found


def _damaged(path: Path, problem: str) -> StoreError:
    return StoreError(
        f"{path} is damaged: {problem}. Restore it from a copy; or delete it: the next run recovers the shards that "
        "only it lists."
    )
