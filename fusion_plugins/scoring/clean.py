"""``fusion clean``: prompts or responses -> those that are worth keeping, and a report of the others.

Duplicates and texts of evaluations are looked for in prompts; languages, lengths and refusals in prompts, or in the
answers where responses are cleaned. Only exact duplicates are removed unless the settings say more. A row is removed
for the first reason that holds, in the order of :data:`REASONS`.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fusion_plugins.column_names import PromptColumns
from fusion_plugins.config import Settings
from fusion_plugins.core.text.reasoning import final_answer
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.inputs import prompt_rows
from fusion_plugins.progress import meter
from fusion_plugins.row_files import row_files
from fusion_plugins.scoring.clean_filters import PromptFilter, TextFilter
from fusion_plugins.scoring.responses import ResponseFiles, key_of, open_responses, response_name
from fusion_plugins.store import RowManifest, RowWriter
from fusion_plugins.store.files import make_folder, new_file, write_atomic
from fusion_plugins.texts import Prompt

PROMPTS_NAME, REPORT_NAME = "prompts.jsonl", "clean_report.json"
#: why a row is removed, in the order in which that is looked for
REASONS = (
    "exact_duplicate",
    "contaminated",
    "near_duplicate",
    "too_short",
    "too_long",
    "other_language",
    "refusal",
    "unusable",
)
#: characters of a text that the report shows
SHOWN = 200


class CleanConfig(Settings):
    """Keys of the YAML file of ``fusion clean``."""

    prompts: str | list[str] | None = Field(None, description=".jsonl or .parquet files of prompts, or folders of them")
    columns: PromptColumns = Field(
        default_factory=PromptColumns,
        description="where a prompt stands, as `fusion sample` takes it; what is kept has the names of the files",
    )
    responses: str | list[str] | None = Field(
        None, description="instead of prompts: a folder of responses or of scored responses, or files of them"
    )
    out: str = Field(description="folder for what is kept, and for clean_report.json")
    exact_duplicates: bool = Field(True, description="remove prompts whose text another prompt has")
    near_duplicates: float | None = Field(
        None,
        gt=0,
        le=1,
        description="remove prompts that share this part of their runs of words with another, e.g. 0.8",
    )
    shingle: int = Field(3, ge=1, description="words of a run, for near_duplicates")
    decontaminate: list[str] | None = Field(
        None, description=".jsonl or .parquet files of evaluations whose texts may not be in the prompts"
    )
    ngram: int = Field(13, ge=1, description="common words in a row that make a prompt contaminated")
    decontaminate_columns: list[str] | None = Field(
        None,
        description="columns of these files to compare with; default: text, prompt, question, problem, messages, ...",
    )
    min_characters: int | None = Field(None, ge=0, description="remove shorter prompts, or answers")
    max_characters: int | None = Field(None, ge=1, description="remove longer prompts, or answers")
    languages: list[str] | None = Field(
        None, description="keep only prompts, or answers, in these languages (ISO 639-1, such as en and zh)"
    )
    refusals: bool = Field(False, description="remove answers that refuse (responses only)")
    on_unusable: Literal["raise", "skip"] = Field(
        "raise", description="rows that are no prompts or responses: raise, or skip and report"
    )

    @model_validator(mode="after")
    def _check(self) -> "CleanConfig":
        if (self.prompts is None) == (self.responses is None):
            got = "neither" if self.prompts is None else "both"
            raise ValueError(f"expected either prompts or responses, got {got}; name one of them")
        if self.prompts is not None and self.refusals:
            raise ValueError("refusals are answers: clean `responses` instead of prompts, or leave refusals out")
        low, high = self.min_characters, self.max_characters
        if low is not None and high is not None and low > high:
            raise ValueError(f"expected min_characters up to max_characters, got {low} and {high}")
        return self


@dataclass(frozen=True)
class Removal:
    """A row that is left out.

    Attributes:
        id: of the prompt, or prompt, source and index of a response; the place of a row without either.
        reason: one of :data:`REASONS`.
        because: what it is a duplicate of, what it shares with which evaluation, ...
        text: the start of its text.
    """

    id: str
    reason: str
    because: str
    text: str


@dataclass
class CleanReport:
    """What became of the rows.

    Attributes:
        out: what was written: a file of prompts, or a folder of responses.
        read: rows read.
        kept: rows kept.
        removed: the others.
        notes: what else a reader should know.
    """

    out: Path
    read: int = 0
    kept: int = 0
    removed: list[Removal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, tuple[int, Removal]]:
        """Return reason -> rows and the first of them, in the order of :data:`REASONS`."""
        found = Counter(removal.reason for removal in self.removed)
        first = {removal.reason: removal for removal in reversed(self.removed)}
        return {reason: (found[reason], first[reason]) for reason in REASONS if reason in found}


def clean(config: CleanConfig) -> CleanReport:
    """Clean prompts or responses, and write what is kept with a report.

    Raises:
        ConfigError: a package is missing, or a language is not known.
        DataError: a row cannot be used (with ``on_unusable: raise``), an evaluation has nothing to compare with, or
            nothing is left.
    """
    prompts = PromptFilter(config)
    texts = TextFilter(config)
    report = (
        _clean_prompts(config, prompts, texts)
        if config.prompts is not None
        else _clean_responses(config, prompts, texts)
    )
    if prompts.conflicts:
        report.notes.append(
            f"{len(prompts.conflicts)} removed duplicates have another gold answer than the prompt that was kept, so "
            f"one of the two is wrong: {', '.join(prompts.conflicts[:5])}"
        )
    _write_report(config, report)
    if not report.kept and report.read:
        counted = ", ".join(f"{count} {reason}" for reason, (count, _) in report.counts().items())
        raise DataError(
            f"expected rows that are worth keeping, got none of {report.read}: {counted}. Loosen the settings."
        )
    return report


def _clean_prompts(config: CleanConfig, prompts: PromptFilter, texts: TextFilter) -> CleanReport:
    assert config.prompts is not None
    out = Path(config.out) / PROMPTS_NAME
    if any(file.resolve() == out.resolve() for file in row_files(config.prompts)):
        raise ConfigError(f"out: expected another folder than that of the prompts, got {config.out!r}; name a new one")
    make_folder(Path(config.out))
    report = CleanReport(out)
    with new_file(out) as file:
        texts_of: dict[str, str] = {}
        for where, row, prompt in prompt_rows(config.prompts, config.columns):
            report.read += 1
            if isinstance(prompt, Prompt) and texts_of.setdefault(prompt.text.id, prompt.text.content_id) != (
                prompt.text.content_id
            ):
                prompt = DataError(
                    f"{where}: expected one prompt per id, got another text for {prompt.text.id!r}. Make ids unique."
                )
            if isinstance(prompt, DataError):
                _unusable(config, report, where, row, prompt)
                continue
            text = content_text(prompt.text.content)
            found = prompts.find(prompt.text.id, text, _group(prompt), prompt.reference) or texts.find(text)
            if found is not None:
                report.removed.append(Removal(prompt.text.id, *found, text[:SHOWN]))
                continue
            report.kept += 1
            file.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
    return report


def _clean_responses(config: CleanConfig, prompts: PromptFilter, texts: TextFilter) -> CleanReport:
    assert config.responses is not None
    responses = open_responses(config.responses, config.on_unusable)
    if Path(config.out).resolve() == Path(responses.path).resolve():
        raise ConfigError(
            f"out: expected another folder than that of the responses, got {config.out!r}; name a new one"
        )
    before = responses.manifest
    manifest = RowManifest(
        stage=before.stage,
        columns=before.columns,
        key=before.key,
        facts={**before.facts, "cleaned": prompts.facts | texts.facts},
        provenance={"responses": str(responses.path)},
    )
    report = CleanReport(Path(config.out))
    judged: dict[str, tuple[str, str] | None] = {}
    with RowWriter(config.out, manifest) as writer, meter("clean", len(responses), unit="responses") as progress:
        for row in responses:
            report.read += 1
            progress.advance()
            name = row["prompt_id"]
            if name not in judged:
                judged[name] = prompts.find(name, content_text(row["prompt"]), "", row.get("reference"))
            answer = final_answer(row["response"]) or ""
            found = judged[name] or texts.find(answer)
            if found is not None:
                report.removed.append(Removal(response_name(row), *found, answer[:SHOWN]))
                continue
            report.kept += 1
            if key_of(row, before) not in writer.done_keys:
                writer.write(row)
        writer.finish()
    if isinstance(responses, ResponseFiles):
        for where, reason in responses.unusable.items():
            report.read += 1
            report.removed.append(Removal(where, "unusable", reason, ""))
    return report


def content_text(content: Any) -> str:
    """Return the text of a prompt: of a chat, what all of its turns say."""
    if isinstance(content, str):
        return content
    return "\n\n".join(f"{message.get('content') or ''}" for message in content)


def _group(prompt: Prompt) -> str:
    """Prompts with other tools are others, whatever their text."""
    return json.dumps(prompt.text.tools, sort_keys=True, default=str) if prompt.text.tools else ""


def _unusable(config: CleanConfig, report: CleanReport, where: str, row: Mapping[str, Any], error: DataError) -> None:
    if config.on_unusable == "raise":
        raise error
    name = where if row.get("id") is None else str(row["id"])
    report.removed.append(Removal(name, "unusable", str(error), ""))


def _write_report(config: CleanConfig, report: CleanReport) -> None:
    content = {
        "read": report.read,
        "kept": report.kept,
        "removed": {
            reason: {"count": count, "example": asdict(first)} for reason, (count, first) in report.counts().items()
        },
        "notes": report.notes,
        "settings": config.model_dump(),
        "rows": [{"id": one.id, "reason": one.reason, "because": one.because} for one in report.removed],
    }
    write_atomic(Path(config.out) / REPORT_NAME, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
