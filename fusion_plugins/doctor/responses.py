"""Examine a folder of scored responses: are these sources worth training the target on?

The measures and the verdicts are those of :mod:`~fusion_plugins.core.preferences.worth`; the training types warn by the
same ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion_plugins.core.preferences.candidates import as_candidate
from fusion_plugins.core.preferences.worth import examine_worth, response_of
from fusion_plugins.core.preferences.worth_types import DomainWorth, Response
from fusion_plugins.doctor.report_json import report_json
from fusion_plugins.errors import ConfigError, DataError, StoreError
from fusion_plugins.progress import meter
from fusion_plugins.store import RowManifest, RowStore, open_rows
from fusion_plugins.store.manifest import MANIFEST_NAME, load_manifest

#: columns of scored responses that the comparison reads; the texts of prompts are not needed
_READ = ("prompt_id", "source", "index", "response", "domain", "reference", "reward", "correct", "scores", "is_target")


@dataclass(frozen=True)
class ResponsesReport:
    """The whole examination.

    Attributes:
        folder: name of the folder.
        target: name of the source that is the target; None where the folder has no answers of it.
        responses: rows of the folder.
        domains: one entry per domain.
    """

    folder: str
    target: str | None
    responses: int
    domains: Sequence[DomainWorth]

    def to_json(self) -> str:
        """Return everything as JSON; null for what cannot be measured."""
        return report_json(asdict(self))


def holds_responses(path: str) -> bool:
    """Return whether a path is a folder of responses, scored or not, and not a store or a tokenizer.

    Raises:
        StoreError: its manifest is damaged.
    """
    folder = Path(path)
    return (folder / MANIFEST_NAME).exists() and isinstance(load_manifest(folder), RowManifest)


def examine_responses(path: str, target: str | None = None) -> ResponsesReport:
    """Examine a folder of scored responses; shows a progress bar.

    Args:
        path: what `fusion score` wrote.
        target: the source that is the target; by default the one whose rows have ``is_target``.

    Raises:
        StoreError: the folder is damaged or empty.
        ConfigError: it has no source of the name of the target.
        DataError: the responses are not scored, or a row is wrong.
    """
    rows = open_rows(path)
    if missing := [name for name in ("correct", "reward") if name not in rows.manifest.columns]:
        raise DataError(
            f"{path}: expected scored responses, got rows without {', '.join(missing)}. Score them: `fusion score "
            f"--responses {path} --out NEW_FOLDER --scorer math`, and give the new folder."
        )
    if not len(rows):
        raise StoreError(f"{path}: expected scored responses, got a folder without rows. Run `fusion score` again.")
    with meter("examine", len(rows), unit="responses") as progress:
        responses = list(_responses(rows, target, progress.advance))
    sources = sorted({each.source for each in responses})
    if target is not None and target not in sources:
        raise ConfigError(
            f"target: expected a source of {path}, got {target!r}; its sources are {', '.join(sources)}. Give one of "
            "them, or sample the target under that name with the same prompts and score the folder again."
        )
    own = sorted({each.source for each in responses if each.own})
    return ResponsesReport(Path(path).resolve().name, own[0] if own else None, len(rows), examine_worth(responses))


def _responses(rows: RowStore, target: str | None, advance: Any) -> Iterator[Response]:
    for number, row in enumerate(rows):
        light = {name: row.get(name) for name in _READ} | {"prompt": row["prompt_id"]}
        light["response"] = light["response"] or ""  # the length limit came before the first word
        yield response_of(as_candidate(light, number), target)
        advance(1)
