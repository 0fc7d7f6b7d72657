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
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise StoreError(f"{folder} is no store: it has no {MANIFEST_NAME}. Check the path.") from None
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors()[0]
            at = ".".join(str(part) for part in problem["loc"])
            raise StoreError(
                f"{path} is damaged or not a {cls.__name__}: {at}{': ' if at else ''}{problem['msg']}. "
                f"Restore it from a copy, or delete the folder and make it again."
            ) from error
        if not cls.OLDEST <= manifest.schema_version <= cls.VERSION:
            raise StoreError(
                f"{path} has schema version {manifest.schema_version}; this version of fusion-plugins reads "
                f"{cls.OLDEST} to {cls.VERSION}. Install the version that wrote it ({manifest.made_by})."
            )
        return manifest

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
    try:
        is_rows = json.loads((folder / MANIFEST_NAME).read_bytes()).get("kind") == "rows"
    except (OSError, ValueError, AttributeError):
        is_rows = False  # the next line says what is wrong
    return RowManifest.load(folder) if is_rows else Manifest.load(folder)
