"""The part about what was measured: held-out texts with intervals, and numbers that steps of a run have printed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusion_plugins.core.fusion.held_out import PerByte, nats_per_byte
from fusion_plugins.core.fusion.record import supervised_bytes
from fusion_plugins.reports import charts
from fusion_plugins.reports.blocks import Block, Pictures, Table, Text, number
from fusion_plugins.reports.kinds import expected_form, read_json
from fusion_plugins.store import open_store

#: what `fusion rounds` writes about its rounds
ROUNDS_FILE = "rounds.json"
#: texts of a held-out store that are looked at
MOST_TEXTS = 20_000
#: bytes of a file that a step has printed
MOST_PRINTED = 1 << 20
HEADS = ("measured", "model", "texts", "nats per byte", "95 % interval", "lower than the first by", "95 % interval ")


@dataclass(frozen=True)
class Costs:
    """What a model costs on held-out texts.

    Attributes:
        name: of the measurement.
        model: which model.
        nats: text -> its cross-entropy in nats.
        n_bytes: text -> its supervised bytes.
        left_out: texts beyond :data:`MOST_TEXTS`.
    """

    name: str
    model: str
    nats: Mapping[str, float]
    n_bytes: Mapping[str, int]
    left_out: int = 0


def read_costs(name: str, folder: Path) -> Costs:
    """Read the cross-entropies of a store, text by text.

    Raises:
        StoreError: it is damaged.
    """
    store = open_store(folder)
    nats, sizes = {}, {}
    ids = store.ids()
    for id in ids[:MOST_TEXTS]:
        cost = store.cross_entropies(id).ce_per_byte
        if cost == cost:
            sizes[id] = int(supervised_bytes(store.text(id)).sum())
            nats[id] = cost * sizes[id]
    return Costs(name, store.manifest.model, nats, sizes, max(0, len(ids) - MOST_TEXTS))


def cost_blocks(found: Sequence[Costs]) -> list[Block]:
    """Return the held-out table, each model compared with the first one on the texts that both have."""
    rows, points = [], []
    for place, costs in enumerate(found):
        own = _of(costs, costs)
        rows.append([costs.name, costs.model, number(len(costs.nats)), number(own.value), _interval(own)])
        less = _of(found[0], costs, less=True) if place else None
        rows[-1] += [f"{less.value:+.4f}", _interval(less, signed=True)] if less else ["–", "–"]
        points.append((float(place), own.value))
    blocks: list[Block] = [
        Table("Held-out cross-entropy", HEADS, rows, words=2),
        Text(
            "Nats over bytes of the same texts; lower is better. Intervals are of 95 % and take the texts as the "
            "sample. The difference is of the texts that both models have: where its interval holds 0, the two may be "
            "equally good."
        ),
    ]
    if any(costs.left_out for costs in found):
        blocks.append(Text(f"The first {MOST_TEXTS:,} texts of each store are counted.", "fair"))
    if len(found) > 1:
        blocks.append(Pictures([charts.lines("Held-out nats per byte", {"nats per byte": points}, "measurement")]))
    return blocks


def _of(first: Costs, costs: Costs, *, less: bool = False) -> PerByte:
    ids = [id for id in costs.nats if id in first.nats and first.n_bytes[id] == costs.n_bytes[id]]
    base = np.array([first.nats[id] if less else 0.0 for id in ids])
    nats, sizes = np.array([costs.nats[id] for id in ids]), np.array([costs.n_bytes[id] for id in ids], float)
    return nats_per_byte(base - nats if less else nats, sizes)


def _interval(found: PerByte, *, signed: bool = False) -> str:
    if found.low != found.low:
        return "–"
    return f"{found.low:+.4f} to {found.high:+.4f}" if signed else f"{found.low:.4f} to {found.high:.4f}"


def round_blocks(path: Path) -> list[Block]:
    """Return the table that ``fusion rounds`` has written about its rounds; nothing where there is none.

    Raises:
        DataError: the file is damaged.
    """
    found = read_json(path)
    if not isinstance(found, list) or not found:
        return []
    with expected_form(path):
        names = list(dict.fromkeys(name for each in found for name in each["measured"]))
        rows = [
            [
                *(str(each["round"]), number(each["answers"])),
                "–" if each["correct"] is None else f"{each['correct']:.1%}",
                *(number(each["measured"].get(name)) for name in names),
            ]
            for each in found
        ]
    return [Table("Rounds", ("round", "answers", "correct", *names), rows)]


def printed_numbers(place: Path) -> dict[str, float]:
    """Return the numbers of the JSON object that is the last line of a file, or all of it; empty for another file."""
    try:
        if not place.is_file() or place.stat().st_size > MOST_PRINTED:
            return {}
        text = place.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return {}
    for candidate in (text.rpartition("\n")[2], text):
        try:
            # A whole number may be too large for a float.
            values = json.loads(candidate, parse_int=float)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict):
            return {str(name): value for name, value in values.items() if isinstance(value, float)}
    return {}


def printed_blocks(found: Mapping[str, Mapping[str, float]]) -> list[Block]:
    """Return the table of what steps have printed: step -> name -> value."""
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    rows = [[step, *(number(values.get(name)) for name in names)] for step, values in found.items()]
    return [
        Table("Printed by steps", ("step", *names), rows),
        Text("Numbers as the steps have printed them; they have no intervals."),
    ]
