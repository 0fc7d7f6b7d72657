"""Datasets of the Hugging Face hub in the place of files: ``hf:ORG/NAME[/CONFIG][@REVISION][:SPLIT][:COLUMN]``.

A folder that ``datasets`` can load may stand in the place of the name, as in ``hf:./folder:train:content``. Small sets
are downloaded once, into the cache of ``datasets``; large ones, and those of which nobody knows the size, are streamed,
so that they take no disk. The files are those of one commit: the name is looked up once in a run.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.install import missing_package_error
from fusion_plugins.model_names import reason_of
from fusion_plugins.redaction import without_credentials

PREFIX = "hf:"
#: bytes of a dataset beyond which it is streamed
STREAMED_BYTES = 5 << 30
#: columns without which a row is neither a text, nor a prompt, nor a response
CONTENTS = ("text", "messages", "prompt", "response")
_FORM = re.compile(r"hf:(?P<name>[^:@]+)(@(?P<revision>[^:]+))?(:(?P<split>[^:]*))?(:(?P<column>[^:]+))?")


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset.

    Attributes:
        name: organisation and name, or a folder.
        config: name of the configuration; None for the only one.
        revision: branch, tag or commit; None for the main branch.
        split: such as train.
        column: the column that takes the place of `text` or `messages`; None where one of them is there.
    """

    name: str
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    column: str | None = None


def is_hub(path: str | Path) -> bool:
    """Return whether a path names a dataset of the hub."""
    return str(path).startswith(PREFIX)


def hub_dataset(path: str | Path) -> HubDataset:
    """Return the parts of a name.

    Raises:
        ConfigError: it has another form.

    Example:
        >>> hub_dataset("hf:allenai/tulu-3-sft-mixture")
        HubDataset(name='allenai/tulu-3-sft-mixture', config=None, revision=None, split='train', column=None)
        >>> hub_dataset("hf:openai/gsm8k/main@v1:test:question")
        HubDataset(name='openai/gsm8k', config='main', revision='v1', split='test', column='question')
    """
    found = _FORM.fullmatch(str(path))
    if found is None:
        raise ConfigError(
            f"expected hf:ORG/NAME[/CONFIG][@REVISION][:SPLIT][:COLUMN], got {str(path)!r:.200}. Correct the name."
        )
    name, config = found["name"], None
    if not Path(name).is_dir() and name.count("/") == 2 and not name.startswith((".", "/")):
        name, _, config = name.rpartition("/")
    return HubDataset(name, config, found["revision"], found["split"] or "train", found["column"])


def hub_rows(
    path: str | Path, columns: Sequence[str] | None = None, *, needed: Sequence[str] = CONTENTS
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and content of every row; rows are counted from 1.

    Args:
        path: the name.
        columns: what to read, besides the column that the name gives; None for all.
        needed: names of which one has to be there, if the name gives no column.

    Raises:
        ConfigError: the name has another form, or ``datasets`` is not installed.
        DataError: the dataset or a part of it cannot be loaded, or it lacks the column.
    """
    wanted = hub_dataset(path)
    rows = _opened(wanted)
    names = rows.column_names  # unknown before the first row of some streams
    others: dict[str, Any] = {}
    if names is not None:
        _require_columns(path, wanted, names, needed)
        read = [name for name in names if columns is None or name in columns or name == wanted.column]
        rows = rows.select_columns(read) if read else rows
        # Columns that are not read are there all the same, as those of Parquet files are.
        others = dict.fromkeys(name for name in names if read and name not in read)
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            if names is None and number == 1:
                _require_columns(path, wanted, row, needed)
            yield f"{path}:{number}", others | _named(row, wanted.column)
    except DataError:
        raise
    except Exception as error:  # readers of many formats fail in as many ways
        raise DataError(
            f"{path}: row {number + 1} cannot be read: {_reason(error)}. Check the network, or leave the dataset out."
        ) from error


def hub_fingerprint(path: str | Path) -> str:
    """Return what changes when the dataset does: its name and the commit.

    Raises:
        ConfigError, DataError: as for :func:`hub_rows`.
    """
    wanted = hub_dataset(path)
    builder = _builder(wanted)
    return f"{path} {builder.hash} {builder.config_id}"


def _require_columns(path: str | Path, wanted: HubDataset, names: Any, needed: Sequence[str]) -> None:
    if wanted.column is not None:
        missing = wanted.column not in names
    else:
        missing = not any(name in names for name in needed)
    if missing:
        expected = f"a column {wanted.column!r}" if wanted.column else f"a column {' or '.join(needed[:2])}"
        raise DataError(
            f"{path}: expected {expected}, got {', '.join(names)}. Name the column: "
            f"hf:{wanted.name}:{wanted.split}:COLUMN."
        )


def _named(row: dict[str, Any], column: str | None) -> dict[str, Any]:
    """Return a row whose named column is its text or its messages; what had that name is in the way no more."""
    if column is None:
        return row
    value = row[column]
    rest = {name: item for name, item in row.items() if name not in (column, "text", "messages")}
    return {**rest, "text" if isinstance(value, str) or value is None else "messages": value}


@lru_cache(maxsize=8)
def _builder(wanted: HubDataset) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise missing_package_error(error, f"{PREFIX}{wanted.name}") from error
    try:
        return datasets.load_dataset_builder(wanted.name, wanted.config, revision=wanted.revision)
    except Exception as error:
        raise _not_loaded(wanted, error) from error


@lru_cache(maxsize=8)
def _opened(wanted: HubDataset) -> Any:
    builder = _builder(wanted)
    folder = Path(wanted.name)
    if folder.is_dir():
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    else:
        size = builder.info.download_size or builder.info.dataset_size
    try:
        if size is not None and size <= STREAMED_BYTES:
            builder.download_and_prepare()
            return builder.as_dataset(split=wanted.split)
        return builder.as_streaming_dataset(split=wanted.split)
    except Exception as error:
        raise _not_loaded(wanted, error) from error


def _reason(error: Exception) -> str:
    # `datasets` says that something failed, and only in the cause what.
    # Addresses of files are signed: their queries are as good as a token.
    return without_credentials(reason_of(error.__cause__ if error.__cause__ is not None else error))


def _not_loaded(wanted: HubDataset, error: Exception) -> DataError:
    return DataError(
        f"the dataset {wanted.name!r} (split {wanted.split}) cannot be loaded: {_reason(error)}. Check name, "
        "configuration and split, the network, and for gated sets `hf auth login`."
    )
