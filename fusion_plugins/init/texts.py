"""What the plan of a run needs to know about its texts or prompts, from some of them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from fusion_plugins.column_names import PromptColumns
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize_content
from fusion_plugins.errors import DataError, FusionError
from fusion_plugins.init.models import Model
from fusion_plugins.inputs import InputSet, Selection, Unusable, open_prompts, open_texts
from fusion_plugins.texts import Prompt, Text

#: the longest texts that every tokenizer is asked about, and others that are spread over the set
LONGEST, SPREAD = 64, 64
#: domains whose answers are verified, and the column that this needs
VERIFIED_BY = {"math": "reference", "code": "tests"}


@dataclass(frozen=True)
class TextFacts:
    """A set of texts or prompts.

    Attributes:
        path: as it was named.
        count: usable rows.
        n_bytes: bytes of their contents.
        chats: rows with messages.
        ends_with_user: chats without an answer at their end, which nothing can be learnt from as texts.
        domains: domain -> prompts; empty for texts.
        verifiable: prompts whose answers can be verified.
        unusable: place or id -> why.
        longest: the longest, by bytes.
        spread: some, evenly over the set.
    """

    path: str
    count: int
    n_bytes: int
    chats: int
    ends_with_user: int
    domains: dict[str, int]
    verifiable: int
    unusable: Unusable
    longest: list[Text] = field(repr=False)
    spread: list[Text] = field(repr=False)


def read_texts_facts(path: str, prompts: bool, names: PromptColumns | None = None) -> TextFacts:
    """Look at every row of a set.

    Args:
        path: files or folders, as `fusion capture` and `fusion sample` take them.
        prompts: read them as prompts.
        names: where the text or chat of a row stands; None: in ``text`` or ``messages``.

    Raises:
        DataError: there are none that can be used; the message says why the first cannot.
    """
    unusable: Unusable = {}
    items: InputSet[Prompt] | InputSet[Text]
    if prompts:
        items = open_prompts(path, unusable=unusable, names=names)
    else:
        items = open_texts(path, unusable=unusable, selection=Selection(names=names or PromptColumns()))
    if not len(items):
        reason = next(iter(unusable.values()), "the file is empty")
        raise DataError(f"{path}: expected texts, got none that can be used: {reason}")
    step = max(len(items) // SPREAD, 1)
    longest: list[Text] = []
    spread: list[Text] = []
    domains: Counter[str] = Counter()
    chats = ends = verifiable = 0
    rows: Iterable[Prompt | Text] = items
    for number, item in enumerate(rows):
        text = item.text if isinstance(item, Prompt) else item
        if isinstance(item, Prompt):
            domains[item.domain] += 1
            verifiable += getattr(item, VERIFIED_BY.get(item.domain, ""), None) is not None
        if not isinstance(text.content, str):
            chats += 1
            ends += text.content[-1]["role"] != "assistant"
        if number % step == 0 and len(spread) < SPREAD:
            spread.append(text)
        longest.append(text)
        if len(longest) >= 16 * LONGEST:
            longest = _longest(longest)
    return TextFacts(
        path, len(items), items.n_bytes, chats, ends, dict(domains), verifiable, unusable, _longest(longest), spread
    )


def _longest(texts: list[Text]) -> list[Text]:
    return sorted(texts, key=lambda text: -text.n_bytes)[:LONGEST]


@dataclass(frozen=True)
class Lengths:
    """What a model makes of the texts.

    Attributes:
        longest: tokens of the longest text that was looked at.
        per_byte: tokens per byte of content.
        refused: text -> why, of those that its chat template cannot write.
    """

    longest: int
    per_byte: float
    refused: dict[str, str]


def lengths_of(model: Model, texts: TextFacts) -> Lengths | None:
    """Tokenize some of the texts as a model reads them; None where there is no tokenizer to do it with."""
    if model.tokenizer is None or model.table is None or model.problem:
        return None
    longest = tokens = n_bytes = 0
    refused: dict[str, str] = {}
    for text in texts.spread:
        count = _tokens(model.tokenizer, model.table, text, refused)
        if count:
            tokens, n_bytes, longest = tokens + count, n_bytes + text.n_bytes, max(longest, count)
    for text in texts.longest:
        longest = max(longest, _tokens(model.tokenizer, model.table, text, refused))
    return Lengths(longest, tokens / n_bytes if n_bytes else 0.25, refused)


def _tokens(tokenizer: Any, table: TokenTable, text: Text, refused: dict[str, str]) -> int:
    if not isinstance(text.content, str) and not tokenizer.chat_template:
        return 0  # said once, for the whole model
    content = text.content
    try:
        if not isinstance(content, str) and content[-1]["role"] != "assistant":
            rendered = tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=True)
            return len(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        return len(tokenize_content(tokenizer, table, content, tools=text.tools)[0].input_ids)
    except FusionError as error:
        refused[text.id] = str(error)
    except Exception as error:  # templates raise errors of any type
        refused[text.id] = f"the chat template refuses it: {error}"
    return 0


def first(names: Sequence[str], count: int = 3) -> str:
    """Return the first of some names, and how many more there are.

    Example:
        >>> first(["a", "b", "c", "d"], 2)
        'a, b and 2 more'
    """
    shown = ", ".join(islice(names, count))
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"
