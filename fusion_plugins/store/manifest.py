"""The manifest: what a folder holds, how it was made, and which shards belong to it.

It is the only file that is ever replaced, and replacing it is what commits a shard. Before a later step uses a folder
it asks :meth:`ManifestBase.require`, which refuses by name and with the values of both sides.
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

__all__ = ["MANIFEST_NAME", "Manifest", "ManifestBase", "RowManifest", "ShardInfo", "load_manifest"]

MANIFEST_NAME = "manifest.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


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

    #: fields that must be equal before anything may be added to a folder
    IDENTITY: ClassVar[tuple[str, ...]] = ()
    #: version that is written, and the oldest that is still read
    VERSION: ClassVar[int] = 1
    OLDEST: ClassVar[int] = 1

    schema_version: int = Field(default=1, description="the newest layout among the shards")
    complete: bool = Field(default=False, description="everything that was asked for is here")
    created: str = Field(default_factory=_now)
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
        content = [self.identity(), sorted(shard.sha256 for shard in self.shards)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """Return what must be equal before anything may be added."""
        return {name: getattr(self, name) for name in self.IDENTITY}

    @property
    def identity_digest(self) -> str:
        """sha256 of the identity; every shard carries it."""
        return hashlib.sha256(_as_json(self.identity()).encode()).hexdigest()

    def require(self, where: str | Path, cure: str = "", /, **expected: Any) -> None:
        """Refuse when fields differ from what the next step expects.

        Args:
            where: the folder, for the message.
            cure: what to do about it.
            expected: field name -> value; names may also be keys of :meth:`identity`.

        Raises:
            MismatchError: naming every field that differs, with both values.
        """
        identity = self.identity()
        pairs = {name: (identity.get(name, getattr(self, name, None)), value) for name, value in expected.items()}
        wrong = [
            f"{name}: the folder has {came!r}, expected {value!r}"
            for name, (came, value) in pairs.items()
            if _as_json(came) != _as_json(value)
        ]
        if wrong:
            raise MismatchError(f"{where} does not fit. " + "; ".join(wrong) + f". {cure}".rstrip())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the manifest of a folder.

        Raises:
            StoreError: there is none, it is damaged, it is of another kind, or of a version that we cannot read.
        """
        path = folder / MANIFEST_NAME
        found = _read_json(path)
        _refuse_other_kinds(path, found, cls.model_fields["kind"].default)
        version, maker = found.get("schema_version"), found.get("made_by", "it does not say which")
        if isinstance(version, int) and not cls.OLDEST <= version <= cls.VERSION:
            raise StoreError(
                f"{path} has schema version {version}; this version of fusion-plugins reads {cls.OLDEST} to "
                f"{cls.VERSION}. The folder is sound: use the version that wrote it ({maker}), or a newer one."
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
    top_k: int = Field(gt=0, description="entries stored per row")
    temperature: float = Field(default=1.0, gt=0, description="at which the log-probabilities were taken")
    dtype: str = Field(description="dtype in which the model ran")
    texts_fingerprint: str = Field(description="core.texts.texts_fingerprint of the whole text set")
    template_hash: str | None = Field(default=None, description="sha256 of the chat template; None for plain text")
    engine: str = Field(description="transformers | vllm | openai | ...")
    engine_version: str


class RowManifest(ManifestBase):
    """What a folder of responses or scored responses holds."""

    kind: Literal["rows"] = "rows"
    stage: str = Field(description="responses | scored | any name")
    columns: dict[str, Literal["string", "int64", "float64", "bool", "json"]] = Field(
        description="a json column takes any JSON value, including dicts and lists; every column takes None"
    )
    key: tuple[str, ...] = Field(min_length=1, description="columns whose values together name a row")
    facts: dict[str, Any] = Field(
        default_factory=dict, description="what must be equal to go on: sampling and prompt fingerprints, scorers, ..."
    )

    def identity(self) -> dict[str, Any]:
        """Return stage, columns, key and facts, the facts under their own names."""
        return {"stage": self.stage, "columns": self.columns, "key": self.key} | self.facts


def load_manifest(folder: Path) -> Manifest | RowManifest:
    """Read the manifest of a folder of either kind.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    is_rows = _read_json(folder / MANIFEST_NAME).get("kind") == "rows"
    return RowManifest.load(folder) if is_rows else Manifest.load(folder)


_KINDS = {"logprobs": "a store of log-probabilities", "rows": "a folder of responses or scored responses"}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path.parent} is no store: it has no {MANIFEST_NAME}. Check the path.") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(found, dict):
        raise _damaged(path, f"expected a JSON object, came {type(found).__name__}")
    return found


def _refuse_other_kinds(path: Path, found: dict[str, Any], expected: str) -> None:
    kind = found.get("kind")
    if kind == expected:
        return
    if kind in _KINDS:
        raise StoreError(f"{path.parent} is {_KINDS[kind]}, expected {_KINDS[expected]}. Name the other folder.")
    raise StoreError(f"{path} is no manifest of a store: its kind is {kind!r}. Check the path.")


def _damaged(path: Path, problem: str) -> StoreError:
    return StoreError(
        f"{path} is damaged: {problem}. Restore it from a copy: an older one will do, because rows of shards that it "
        f"does not list are taken in by the next run. Without a copy, make the folder again under another name."
    )
