"""``fusion clean``: prompts or responses -> those that are worth keeping, and a report of the others.

Duplicates and texts of evaluations are looked for in prompts; languages, lengths and refusals in prompts, or in the
answers where responses are cleaned. Only exact duplicates are removed unless the settings say more. A row is removed
for the first reason that holds, in the order of :data:`REASONS`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fusion_plugins.config import Settings
from fusion_plugins.core.text.hygiene import KnownTexts, jaccard, numbers, refusal_of, same_text, shingles
from fusion_plugins.core.text.reasoning import final_answer
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.hub import hub_fingerprint, is_hub
from fusion_plugins.inputs import Prompt, prompt_rows, read_row_file, row_files
from fusion_plugins.install import missing_package_error
from fusion_plugins.progress import meter
from fusion_plugins.scoring.responses import ResponseFiles, key_of, open_responses, response_name
from fusion_plugins.store import RowManifest, RowWriter
from fusion_plugins.store.files import make_folder, new_file, write_atomic

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
#: columns of an evaluation file that hold what is asked
EVALUATION_COLUMNS = (
    *("text", "prompt", "question", "problem", "instruction", "input", "query", "content", "messages"),
    *("Question", "Problem", "question_content", "instruct_prompt", "complete_prompt"),
)
#: permutations of a MinHash, and characters of a text that the report shows
PERMUTATIONS, SHOWN = 128, 200
#: letters below which a language is not guessed, and how sure a guess must be
LEAST_LETTERS, CERTAIN = 20, 0.9
#: languages that are told apart besides those that are asked for; more of them make short texts doubtful
LANGUAGES = "en zh ja ko de fr es pt it nl ru uk pl cs sv da no fi tr ar he fa hi bn ta th vi id el hu ro bg".split()
#: what says nothing about the language of a text: code, formulas, addresses
_NO_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|https?://\S+", re.DOTALL
)


class CleanConfig(Settings):
    """Keys of the YAML file of ``fusion clean``."""

    prompts: str | list[str] | None = Field(None, description=".jsonl or .parquet files of prompts, or folders of them")
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
    prompts = _PromptFilter(config)
    texts = _TextFilter(config)
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


def _clean_prompts(config: CleanConfig, prompts: "_PromptFilter", texts: "_TextFilter") -> CleanReport:
    assert config.prompts is not None
    out = Path(config.out) / PROMPTS_NAME
    if any(file.resolve() == out.resolve() for file in row_files(config.prompts)):
        raise ConfigError(f"out: expected another folder than that of the prompts, got {config.out!r}; name a new one")
    make_folder(Path(config.out))
    report = CleanReport(out)
    with new_file(out) as file:
        texts_of: dict[str, str] = {}
        for where, row, prompt in prompt_rows(config.prompts):
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


def _clean_responses(config: CleanConfig, prompts: "_PromptFilter", texts: "_TextFilter") -> CleanReport:
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


class _PromptFilter:
    """Duplicates, near duplicates and texts of evaluations, prompt by prompt; the first of equal ones stays."""

    def __init__(self, config: CleanConfig) -> None:
        self._exact = config.exact_duplicates
        self._seen: dict[tuple[str, str], tuple[str, str | None]] = {}
        self._near = _NearDuplicates(config.near_duplicates, config.shingle) if config.near_duplicates else None
        self._known = _evaluations(config) if config.decontaminate else None
        #: duplicates whose gold answer is another one
        self.conflicts: list[str] = []
        self.facts: dict[str, Any] = {
            "exact_duplicates": config.exact_duplicates,
            "near_duplicates": [config.near_duplicates, config.shingle] if config.near_duplicates else None,
            "decontaminate": [_file_hashes(config.decontaminate), config.ngram] if config.decontaminate else None,
        }

    def find(self, name: str, text: str, group: str, reference: str | None) -> tuple[str, str] | None:
        """Return (reason, because) where the prompt is not worth keeping.

        Args:
            name: id of the prompt.
            text: of the prompt.
            group: only prompts of one group can be duplicates.
            reference: the gold answer.
        """
        key = (same_text(text), group)
        if self._exact and key in self._seen:
            first, gold = self._seen[key]
            if gold != reference:
                self.conflicts.append(f"{name} ({reference!r:.40}, kept: {first} {gold!r:.40})")
            return "exact_duplicate", f"the same text as {first}"
        self._seen[key] = name, reference
        if self._known is not None and (shared := self._known.find(text)) is not None:
            return "contaminated", f"shares with {shared[0]}: {shared[1]:.300}"
        if self._near is not None and (near := self._near.find(name, text, group)) is not None:
            return "near_duplicate", near
        return None


class _TextFilter:
    """Length, language and refusals of one text."""

    def __init__(self, config: CleanConfig) -> None:
        self._low, self._high = config.min_characters or 0, config.max_characters
        self._refusals = config.refusals
        self._languages = _language_filter(config.languages) if config.languages else None
        self.facts: dict[str, Any] = {
            "characters": [config.min_characters, config.max_characters],
            "languages": config.languages,
            "refusals": config.refusals,
        }

    def find(self, text: str) -> tuple[str, str] | None:
        """Return (reason, because) where the text is not worth keeping."""
        if len(text) < self._low:
            return "too_short", f"{len(text)} characters"
        if self._high is not None and len(text) > self._high:
            return "too_long", f"{len(text)} characters"
        if self._languages is not None and (language := self._languages(text)) is not None:
            return "other_language", language
        if self._refusals and (said := refusal_of(text)) is not None:
            return "refusal", said
        return None


class _NearDuplicates:
    """Finds texts with many common runs of words: MinHash proposes, the sets themselves decide."""

    def __init__(self, threshold: float, size: int) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ModuleNotFoundError as error:
            raise missing_package_error(error, "near_duplicates") from error
        self._threshold, self._size = threshold, size
        self._sketch = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int)
        # What it misses is lost, what it finds too much costs a comparison: it is asked for less similar texts too.
        self._index = MinHashLSH(threshold=0.8 * threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
        #: number of a text in the index -> its name, runs, numbers and group
        self._kept: list[tuple[str, Any, Counter[str], str]] = []

    def find(self, name: str, text: str, group: str) -> str | None:
        """Return what a text is near to; it is remembered if that is nothing."""
        runs, counted = shingles(text, self._size), numbers(text)
        sketch = self._sketch.copy()
        sketch.update_batch([int(run) & 0xFFFFFFFF for run in runs])
        # The first of several, whatever order the index has.
        for number in sorted(self._index.query(sketch)):
            other, known, their_numbers, their_group = self._kept[number]
            # With another number, a question has another answer.
            if their_group != group or their_numbers != counted:
                continue
            if (share := jaccard(runs, known)) >= self._threshold:
                return f"{share:.2f} of the runs of words are those of {other}"
        self._index.insert(len(self._kept), sketch)
        self._kept.append((name, runs, counted, group))
        return None


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


def _evaluations(config: CleanConfig) -> KnownTexts:
    """Read the texts of evaluations.

    Raises:
        DataError: a file cannot be read, or a row has none of the columns.
    """
    known = KnownTexts(config.ngram)
    columns = config.decontaminate_columns or EVALUATION_COLUMNS
    for file in row_files(config.decontaminate or []):
        for where, row in read_row_file(file):
            texts = [text for name in columns for text in _texts(row.get(name))]
            if not texts:
                raise DataError(
                    f"{where}: expected a text in one of the columns {', '.join(columns)}, got {', '.join(row)}. Name "
                    "the columns with the questions in decontaminate_columns."
                )
            for text in texts:
                known.add(text, where)
    return known


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts of a column: a text, several, or the user's turns of a chat."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            if isinstance(part, Mapping):
                if part.get("role", "user") == "user":
                    yield from _texts(part.get("content"))
            else:
                yield from _texts(part)


def _file_hashes(files: Sequence[str]) -> list[str]:
    contents = (hub_fingerprint(file).encode() if is_hub(file) else file.read_bytes() for file in row_files(files))
    return [hashlib.sha256(content).hexdigest()[:16] for content in contents]


def _language_filter(wanted: Iterable[str]) -> Callable[[str], str | None]:
    """Return a function that says which other language a text is in, where that is certain."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError as error:
        raise missing_package_error(error, "languages") from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    languages = {language.lower() for language in wanted}
    if unknown := sorted(languages - {*map(str, identifier.labels)}):
        raise ConfigError(
            f"languages: expected codes such as {', '.join(LANGUAGES[:6])}, got {', '.join(unknown)}. Correct them."
        )
    identifier.set_languages(sorted({*LANGUAGES, *languages}))

    def other(text: str) -> str | None:
        plain = _NO_LANGUAGE.sub(" ", text)
        # One character of Chinese says as much as a word.
        weight = sum(1 if character < "\u2e80" else 4 for character in plain if character.isalpha())
        if weight < LEAST_LETTERS:
            return None
        language, certainty = identifier.classify(plain)
        return f"{language} ({certainty:.2f})" if language not in languages and certainty >= CERTAIN else None

    return other


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
