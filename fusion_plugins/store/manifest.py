"""The manifest: what a folder holds, how it was made, and which shards belong to it.

Replacing it, or adding a line to the journal beside it, is what commits a shard. A step that uses a folder first calls
:meth:`ManifestBase.require`, which names every setting that differs, with both values.

A folder may come from a stranger, so a manifest is read as untrusted input: every name in it has one strict form, every
number has bounds, and a checksum over all fields shows an edit.
"""

import hashlib
import json
import math
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import fusion_plugins
from fusion_plugins.errors import MismatchError, StoreError
from fusion_plugins.store.files import plain_file, write_atomic
from fusion_plugins.store.journal import JOURNAL_NAME, Sha256, applied, entries_after, read_journal
from fusion_plugins.store.journal import ShardInfo as ShardInfo

MANIFEST_NAME = "manifest.json"
#: bytes of the largest manifest that is read; a shard takes about 200
MANIFEST_BYTES = 1 << 26
#: how deep values may lie in each other; only the notes nest, three levels more for each merge of merged stores
MANIFEST_DEPTH = 128
#: key of `provenance`: which part of the texts or prompts a run was for, as `i/n`
PART = "part"
#: the source tokenizer's tokens, in a store of log-probabilities
TABLE_NAME: Literal["tokens.parquet"] = "tokens.parquet"
_KINDS = {"logprobs": "a store of log-probabilities", "rows": "a folder of responses or scored responses"}

#: what a column of a row folder holds
ColumnKind = Literal["string", "int64", "float64", "bool", "json", "int32s", "float32s"]
Size = Annotated[int, Field(ge=1, lt=1 << 31)]


