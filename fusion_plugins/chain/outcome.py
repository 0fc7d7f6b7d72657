"""What rounds have come to: a table, ``rounds.json`` and a plot of the held-out measure."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

from fusion_plugins.chain.round_configs import Rounds
from fusion_plugins.chain.rounds import HELD_OUT
from fusion_plugins.core.fusion.record import supervised_bytes
from fusion_plugins.errors import ChainError
from fusion_plugins.page import COLOURS, new_figure, plot_name, plot_unit, svg_file
from fusion_plugins.store import Store, open_rows, open_store
from fusion_plugins.store.files import write_atomic
from fusion_plugins.store.manifest import MANIFEST_NAME

CROSS_ENTROPY = "nats per byte"


@dataclass(frozen=True)
class Outcome:
    """One round; round 0 is the target as it was given.

    Attributes:
        round: its number.
        answers: what the target was asked; None before it was.
        correct: share of the answers with a verdict that are right; None where nothing judges them.
        measured: name -> value of the held-out measure of the round's checkpoint.
    """

    round: int
    answers: int | None = None
    correct: float | None = None
    measured: dict[str, float] = field(default_factory=dict)


def outcomes(rounds: Rounds, done: Sequence[str]) -> list[Outcome]:
    """Return the rounds that have come to something.

    Args:
        rounds: all of them.
        done: names of the steps that have ended well.

    Raises:
        ChainError: the command that measures said no numbers.
    """
    found = []
    for number in range(rounds.config.rounds + 1):
        folder, name = rounds.out / rounds.name(number), rounds.name(number)
        measured = _measured(rounds, folder / HELD_OUT) if f"{name}-measure" in done else {}
        answers = correct = None
        if f"{name}-sample" in done:
            answers = len(open_rows(folder / "responses"))
        if f"{name}-score" in done:
            verdicts = [row["correct"] for row in open_rows(folder / "scored") if row.get("correct") is not None]
            correct = sum(verdicts) / len(verdicts) if verdicts else None
        if measured or answers is not None:
            found.append(Outcome(number, answers, correct, measured))
    return found


def _measured(rounds: Rounds, place: Path) -> dict[str, float]:
    if place.is_dir() and (place / MANIFEST_NAME).exists():
        return _cross_entropy(open_store(place))
    lines = [line for line in place.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    try:
        values = json.loads(lines[-1])
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    except (IndexError, ValueError, AttributeError, OverflowError):
        numbers = {}
    if not numbers or not all(map(math.isfinite, numbers.values())):
        command = rounds.config.held_out.command  # type: ignore[union-attr]
        raise ChainError(
            f"{place}: expected a JSON object with finite numbers as the last line that `{command}` prints, got "
            f"{lines[-1][:200] if lines else 'nothing'!r}. Correct the command, remove that file, then run the same "
            "again."
        )
    return numbers


def _cross_entropy(store: Store) -> dict[str, float]:
    """Return the nats of all texts over their bytes; a long text counts as much as it is long."""
    nats = n_bytes = 0.0
    for id in store.ids():
        cost = store.cross_entropies(id).ce_per_byte
        if not math.isnan(cost):
            size = int(supervised_bytes(store.text(id)).sum())
            nats, n_bytes = nats + cost * size, n_bytes + size
    return {CROSS_ENTROPY: nats / n_bytes} if n_bytes else {}


def _measures(found: Sequence[Outcome]) -> list[str]:
    """Return the names of what is measured, in the order of their first round."""
    return list(dict.fromkeys(name for outcome in found for name in outcome.measured))


def table_of(found: Sequence[Outcome]) -> Table:
    """Return one line per round."""
    names = _measures(found)
    table = Table("round", "answers", "correct", *names)
    for outcome in found:
        table.add_row(
            str(outcome.round),
            "-" if outcome.answers is None else f"{outcome.answers:,}",
            "-" if outcome.correct is None else f"{outcome.correct:.1%}",
            *(f"{outcome.measured[name]:.4g}" if name in outcome.measured else "-" for name in names),
        )
    return table


def write_outcomes(rounds: Rounds, found: Sequence[Outcome]) -> list[Path]:
    """Write ``rounds.json`` and, where something is measured, ``rounds.svg``; returns what was written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; ``rounds.json`` is written.
    """
    written = [rounds.out / "rounds.json"]
    write_atomic(written[0], json.dumps([asdict(outcome) for outcome in found], indent=1) + "\n")
    if any(outcome.measured for outcome in found):
        picture = _plot(found)
        written.append(rounds.out / "rounds.svg")
        write_atomic(written[1], picture)
    return written


def _plot(found: Sequence[Outcome]) -> str:
    names = _measures(found)
    figure = new_figure(3.6 * len(names), 2.8)
    figure.patch.set_alpha(1)
    for place, (name, axes) in enumerate(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True)):
        points = [(outcome.round, outcome.measured[name]) for outcome in found if name in outcome.measured]
        unit, named = plot_unit([value for _, value in points])
        axes.plot(
            *zip(*((at, value / unit) for at, value in points), strict=True),
            marker="o",
            color=COLOURS[place % len(COLOURS)],
        )
        axes.set(xlabel="round", title=plot_name(name) + named, xticks=[outcome.round for outcome in found])
        axes.grid(alpha=0.3)
    return svg_file(figure, "rounds")
