"""The manifest: what a folder holds, how it was made, and which shards belong to it.

It is the only file that is ever replaced, and replacing it is what commits a shard. A step that uses a folder first
calls :meth:`ManifestBase.require`, which names every setting that differs, with both values.
"""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import fusion_plugins
from fusion_plugins.errors import MismatchError, StoreError
from fusion_plugins.store.files import write_atomic

MANIFEST_NAME = "manifest.json"
#: the source tokenizer's tokens, in a store of log-probabilities
TABLE_NAME = "tokens.parquet"
_KINDS = {"logprobs": "a store of log-probabilities", "rows": "a folder of responses or scored responses"}

#: what a column of a row folder holds
ColumnKind = Literal["string", "int64", "float64", "bool", "json"]


class ShardInfo(BaseModel):
    """One complete shard."""

    model_config = ConfigDict(frozen=True)

    name: str
    rows: int
    tokens: int = Field(description="tokens in a store of log-probabilities, 0 elsewhere")
    bytes: int = Field(description="size of the file")
    sha256: str = Field(description="of the file")
    version: int = Field(default=1, description="of the layout of its columns")


class ManifestBase(BaseModel):
    """What every folder with shards has in common."""

    model_config = ConfigDict(extra="forbid")

    #: what the folder holds, for messages
    NOUN: ClassVar[str] = "rows"
    #: fields that must be equal before anything may be added to a folder
    IDENTITY: ClassVar[tuple[str, ...]] = ()
    #: version that is written, and the oldest that is still read
    VERSION: ClassVar[int] = 1
    OLDEST: ClassVar[int] = 1

    schema_version: int = Field(default=1, description="the newest layout among the shards")
    complete: bool = Field(default=False, description="everything that was asked for is there")
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    made_by: str = f"fusion-plugins {fusion_plugins.__version__}"
    provenance: dict[str, Any] = Field(default_factory=dict, description="free notes; never checked, never secrets")
    shards: list[ShardInfo] = Field(default_factory=list)

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
        """sha256 of identity and shards: changes whenever the content does (and when shards are joined)."""
        return _digest([self.identity(), sorted(shard.sha256 for shard in self.shards)])

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
        found = _read_json(path)
        kind, expected = found.get("kind"), cls.model_fields["kind"].default
        if kind != expected:
            got = _KINDS.get(str(kind), f"the kind {kind!r}")
            raise StoreError(f"{path}: expected the manifest of {_KINDS[expected]}, got {got}. Name another folder.")
        # Before the fields are looked at: a later version may have other ones, and its folder is not damaged.
        version, maker = found.get("schema_version"), found.get("made_by", "it does not say which")
        if isinstance(version, int) and not cls.OLDEST <= version <= cls.VERSION:
            raise StoreError(
                f"{path}: this version of fusion-plugins expected schema version {cls.OLDEST} to {cls.VERSION}, got "
                f"{version}. The folder is sound: use the version that wrote it ({maker}), or a newer one."
            )
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            problem = error.errors()[0]
            at = ".".join(str(part) for part in problem["loc"])
            raise _damaged(path, f"{at}: {problem['msg']}") from error

    def save(self, folder: Path) -> None:
        """Replace the manifest of a folder atomically."""
        write_atomic(folder / MANIFEST_NAME, self.model_dump_json(indent=1).encode())


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
    VERSION = 2

    kind: Literal["logprobs"] = "logprobs"
    model: str = Field(description="name or path of the source model")
    revision: str | None = Field(default=None, description="commit or tag of the model")
    tokenizer_fingerprint: str = Field(description="TokenTable.fingerprint")
    vocab_size: int = Field(description="tokens in the tokenizer")
    logits_width: int = Field(description="columns of the model's head; may exceed vocab_size")
    top_k: int = Field(gt=0, description="entries stored per position")
    temperature: float = Field(default=1.0, gt=0, description="at which the log-probabilities were taken")
    dtype: str = Field(description="dtype in which the model ran")
    texts_fingerprint: str = Field(description="content_id.texts_fingerprint of all texts")
    template_hash: str | None = Field(default=None, description="sha256 of the chat template; None for plain text")
    engine: str = Field(description="transformers | vllm | openai | ...")
    engine_version: str


class RowManifest(ManifestBase):
    """What a folder of responses or scored responses holds."""

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


def load_manifest(folder: Path) -> Manifest | RowManifest:
    """Return the manifest of a folder of either kind.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    is_rows = _read_json(folder / MANIFEST_NAME).get("kind") == "rows"
    return RowManifest.load(folder) if is_rows else Manifest.load(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        got = f"a folder without {MANIFEST_NAME}" if path.parent.is_dir() else "no folder"
        raise StoreError(
            f"{path.parent}: expected a store or a folder of responses, got {got}. Give the folder that `fusion "
            f"capture`, `sample` or `score` wrote."
        ) from None
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error.strerror or error}. Repair the permission or the disk."
        ) from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(found, dict):
        raise _damaged(path, f"expected a JSON object, got {type(found).__name__}")
    return found


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _digest(value: Any) -> str:
    return hashlib.sha256(_as_json(value).encode()).hexdigest()


def _damaged(path: Path, problem: str) -> StoreError:
    return StoreError(
        f"{path} is damaged: {problem}. Restore it from a copy: an older one will do, because the next run recovers "
        f"the shards that it does not list. Without a copy, make the folder again under another name."
    )