class ManifestBase(BaseModel):
    """What every folder with shards has in common."""

    model_config = ConfigDict(extra="forbid")

    #: what the folder holds, for messages
    NOUN: ClassVar[str] = "rows"
    #: fields that must be equal before anything may be added to a folder
    IDENTITY: ClassVar[tuple[str, ...]] = ()
    #: version of the manifest that is written, and the oldest that is still read
    VERSION: ClassVar[int] = 1
    OLDEST: ClassVar[int] = 1
    #: version from which on there are checksums of the manifest itself and of the other files
    CHECKED: ClassVar[int] = 1
    #: layout of the shards that are written
    LAYOUT: ClassVar[int] = 1

    schema_version: int = Field(default=1, description="of the manifest")
    complete: bool = Field(default=False, description="everything that was asked for is there")
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    made_by: str = f"fusion-plugins {fusion_plugins.__version__}"
    provenance: dict[str, Any] = Field(default_factory=dict, description="free notes; never checked, never secrets")
    files: dict[Literal["tokens.parquet"], Sha256] = Field(
        default_factory=dict, description="sha256 of each other file of the folder; empty in one of an older version"
    )
    shards: list[ShardInfo] = Field(default_factory=list)
    joined: list[Sha256] = Field(
        default_factory=list, description="digests of the identities of the parts of a merge; shards may carry them"
    )

    @property
    def rows(self) -> int:
        """Number of records or rows."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """sha256 of identity, files and shards: changes whenever the content does (and when shards are joined)."""
        return _digest([self.identity(), self.files, sorted(shard.sha256 for shard in self.shards)])

    def identity(self) -> dict[str, Any]:
        """Return what must be equal before anything may be added."""
        return {name: getattr(self, name) for name in self.IDENTITY}

    @property
    def identity_digest(self) -> str:
        """sha256 of the identity; every shard carries it."""
        return _digest(self.identity())

    def require(self, where: str | Path, cure: str = "", /, **expected: Any) -> None:
        """Raise an error when fields differ from what the next step expects.

        Args:
            where: the folder, for the message.
            cure: what to do about it, for the message.
            expected: field name -> value; names may also be keys of :meth:`identity`.

        Raises:
            MismatchError: naming every field that differs, with both values.
        """
        identity = self.identity()
        pairs = {name: (identity.get(name, getattr(self, name, None)), value) for name, value in expected.items()}
        # Compared as JSON, because a value that was read back from the disk has lists where the caller's has tuples.
        wrong = [
            f"{name}: the folder has {found!r}, expected {value!r}"
            for name, (found, value) in pairs.items()
            if _as_json(found) != _as_json(value)
        ]
        if wrong:
            raise MismatchError(f"{where} does not fit. " + "; ".join(wrong) + f". {cure}".rstrip())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Return the manifest of a folder.

        Raises:
            StoreError: there is none, it is damaged, it is of another kind, or of a version that we cannot read.
        """
        path = folder / MANIFEST_NAME
        journal = read_journal(folder)
        found = _read_json(path)
        kind, expected = found.get("kind"), cls.model_fields["kind"].default
        if kind != expected:
            got = _KINDS.get(str(kind), f"the kind {kind!r}")
            raise StoreError(f"{path}: expected the manifest of {_KINDS[expected]}, got {got}. Name another folder.")
        # Before the fields are looked at: a later version may have other ones, and its folder is not damaged.
        version, maker = found.get("schema_version"), found.get("made_by", "it does not say which")
        if type(version) is not int:
            raise _damaged(path, f"schema_version: expected a number, got {version!r:.40}")
        if not cls.OLDEST <= version <= cls.VERSION:
            raise StoreError(
                f"{path}: this version of fusion-plugins expected schema version {cls.OLDEST} to {cls.VERSION}, got "
                f"{version}. The folder is sound: use the version that wrote it ({maker}), or a newer one."
            )
        checksum = found.pop("checksum", None)
        if checksum is None and version >= cls.CHECKED:
            raise _damaged(path, "checksum: expected one, got none")
        if checksum is not None and checksum != _digest(found):
            raise _damaged(path, "it was edited, or bytes of it changed: its checksum is that of another content")
        try:
            manifest = cls.model_validate(found)
        except ValidationError as error:
            problem = error.errors(include_input=False, include_url=False)[0]
            at = ".".join(str(part) for part in problem["loc"])
            raise _damaged(path, f"{at:.200}: {problem['msg']:.200}") from error
        entries = entries_after(journal, checksum, folder / JOURNAL_NAME)
        manifest.shards = applied(entries, manifest.shards)
        problem_found = manifest.problem()
        if problem_found:
            raise _damaged(path, problem_found)
        return manifest

    def problem(self) -> str | None:
        """Return what is wrong with a manifest whose fields are valid one by one, or None."""
        twice = [name for name, count in Counter(shard.name for shard in self.shards).items() if count > 1]
        if twice:
            return f"shards: {twice[0]} is listed more than once"
        newest = max((shard.version for shard in self.shards), default=1)
        if newest > self.LAYOUT:
            return f"shards: expected layouts up to version {self.LAYOUT}, got {newest}"
        return None

    def save(self, folder: Path) -> str:
        """Replace the manifest of a folder atomically, delete the journal, and return the checksum.

        It is written in the current version.
        """
        fields = json.loads(self.model_dump_json()) | {"schema_version": self.VERSION}
        checksum = _digest(fields)
        text = json.dumps(fields | {"checksum": checksum}, indent=1, ensure_ascii=False)
        if len(text) > MANIFEST_BYTES:
            raise StoreError(
                f"{folder}: expected a manifest of at most {MANIFEST_BYTES:,} bytes, got {len(text):,}. What was "
                f"written before is kept; write the rest into a folder of its own."
            )
        write_atomic(folder / MANIFEST_NAME, text)
        with suppress(OSError):  # it belongs to another manifest now; the next save deletes it
            (folder / JOURNAL_NAME).unlink(missing_ok=True)
        return checksum


