"""What a folder is: the one place that decides."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from fusion_plugins.chain.rounds import CHAIN_FILE
from fusion_plugins.errors import DataError, StoreError
from fusion_plugins.mergekit.record import RECORD_NAME
from fusion_plugins.store.manifest import MANIFEST_NAME, Manifest, load_manifest
from fusion_plugins.training_files import FUSED_REPORT, PAIRS_REPORT, SFT_REPORT, TRAINING_RECORD

STATE = "trainer_state.json"
DOCTOR = "doctor.json"
#: columns by which responses, and scored ones, are known
RESPONSE_COLUMNS = {"prompt_id", "source", "response"}
SCORE_COLUMNS = {"reward", "correct", "scores"}
#: what a trained model is known by
TRAINING_FILES = (TRAINING_RECORD, FUSED_REPORT, SFT_REPORT, PAIRS_REPORT, STATE)


class Kind(StrEnum):
    """Kinds of folders that have a page."""

    RUN = "run"
    STORE = "store"
    RESPONSES = "responses"
    SCORED = "scored responses"
    MERGED = "merged model"
    TRAINED = "trained model"
    EXAMINED = "output of fusion doctor"


#: kind -> what it is known by, for messages
SIGNS = {
    Kind.RUN: f"{CHAIN_FILE}, written by `fusion init` or `fusion rounds` or by hand for `fusion run`",
    Kind.STORE: f"{MANIFEST_NAME}, written by `fusion capture`",
    Kind.RESPONSES: f"{MANIFEST_NAME}, written by `fusion sample`",
    Kind.SCORED: f"{MANIFEST_NAME}, written by `fusion score`",
    Kind.MERGED: f"{RECORD_NAME}, written by a merge with varm or fusechat_sce that has ended",
    Kind.TRAINED: f"{TRAINING_RECORD}, {FUSED_REPORT}, {SFT_REPORT}, {PAIRS_REPORT} or checkpoint-*/{STATE}, written "
    "by `axolotl train` with the plugin",
    Kind.EXAMINED: f"{DOCTOR}, written by `fusion doctor`",
}


def kind_of(path: Path) -> Kind | None:
    """Return what a folder is; None where nothing in it tells.

    A YAML file is a run.

    Raises:
        StoreError: it has a manifest that is damaged.
    """
    if path.is_file():
        return Kind.RUN if path.suffix in (".yml", ".yaml") else None
    if (path / CHAIN_FILE).is_file():
        return Kind.RUN
    if (path / RECORD_NAME).exists():
        return Kind.MERGED
    if (path / MANIFEST_NAME).exists():
        return _kind_of_manifest(path)
    if any((path / name).is_file() for name in TRAINING_FILES) or next(path.glob(f"checkpoint-*/{STATE}"), None):
        return Kind.TRAINED
    return Kind.EXAMINED if (path / DOCTOR).is_file() else None


def require_kind(path: Path) -> Kind:
    """Return what a folder is.

    Raises:
        DataError: nothing in it tells; the message lists what it could be.
        StoreError: it has a manifest that is damaged.
    """
    found = kind_of(path)
    if found is not None:
        return found
    got = "a file that is no YAML" if path.is_file() else "a folder without any of them"
    if not path.exists():
        got = "no folder of that name"
    elif inner := _known_inside(path):
        got += f", but inside it {', '.join(inner)}: give one of these"
    listed = "; ".join(f"{kind} ({sign})" for kind, sign in SIGNS.items())
    raise DataError(f"{path}: expected one of: {listed}. Got {got}.")


def _kind_of_manifest(path: Path) -> Kind | None:
    manifest = load_manifest(path)
    if isinstance(manifest, Manifest):
        return Kind.STORE
    if manifest.columns.keys() >= RESPONSE_COLUMNS | SCORE_COLUMNS:
        return Kind.SCORED
    return Kind.RESPONSES if manifest.columns.keys() >= RESPONSE_COLUMNS else None


def _known_inside(path: Path) -> list[str]:
    """Return the first folders inside a folder that have a page."""
    return [f"{inner.name} ({kind})" for inner, kind in inside(path)][:5]


def inside(path: Path) -> list[tuple[Path, Kind]]:
    """Return the folders right inside a folder that have a page; damaged ones are left out."""
    found = []
    for inner in sorted(path.iterdir()) if path.is_dir() else ():
        try:
            kind = kind_of(inner) if inner.is_dir() and not inner.name.startswith(".") else None
        except StoreError:
            kind = None
        if kind is not None:
            found.append((inner, kind))
    return found


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; None where there is none.

    Raises:
        DataError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON, got {error}. Restore the file, or remove it.") from None


@contextmanager
def expected_form(path: Path) -> Iterator[None]:
    """Turn what goes wrong with the content of a file that this package writes into an error that names it.

    Raises:
        DataError: a value in it is missing, or of another type.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, ArithmeticError) as error:
        raise DataError(
            f"{path}: expected what fusion-plugins writes there, got another form ({type(error).__name__}: {error}). "
            "Restore the file, or remove it."
        ) from error
