"""What `fusion clean` leaves out: duplicates, texts of evaluations, other languages, refusals, lengths."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusion_plugins.core.text.hygiene import KnownTexts, jaccard, numbers, refusal_of, same_text, shingles
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.hub import hub_fingerprint, is_hub
from fusion_plugins.install import missing_package_error
from fusion_plugins.row_files import read_row_file, row_files

if TYPE_CHECKING:
    from fusion_plugins.scoring.clean import CleanConfig

#: columns of an evaluation file that hold what is asked
EVALUATION_COLUMNS = (
    *("text", "prompt", "question", "problem", "instruction", "input", "query", "content", "messages"),
    *("Question", "Problem", "question_content", "instruct_prompt", "complete_prompt"),
)
#: permutations of a MinHash
PERMUTATIONS = 128
#: letters below which a language is not guessed, and how sure a guess must be
LEAST_LETTERS, CERTAIN = 20, 0.9
#: languages that are told apart besides those that are asked for; more of them make short texts doubtful
LANGUAGES = "en zh ja ko de fr es pt it nl ru uk pl cs sv da no fi tr ar he fa hi bn ta th vi id el hu ro bg".split()
#: what says nothing about the language of a text: code, formulas, addresses
_NO_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|https?://\S+", re.DOTALL
)


class PromptFilter:
    """Duplicates, near duplicates and texts of evaluations, prompt by prompt; the first of equal ones stays."""

    def __init__(self, config: "CleanConfig") -> None:
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


class TextFilter:
    """Length, language and refusals of one text."""

    def __init__(self, config: "CleanConfig") -> None:
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


def _evaluations(config: "CleanConfig") -> KnownTexts:
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