class Manifest(ManifestBase):
    """What a store of log-probabilities holds."""

    NOUN = "records"
    IDENTITY = (
        "model",
        "revision",
        "tokenizer_fingerprint",
        "vocab_size",
        "logits_width",
        "top_k",
        "temperature",
        "dtype",
        "texts_fingerprint",
        "template_hash",
    )
    VERSION = 4
    CHECKED = LAYOUT = 3

    kind: Literal["logprobs"] = "logprobs"
    model: str = Field(description="name or path of the source model")
    revision: str | None = Field(default=None, description="commit or tag of the model")
    tokenizer_fingerprint: str = Field(description="TokenTable.fingerprint")
    vocab_size: Size = Field(description="tokens in the tokenizer")
    logits_width: Size = Field(description="columns of the model's head; may exceed vocab_size")
    top_k: Size = Field(description="entries stored per position")
    temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="at which the log-probabilities were taken"
    )
    dtype: str = Field(description="dtype in which the model ran")
    texts_fingerprint: str = Field(description="content_id.texts_fingerprint of all texts")
    template_hash: str | None = Field(default=None, description="sha256 of the chat template; None for plain text")
    engine: str = Field(description="transformers | vllm | openai | ...")
    engine_version: str


class RowManifest(ManifestBase):
    """What a folder of responses or scored responses holds."""

    VERSION = 3
    CHECKED = 2

    kind: Literal["rows"] = "rows"
    stage: str = Field(description="responses | scored | any name")
    columns: dict[str, ColumnKind] = Field(
        description="a json column takes any JSON value, including dicts and lists; every column takes None"
    )
    key: tuple[str, ...] = Field(min_length=1, description="columns whose values together name a row")
    facts: dict[str, Any] = Field(
        default_factory=dict,
        description="what must be equal to continue: sampling and prompt fingerprints, scorers, ...",
    )

    def identity(self) -> dict[str, Any]:
        """Return stage, columns, key and facts, the facts under their own names."""
        return {"stage": self.stage, "columns": self.columns, "key": self.key} | self.facts

    def problem(self) -> str | None:
        """Return what is wrong with a manifest whose fields are valid one by one, or None."""
        wrong = [name for name in self.key if self.columns.get(name, "json") == "json"]
        if wrong:
            return f"key: expected columns that are declared, of another kind than json, got {wrong[0]!r:.100}"
        return super().problem()


def load_manifest(folder: Path) -> Manifest | RowManifest:
    """Return the manifest of a folder of either kind.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    is_rows = _read_json(folder / MANIFEST_NAME).get("kind") == "rows"
    return RowManifest.load(folder) if is_rows else Manifest.load(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        file = plain_file(path)
        size = file.stat().st_size
        if size > MANIFEST_BYTES:
            raise _damaged(path, f"expected at most {MANIFEST_BYTES:,} bytes, got {size:,}")
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        got = f"a folder without {MANIFEST_NAME}" if path.parent.is_dir() else "no folder"
        raise StoreError(
            f"{path.parent}: expected a store or a folder of responses, got {got}. Give the folder that `fusion "
            f"capture`, `sample` or `score` wrote."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a folder whose name holds a NUL
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"{path} cannot be read: {reason}. Repair the permission or the disk.") from error
    try:
        found = json.loads(
            data.decode(), object_pairs_hook=_without_repeats, parse_constant=_finite, parse_float=_finite
        )
        _check_values(found, MANIFEST_DEPTH)
    except RecursionError:
        raise _damaged(path, f"expected values at most {MANIFEST_DEPTH} deep in each other") from None
    except ValueError as error:
        raise _damaged(path, f"{str(error):.200}") from error
    if not isinstance(found, dict):
        raise _damaged(path, f"expected a JSON object, got {type(found).__name__}")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # which of the two counts differs from reader to reader
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {name!r:.100} appears twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {text:.40}")
    return value


def _check_values(value: Any, depth: int) -> None:
    """Refuse what the next save could not write, or a terminal or file could not show."""
    if depth < 0:
        raise RecursionError
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for part in value:
            _check_values(part, depth - 1)
    elif isinstance(value, str):
        value.encode()  # UnicodeEncodeError, which is a ValueError, for half a surrogate pair


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _digest(value: Any) -> str:
    return hashlib.sha256(_as_json(value).encode()).hexdigest()


def _damaged(path: Path, problem: str) -> StoreError:
    return StoreError(
        f"{path} is damaged: {problem}. Restore it from a copy: an older one will do, because the next run recovers "
        f"the shards that it does not list. Without a copy, make the folder again under another name."
    )
