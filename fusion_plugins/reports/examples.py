"""Example texts of a training: which source teaches each token, and how its loss has changed."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_plugins.core.fusion.teachers import LABEL, NOTHING, SEVERAL
from fusion_plugins.reports.blocks import Block, Section, Table, Text, Tokens, number
from fusion_plugins.reports.losses import Losses, losses_of

#: nats by which a loss has to change to count as changed, and as much changed
SOME, MUCH = 0.1, 1.0
CHANGES = (
    ("down2", f"lower by more than {MUCH:g} nat"),
    ("down1", f"lower by {SOME:g} to {MUCH:g}"),
    ("same", "about the same"),
    ("up1", f"higher by {SOME:g} to {MUCH:g}"),
    ("up2", f"higher by more than {MUCH:g}"),
)
#: colours of sources; of more, the rest share the last one
MOST_COLOURS = 7
NOT_TRAINED = "not trained on"
#: what stands in place of a source's name -> class of its colour
NO_SOURCES = {SEVERAL: f"c{MOST_COLOURS - 1}", LABEL: "label", NOTHING: "same", NOT_TRAINED: "plain"}


def example_sections(record: Mapping[str, Any], folder: Path, *, most: int, losses: bool | None) -> Iterator[Section]:
    """Yield the section of example texts; none where a training has none.

    Args:
        record: content of ``fusion_training.json``.
        folder: of the trained model.
        most: how many texts.
        losses: as for :func:`fusion_plugins.reports.losses.losses_of`.
    """
    every = record.get("examples") or []
    chosen = every[:: -(-len(every) // most)] if most and every else []
    if not chosen:
        return
    found = losses_of(record, folder, chosen, wanted=losses)
    names = list(dict.fromkeys(name for each in every for name in each["sources"] if name and name not in NO_SOURCES))
    lead = Text(
        f"{len(chosen)} texts, spread evenly over the training rows, up to {max(len(each['ids']) for each in chosen)} "
        "tokens of each. Every colour is also a kind of line under the token; the table under a text has all of it. A "
        f"dot is a token that ends within a character. {LABEL} is a fallback, which teaches the text's own token; "
        f"{NOTHING} is a token that only the language-model loss trains on."
    )
    parts = [
        Section(f"Row {each['row'] + 1:,}", list(_blocks(each, names, _of(found, place))))
        for place, each in enumerate(chosen)
    ]
    yield Section("Example texts", [lead, *([Text(found)] if isinstance(found, str) else [])], parts)


def _of(found: Losses | str, place: int) -> tuple[Sequence[float], Sequence[float]] | None:
    return None if isinstance(found, str) else (found.before[place], found.after[place])


def _blocks(
    example: Mapping[str, Any], names: Sequence[str], losses: tuple[Sequence[float], Sequence[float]] | None
) -> Iterator[Block]:
    sources = [_source(example, place) for place in range(len(example["ids"]))]
    counts = Counter(source for source in sources if source != NOT_TRAINED)
    taught = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    yield Text(f"{len(sources)} of {example['of_tokens']:,} tokens. Taught by: {taught or 'nobody'}.")
    styles = _styles(names)
    legend = [(styles.get(name, ""), name) for name in (*names, *NO_SOURCES) if name in sources]
    tokens = [(text, styles.get(name, ""), name) for text, name in zip(example["tokens"], sources, strict=True)]
    yield Tokens("Tokens coloured by the source that teaches them", tokens, legend)
    if losses is None:
        yield _table(example, sources, None)
        return
    before, after = losses
    trained = [place for place, source in enumerate(sources) if source != NOT_TRAINED and place]
    if trained:
        means = [sum(values[place] for place in trained) / len(trained) for values in losses]
        yield Text(
            f"Mean loss of these tokens: {means[0]:.3f} nats before the training, {means[1]:.3f} after it "
            f"({means[1] - means[0]:+.3f})."
        )
    changed = [
        (text, change_class(before[place], after[place]) if place else "", _said(before, after, place))
        for place, text in enumerate(example["tokens"])
    ]
    yield Tokens("Tokens coloured by the change of their loss", changed, CHANGES)
    yield _table(example, sources, losses)


def _source(example: Mapping[str, Any], place: int) -> str:
    if not example["supervised"][place]:
        return NOT_TRAINED
    return example["sources"][place] or NOTHING


def _styles(names: Sequence[str]) -> dict[str, str]:
    """Return source -> class of its colour."""
    colours = {name: f"c{min(place, MOST_COLOURS - 2)}" for place, name in enumerate(names)}
    return colours | NO_SOURCES


def change_class(before: float, after: float) -> str:
    """Return the class of a token's colour by the change of its loss, in nats.

    Example:
        >>> [change_class(2.0, after) for after in (0.5, 1.7, 2.05, 2.5, 4.0)]
        ['down2', 'down1', 'same', 'up1', 'up2']
    """
    change = after - before
    if abs(change) <= SOME:
        return "same"
    return ("down" if change < 0 else "up") + ("1" if abs(change) <= MUCH else "2")


def _said(before: Sequence[float], after: Sequence[float], place: int) -> str:
    return f"{before[place]:.2f} to {after[place]:.2f} nats" if place else "the first token has no loss"


def _table(
    example: Mapping[str, Any], sources: Sequence[str], losses: tuple[Sequence[float], Sequence[float]] | None
) -> Table:
    rows = []
    for place, (text, source) in enumerate(zip(example["tokens"], sources, strict=True)):
        figures = [number(values[place] if place else None, 3) for values in losses] if losses else []
        rows.append([str(place + 1), text or "·", source, *figures])
    heads = ("token", "text", "source", *(("loss before", "loss after") if losses else ()))
    title = f"Tokens of row {example['row'] + 1:,}"
    return Table(title, heads, rows, words=3, folded=title)
