"""What is kept beside prepared datasets: their reports. And what a stopped run leaves of a prepared dataset.

axolotl writes the rows of a prepared dataset into a folder that is named by their hash. The reports are files beside
it, ``fusion_report-*.json``, one per dataset, named by the stamp of its entry. So a report belongs to the rows, and
every run that uses the rows gets a copy of it.
"""

import hashlib
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.utils.data.lock import LOCK_FILE_NAME
from axolotl.utils.distributed import is_main_process
from axolotl.utils.logging import get_logger
from filelock import FileLock, Timeout

from fusion_plugins.store.files import write_atomic

LOG = get_logger(__name__)
Report = Mapping[str, Any]

PREFIX = "fusion_report-"
#: name of the report of fused datasets
_OF_FUSED = "fusion_report.json"
#: the last bytes of a complete Arrow stream
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_ROWS = re.compile(r"data-\d+-of-\d+\.arrow|state\.json|dataset_info\.json")


def keep_report(
    cfg: Any, entry: Any, file: str, report: Report, stores: Mapping[str, str | None] | None = None
) -> None:
    """Keep the report of the rows that were just prepared, and write the run's own copy.

    Args:
        cfg: the validated configuration.
        entry: the entry of the dataset.
        file: name of the report in the run's ``output_dir``.
        report: its content.
        stores: store -> sha256 of the content that the rows were made of.
    """
    kept = {"file": file, "report": report, "stores": stores or {}}
    path = _path(cfg, entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(kept, indent=1).encode())
    write_reports(cfg)


def write_reports(cfg: Any) -> None:
    """Write the reports of all datasets of a run into its ``output_dir``, one file per kind.

    A report is written under the name of its dataset. That of the only dataset of a preference run or of best responses
    stands alone.
    """
    if not is_main_process():
        return
    found: dict[str, dict[str, Report]] = defaultdict(dict)
    for file, name, report in _kept(cfg):
        found[file][name] = report
    for file, reports in found.items():
        alone = file != _OF_FUSED and len(reports) == 1
        content = next(iter(reports.values())) if alone else reports
        Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(cfg.output_dir, file), (json.dumps(content, indent=1) + "\n").encode())


def kept_reports(cfg: Any) -> Iterator[tuple[str, Report]]:
    """Return name and report of every fused dataset of a run."""
    return ((name, report) for file, name, report in _kept(cfg) if file == _OF_FUSED)


def remembered_store(cfg: Any, store: str) -> str | None:
    """Return the sha256 of the content that a store had when rows were last prepared from it; None if it is unknown."""
    reports = sorted(_folder(cfg).glob(f"{PREFIX}*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in reports:
        known = json.loads(path.read_text(encoding="utf-8"))["stores"].get(store)
        if known:
            return str(known)
    return None


def remove_leftovers(cfg: Any) -> None:
    """Remove what stopped runs left of prepared datasets, so that axolotl prepares them again.

    axolotl takes every folder that is not empty for a prepared dataset, and fails on half of one. While another run
    prepares a dataset here (it holds axolotl's lock), nothing is removed.
    """
    folder = _folder(cfg)
    halves = [path for path in folder.glob("*") if re.fullmatch("[0-9a-f]{32}", path.name) and _is_half(path)]
    if not halves:
        return
    try:
        with FileLock(str(folder / LOCK_FILE_NAME), timeout=0):
            for path in filter(_is_half, halves):
                shutil.rmtree(path)
                LOG.warning(
                    f"fusion: {path} was half of a prepared dataset, left by a run that was stopped; it is removed "
                    "and will be prepared again"
                )
    except Timeout:
        LOG.info(f"fusion: another run prepares a dataset in {folder}")


def _is_half(folder: Path) -> bool:
    """Whether a folder holds some of the files of a prepared dataset, and no others."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not names or not all(_ROWS.fullmatch(name) for name in names):
        return False
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
        return not all(_is_whole(folder / part["filename"]) for part in state["_data_files"])
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _is_whole(stream: Path) -> bool:
    with stream.open("rb") as content:
        content.seek(-len(_END_OF_STREAM), 2)
        return content.read() == _END_OF_STREAM


def _folder(cfg: Any) -> Path:
    return Path(cfg.get("dataset_prepared_path") or DEFAULT_DATASET_PREPARED_PATH)


def _path(cfg: Any, entry: Any) -> Path:
    # One entry with several names or shards is several datasets.
    parts = [entry.get(key) for key in ("input_format", "field_rejected", "name", "shards_idx", "path")]
    digest = hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
    return _folder(cfg) / f"{PREFIX}{digest[:32]}.json"


def _kept(cfg: Any) -> Iterator[tuple[str, str, Report]]:
    """Yield, of every dataset of a run with a report: name of the report, name of the dataset, and its content."""
    for name, entry in _named_entries(cfg):
        path = _path(cfg, entry)
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            yield kept["file"], name, kept["report"]


def _named_entries(cfg: Any) -> Iterator[tuple[str, Any]]:
    """The entries of all datasets, each with a name of its own: the path, and what else tells it from others."""
    from axolotl.utils.data.shared import datasets_with_name_generator

    seen: Counter[str] = Counter()
    for key in ("datasets", "test_datasets"):
        for entry in datasets_with_name_generator(cfg.get(key) or []):
            details = [str(entry[part]) for part in ("name", "split", "shards_idx") if entry.get(part) is not None]
            if key == "test_datasets":
                details.insert(0, "test_datasets")
            name = f"{entry.get('path')} ({', '.join(details)})" if details else str(entry.get("path"))
            seen[name] += 1
            yield name if seen[name] == 1 else f"{name} #{seen[name]}", entry
