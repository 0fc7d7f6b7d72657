"""Question g: rounds on own answers against fine-tuning and fusion on the source's answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas

from fusion_lab.report import NOT_RUN, hypotheses, markdown, read
from fusion_lab.statistics import difference, holm, mean, pm, rows_with, signed

METHODS = {
    "none": "none: the first stage",
    "sft": "SFT on the source's right answers",
    "off_policy": "fusion on the source's right answers",
    "off_policy_both": "fusion on the source's right answers, two sources",
    "rounds": "rounds on own answers",
    "rounds_both": "rounds on own answers, two sources",
}
STARTS = {"tuned": "", "target": ", from the target"}


def make(results: Path, images: Path) -> dict[str, str]:
    """Return the tables and the sentence."""
    texts = dict.fromkeys(
        ("rounds", "rounds-sentence", "rounds-seconds", "rounds-longer", "rounds-longer-sentence"), NOT_RUN
    )
    table, longer = read(results, "g_rounds"), read(results, "g_longer")
    if table is not None:
        texts["rounds"], texts["rounds-sentence"] = _main(table[table["of"] == "heldout"])
    if longer is not None:
        texts["rounds-longer"], texts["rounds-longer-sentence"] = _main(longer[longer["of"] == "heldout"])
    for name in ("g_pilot_rounds", "g_rounds"):  # the pilot's round, until there are those of all seeds
        found = read(results, name)
        if found is not None and (found["of"] == "stored").any():
            texts["rounds-seconds"] = _seconds(found)
    return texts | {
        "rounds-hypotheses": hypotheses("g_rounds"),
        "rounds-longer-hypotheses": hypotheses("g_longer"),
        "rounds-pilot": _pilot(read(results, "g_pilot_rounds")),
        "rounds-longer-pilot": _pilot(read(results, "g_pilot_longer")),
    }


def _name(factors: dict[str, Any]) -> str:
    loss = "" if factors["loss"] == "none" else f", {factors['loss']}"
    times = f", {factors['times']:.0f} times the steps" if factors.get("times", 1) > 1 else ""
    return f"{METHODS[factors['method']]}{loss}{STARTS[factors['start']]}{times}"


def _main(table: pandas.DataFrame) -> tuple[str, str]:
    """Return the table of the second stages, and its sentence."""
    keys = [key for key in ("method", "loss", "start", "times") if key in table]
    cells = [(factors, rows_with(table, factors)) for factors in table[keys].drop_duplicates().to_dict("records")]
    gains = {}
    for factors, mask in cells:
        if factors["method"] not in ("none", "sft"):
            like = {"method": "sft"} | {key: factors[key] for key in keys if key not in ("method", "loss")}
            gains[_name(factors)] = difference(table, mask, rows_with(table, like), "chains")
    corrected = dict(zip(gains, holm(list(gains.values())), strict=True))
    rows = []
    for factors, mask in cells:
        here, name = table[mask], _name(factors)
        gain, p = gains.get(name), corrected.get(name, float("nan"))
        rows.append(
            [
                name,
                pm(mean(here["chains"].to_list()), 1, 100),
                "" if gain is None else signed(gain, 1, 100),
                "" if np.isnan(p) else f"{p:.3f}",
                pm(mean(here["answers"].to_list()), 1, 100),
                pm(mean(here["luck"].to_list()), 1, 100),
                pm(mean(here["bpb_docs"].to_list())),
                f"{here['rate'].iloc[0]:g}",
            ]
        )
    header = ["second stage", "right sums, %", "minus SFT", "p (Holm)", "right answer, %", "luck, %"]
    header += ["docs, bits per byte", "rate"]
    chance = f"\nThe best constant answer solves {table['constant'].iloc[0]:.1%} of the held-out problems.\n"
    told = "; ".join(f"{name} {signed(gain, 1, 100)}" for name, gain in gains.items())
    sentence = f"Right sums against SFT with as many steps, in points: {told}. {table['seed'].nunique()} seeds.\n"
    return markdown(header, rows) + chance, sentence


def _seconds(table: pandas.DataFrame) -> str:
    stored = table[table["of"] == "stored"]
    tokens, seconds = stored["tokens"].mean(), stored["seconds"].mean()
    rows = []
    for runs, online in table[table["of"] == "online"].groupby("runs"):
        rows.append(
            [
                f"{runs:.0f}",
                f"{tokens:,.0f}",
                f"{online['tokens'].mean():,.0f}",
                f"{online['tokens'].mean() / tokens:.1f}x",
                f"{seconds:.2f}",
                f"{online['seconds'].mean():.2f}",
                f"{online['seconds'].mean() / seconds:.1f}x",
            ]
        )
    header = ["trainings on one round's answers", "tokens, stored", "tokens, online", "fewer"]
    header += ["forward seconds, stored", "forward seconds, online", "fewer"]
    whole = stored["command_seconds"].mean()
    return (
        markdown(header, rows)
        + f"\nThe command `fusion capture`, its start and its files too: {whole:.1f} CPU seconds.\n"
    )


def _pilot(table: pandas.DataFrame | None) -> str:
    if table is None:
        return NOT_RUN
    keys = ["method", "loss", "rounds", "learning_rate"]
    rounds = table[table["of"] == "round"]
    rows = []
    for line in table[table["of"] == "validation"].to_dict("records"):
        own = rounds[rows_with(rounds, {key: line[key] for key in keys})] if len(rounds) else rounds
        rows.append(
            [
                _name(line),
                f"{line['rounds']:.0f}" if line["method"] in ("rounds", "rounds_both") else "",
                "" if line["method"] == "none" else f"{line['learning_rate']:g}",
                f"{line['chains']:.1%}",
                f"{line['answers']:.1%}",
                f"{line['bpb_docs']:.3f}",
                ", ".join(f"{share:.1%}" for share in own.sort_values("number")["own_right"]),
            ]
        )
    header = [
        "second stage",
        "rounds",
        "rate",
        "right sums",
        "right answer",
        "docs, bits per byte",
        "right number in own answers, by round",
    ]
    return markdown(header, rows)
