"""A language model as a judge: ratings of single answers, or comparisons of two answers in both orders.

The judge is a source like any other: an OpenAI-compatible server, or a model in this process. Its prompt is a file. Its
verdict is read strictly; a judgement that cannot be read is no score, and is counted with its reason.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from fusion_plugins.checkpoint_fingerprint import checkpoint_fingerprint
from fusion_plugins.config import validate
from fusion_plugins.core.text.messages import conversation_text
from fusion_plugins.core.text.reasoning import final_answer
from fusion_plugins.errors import ConfigError, ScoringError
from fusion_plugins.scoring.base import Row, Score
from fusion_plugins.sources.backends.base import (
    Refusal,
    Response,
    SampleRequest,
    Sampling,
    SourceSettings,
    open_source,
)
from fusion_plugins.sources.fingerprints import sampling_fingerprint

UNREADABLE = "the judgement cannot be read"
CUT = "the judgement was cut off"
NO_ANSWER = "there is no answer to judge"
ALONE = "there is no other answer to compare with"
#: characters of a judgement that are kept
KEPT = 1000

_NAME = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_VERDICT = re.compile(
    r"[\W_]*(?:(?:final )?(?:verdict|rating|score)\b[\W_]*)?\[\[\s*([^\[\]]*?)\s*\]\][\W_]*", re.IGNORECASE
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
#: mode -> names that its prompt may use
_NAMES = {
    "pointwise": ("prompt", "response", "reference", "low", "high", "mark"),
    "pairwise": ("prompt", "a", "b", "reference", "mark"),
}
_NEEDED = {"pointwise": ("prompt", "response"), "pairwise": ("prompt", "a", "b")}


class JudgeOptions(SourceSettings, Sampling):
    """Options of the scorer ``judge``: a model, what runs it, how to sample from it, and what to ask."""

    backend: Literal["openai", "transformers", "vllm", "ray"] = Field(
        "openai", description="what runs the judge: openai for servers, transformers or vllm in this process, or ray"
    )
    temperature: float = Field(0.0, ge=0, description="0: the most probable judgement")
    max_tokens: int = Field(1024, ge=1, description="longest judgement in tokens")
    mode: Literal["pointwise", "pairwise"] = Field(
        "pointwise",
        description="pointwise: a rating of each answer; pairwise: its share of wins over other answers to the prompt",
    )
    prompt: str | None = Field(None, description="text file with the judge's prompt; default: the one that comes along")
    scale: tuple[float, float] = Field((1, 10), description="lowest and highest rating (pointwise)")
    opponents: int = Field(
        4, ge=1, description="other answers that each answer is compared with, each in both orders (pairwise)"
    )

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] >= value[1]:
            raise ValueError(f"expected the lowest rating below the highest, got {value[0]:g} and {value[1]:g}")
        return value


@dataclass(frozen=True)
class _Comparison:
    """Two answers of one prompt, by their places in the batch."""

    one: int
    other: int


class JudgeScorer:
    """Rates or compares answers with a language model; the options are those of :class:`JudgeOptions`.

    Attributes:
        by_prompt: whether all answers to a prompt must be scored together.

    Raises:
        ConfigError: an option is wrong, or the file of the prompt.
        SourceError: the model cannot be loaded, or the server does not answer.
    """

    domains: frozenset[str] | None = None

    def __init__(self, **options: Any) -> None:
        self._options = chosen = validate(JudgeOptions, options, where="scorers.judge")
        self.by_prompt = chosen.mode == "pairwise"
        self._template = _template(chosen)
        self._sampling = Sampling(
            **{name: getattr(chosen, name) for name in Sampling.model_fields if name in chosen.model_fields_set}
            | {"temperature": chosen.temperature, "max_tokens": chosen.max_tokens}
        )
        self._source = open_source(chosen, "sample")
        # Changes where the same answers and judgements may get another score than before.
        self.facts: dict[str, Any] = {
            "model": chosen.model,
            "backend": chosen.backend,
            "checkpoint": checkpoint_fingerprint(chosen.model, also=("*.json", "*.jinja", "*.model")),
            "sampling": sampling_fingerprint(chosen, self._sampling, self._source.tokenizer),
            "mode": chosen.mode,
            "prompt": hashlib.sha256(self._template.encode()).hexdigest(),
            "rules": 1,
        }
        self.facts |= {"opponents": chosen.opponents} if self.by_prompt else {"scale": list(chosen.scale)}

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Return one score per row; in the mode ``pairwise``, the rows must hold all answers to their prompts."""
        answers = [final_answer(row["response"]) for row in rows]
        return self._compare(rows, answers) if self.by_prompt else self._rate(rows, answers)

    def close(self) -> None:
        """Close the connections, or free the memory of the model."""
        self._source.close()

    def _rate(self, rows: Sequence[Row], answers: Sequence[str | None]) -> list[Score]:
        low, high = self._options.scale
        scores = [Score(reason=NO_ANSWER)] * len(rows)
        places = [place for place, answer in enumerate(answers) if answer is not None]
        questions = [
            self._question(rows[place], response=answers[place], low=f"{low:g}", high=f"{high:g}") for place in places
        ]
        for place, judgement in zip(places, self._ask(questions), strict=True):
            text, reason = _readable(judgement)
            rating = None if text is None else rating_of(text, low, high)
            details = {"model": self._scale, "judgement": _shown(judgement)}
            if rating is None:
                scores[place] = Score(reason=reason or UNREADABLE, details=details)
            else:
                scores[place] = Score(reward=rating, details=details)
        return scores

    def _compare(self, rows: Sequence[Row], answers: Sequence[str | None]) -> list[Score]:
        groups: dict[str, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            if answers[place] is not None:
                groups[row["prompt_id"]].append(place)
        pairs = [pair for group in groups.values() for pair in _pairs(group, rows, self._options.opponents)]
        asked = dict.fromkeys(pair for pair in pairs if answers[pair.one] != answers[pair.other])
        questions = []
        for pair in asked:
            for first, second in ((pair.one, pair.other), (pair.other, pair.one)):
                questions.append(self._question(rows[first], a=answers[first], b=answers[second]))
        judged = iter(self._ask(questions))
        outcomes: dict[int, list[tuple[str, float | None, str]]] = defaultdict(list)
        for pair in pairs:
            share, said = (0.5, "the same answer") if pair not in asked else _outcome(next(judged), next(judged))
            for place, other, won in ((pair.one, pair.other, share), (pair.other, pair.one, _turned(share))):
                outcomes[place].append((_name(rows[other]), won, said))
        return [
            Score(reason=NO_ANSWER) if answers[place] is None else self._of_outcomes(outcomes[place])
            for place in range(len(rows))
        ]

    def _of_outcomes(self, outcomes: Sequence[tuple[str, float | None, str]]) -> Score:
        details = {
            "model": self._scale,
            "against": [{"answer": name, "won": won, "said": said} for name, won, said in outcomes],
        }
        won = [share for _, share, _ in outcomes if share is not None]
        if not won:
            reasons = Counter(said for _, _, said in outcomes)
            return Score(reason=reasons.most_common(1)[0][0] if reasons else ALONE, details=details)
        return Score(reward=sum(won) / len(won), details=details)

    @property
    def _scale(self) -> str:
        return f"judge {self._options.source_name}"

    def _question(self, row: Row, **values: Any) -> str:
        given = {
            "prompt": conversation_text(row["prompt"]),
            "reference": row.get("reference") or "",
            **values,
        }
        # A text that holds the mark could end where it likes; one that depends on all of them cannot be foreseen.
        digest = hashlib.sha256("\0".join(str(value) for value in given.values()).encode("utf-8", "replace"))
        return _NAME.sub(
            lambda found: str((given | {"mark": f"=== {digest.hexdigest()[:12]} ==="})[found[1]]), self._template
        )

    def _ask(self, questions: Sequence[str]) -> list[Response | Refusal]:
        requests = [SampleRequest(text, self._sampling, _seed(text)) for text in questions]
        found: dict[int, Response | Refusal] = {}
        for (_, index), answer in self._source.sample([requests]) if requests else ():
            found[index] = answer
        if len(found) < len(requests):
            raise ScoringError(
                f"judge {self._options.model!r}: expected {len(requests)} judgements, got {len(found)}. What is done "
                "is kept: run the same command again."
            )
        return [found[index] for index in range(len(requests))]


def rating_of(text: str, low: float, high: float) -> float | None:
    r"""Return the rating on the last line of a judgement; None where there is none, or one outside of the scale.

    Example:
        >>> rating_of("Good, but long.\nRating: [[7]]", 1, 10), rating_of("[[11]]", 1, 10), rating_of("7", 1, 10)
        (7.0, None, None)
    """
    said = _last_line(text)
    if said is None or not _NUMBER.fullmatch(said):
        return None
    rating = float(said)
    return rating if low <= rating <= high else None


def verdict_of(text: str) -> Literal["A", "B", "tie"] | None:
    r"""Return the verdict on the last line of a judgement; None where there is none.

    Example:
        >>> verdict_of("A is right.\n**[[A]]**"), verdict_of("[[tie]]"), verdict_of("[[A]] or [[B]]")
        ('A', 'tie', None)
    """
    said = (_last_line(text) or "").lower()
    names: Mapping[str, Literal["A", "B", "tie"]] = {"a": "A", "b": "B", "tie": "tie", "c": "tie"}
    return names.get(said)


def _last_line(text: str) -> str | None:
    """Return what stands in double brackets on the last line, if nothing else stands there."""
    answer = final_answer(text)
    lines = [line for line in (answer or "").splitlines() if line.strip()]
    found = _VERDICT.fullmatch(lines[-1].strip()) if lines else None
    return found[1] if found else None


def _readable(judgement: Response | Refusal) -> tuple[str | None, str | None]:
    """Return the text of a judgement, or why there is none."""
    if isinstance(judgement, Refusal):
        return None, f"the judge gives no judgement: {judgement.reason:.200}"
    # What was cut off may end in anything.
    return (None, CUT) if judgement.finish_reason == "length" else (judgement.text, None)


def _shown(judgement: Response | Refusal) -> str:
    return judgement.reason[:KEPT] if isinstance(judgement, Refusal) else judgement.text[-KEPT:]


def _outcome(first: Response | Refusal, second: Response | Refusal) -> tuple[float | None, str]:
    """Return the share of a win of the answer that was A first, and what was said in both orders.

    An answer wins that wins in both orders. Where the orders disagree, the judge has preferred a place: a tie.
    """
    verdicts = []
    for judgement in (first, second):
        text, reason = _readable(judgement)
        verdict = None if text is None else verdict_of(text)
        if verdict is None:
            return None, reason or UNREADABLE
        verdicts.append(verdict)
    shares = ({"A": 1.0, "B": 0.0, "tie": 0.5}[verdicts[0]], {"A": 0.0, "B": 1.0, "tie": 0.5}[verdicts[1]])
    return sum(shares) / 2, f"{verdicts[0]}, turned round {verdicts[1]}"


def _turned(share: float | None) -> float | None:
    return None if share is None else 1 - share


def _pairs(group: Sequence[int], rows: Sequence[Row], opponents: int) -> Iterator[_Comparison]:
    """Yield the comparisons of the answers to one prompt: all, or with the nearest ones in a fixed, mixed order.

    In a ring, everyone has the same number of opponents; a hash mixes the sources in it.
    """
    ring = sorted(group, key=lambda place: _seed(_name(rows[place])))
    size = len(ring)
    seen = set()
    for step in range(1, size // 2 + 1):
        if 2 * step > opponents and step > 1 and size - 1 > opponents:
            return
        for start, one in enumerate(ring):
            other = ring[(start + step) % size]
            if one != other and frozenset((one, other)) not in seen:
                seen.add(frozenset((one, other)))
                yield _Comparison(one, other)


def _name(row: Row) -> str:
    return f"{row['prompt_id']} {row['source']} {row.get('index', 0)}"


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:4], "big") >> 1


def _template(options: JudgeOptions) -> str:
    """Return the text of the judge's prompt.

    Raises:
        ConfigError: the file cannot be read, lacks what the judge must see, or names something else.
    """
    if options.prompt is None:
        return (files("fusion_plugins") / "templates" / f"judge_{options.mode}.txt").read_text(encoding="utf-8")
    try:
        text = Path(options.prompt).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"scorers.judge: cannot read the prompt {options.prompt!r}: {getattr(error, 'strerror', None) or error}. "
            "Name a text file in UTF-8."
        ) from error
    found = set(_NAME.findall(text))
    known = _NAMES[options.mode]
    unknown, missing = sorted(found - {*known}), [name for name in _NEEDED[options.mode] if name not in found]
    if unknown or missing:
        got = [f"it has {{{{ {name} }}}}" for name in unknown] + [f"it lacks {{{{ {name} }}}}" for name in missing]
        raise ConfigError(
            f"scorers.judge: the prompt {options.prompt!r} of the mode {options.mode} may name "
            f"{', '.join(f'{{{{ {name} }}}}' for name in known)} and needs {', '.join(_NEEDED[options.mode])}, but "
            f"{', '.join(got)}. Correct the file."
        )
    return text
