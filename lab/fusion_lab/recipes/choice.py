"""Which source MinCE chooses for a text, when only its first bytes count."""

import random
from typing import Any

from fusion_lab import world
from fusion_lab.runner import Cell, Work
from fusion_lab.world import DOMAINS, SOURCES, Lab, Stage

__all__ = ["needs", "run"]

#: supervised bytes of a text that count; None for all
AMOUNTS = (8, 16, 32, 64, 128, None)
SPECIALISTS = {"docs": ("docs",), "sums": ("numbers", "digits")}


def needs(lab: Lab, cell: Cell) -> list[Stage]:
    """Return the stores of the sources."""
    return [world.store(lab, name) for name in SOURCES]


def run(lab: Lab, cell: Cell, work: Work) -> None:
    """Count the choices over a sample of each domain; the seed decides which texts."""
    for row in work.call(_count, lab, cell.seed, cell["texts"]):
        work.record("choice", **row)


def _count(lab: Lab, seed: int, texts: int) -> list[dict[str, Any]]:
    from fusion_plugins.store import open_store

    stores = {name: open_store(str(lab.store(name))) for name in SOURCES}
    rows = world.read_rows(lab.data("common"))
    found = []
    for domain in DOMAINS:
        sample = random.Random(seed).sample([row["id"] for row in rows if row["domain"] == domain], texts)
        records = {name: [store[id] for id in sample] for name, store in stores.items()}
        for amount in AMOUNTS:
            for metric in ("byte", "token"):
                costs = {name: [_cost(record, amount, metric) for record in own] for name, own in records.items()}
                chosen = [min(SOURCES, key=lambda name: costs[name][n]) for n in range(texts)]
                shares = {f"to_{name}": chosen.count(name) / texts for name in SOURCES}
                right = sum(name in SPECIALISTS[domain] for name in chosen) / texts
                found.append({"domain": domain, "bytes": amount or "all", "metric": metric, "right": right, **shares})
    return found


def _cost(record: Any, amount: int | None, metric: str) -> float:
    """Return the cross-entropy of a record over its first supervised bytes, nats per byte or per token."""
    from fusion_plugins.core.fusion.record import supervised_bytes

    n_bytes = supervised_bytes(record.text)
    inside = n_bytes > 0
    if amount is not None:
        inside &= n_bytes.cumsum() <= max(amount, n_bytes[inside][0])
    nats = -float(record.topk.token_logprobs[:-1][inside[1:]].sum())
    return nats / (int(n_bytes[inside].sum()) if metric == "byte" else int(inside.sum()))
