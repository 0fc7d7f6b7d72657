"""Question d: fine-tuning on the answers of sources, and what preference losses add to it."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas

from fusion_lab.report import NOT_RUN, figure, forest, hypotheses, markdown, read, save
from fusion_lab.statistics import Mean, difference, holm, mean, pm, rows_with, signed

ANSWERS = {
    "gold": "gold solutions",
    "strong": "the strong source",
    "weak": "the weak source",
    "both": "both sources",
    "own": "the target itself",
}
STARTS = {"target": "the target", "better": "a better target"}
LOSSES = {
    "none": "none: the first stage",
    "sft": "SFT",
    "dpo": "DPO",
    "dpo_nll": "DPO + NLL",
    "ln_dpo": "LN-DPO",
    "wrpo": "WRPO",
    "infifpo": "InfiFPO",
}
PAIRS = {
    "both": "best answers of the sources",
    "own": "own answers, right before wrong",
    "source": "one source, right before wrong",
    "delta": "own wrong answers, more right sums before fewer",
    "short": "own answers, fewer sums before more",
}


#: share of right sums that is left out of the plot
FAR_OFF = 0.5


def make(results: Path, images: Path) -> dict[str, str]:
    """Return the tables, the plot and the sentences of both stages."""
    texts = dict.fromkeys(("answers", "answers-sentence", "preferences", "preferences-sentence"), NOT_RUN)
    texts |= {f"{name}-hypotheses": hypotheses(f"d_{name}") for name in ("answers", "preferences")}
    answers, preferences = read(results, "d_answers"), read(results, "d_preferences")
    if answers is not None:
        texts |= _first(answers[answers["of"] == "heldout"])
        texts["answers"] += "\n" + _doctor(answers)
    if preferences is not None:
        texts |= _second(preferences[preferences["of"] == "heldout"], results, images / "lab_preferences.svg")
    return texts | {"preferences-pilot": _pilot(results)}


def _cells(table: pandas.DataFrame, keys: list[str]) -> list[tuple[dict[str, Any], pandas.Series]]:
    """Return the factors of every cell, in the order of the table, and where its rows are."""
    found = table[keys].drop_duplicates().to_dict("records")
    return [(factors, rows_with(table, factors)) for factors in found]


def _chance(table: pandas.DataFrame) -> str:
    return f"The best constant answer solves {table['constant'].iloc[0]:.1%} of the held-out problems.\n"


def _before(results: Path, column: str) -> float:
    world = read(results, "world")
    assert world is not None  # a world is measured before anything is asked in it
    return float(world[world["of"] == "target"][column].iloc[0])


def _doctor(table: pandas.DataFrame) -> str:
    """Return what `fusion doctor` said of each source, before any training."""
    said = table[(table["of"] == "doctor") & (table["start"] == "target")]
    rows = [
        [
            ANSWERS[str(name)],
            pm(mean(here["value"].to_list()), 1, 100),
            ", ".join(f"{verdict} ({count})" for verdict, count in here["verdict"].value_counts().items()),
        ]
        for name, here in said.groupby("name", sort=False)
    ]
    return markdown(["source", "right answers to the prompts, %", "fusion doctor against the target (seeds)"], rows)


def _first(table: pandas.DataFrame) -> dict[str, str]:
    keys = ["start", "teacher", "per_prompt", "prompts", "samples"]
    cells = _cells(table, keys)
    strong = next(mask for factors, mask in cells if list(factors.values()) == ["target", "strong", "best", 1.0, 4])
    rows, gains = [], {}
    for factors, mask in cells:
        here = table[mask]
        more = "" if factors["per_prompt"] == "best" else ", best of each"
        gains[tuple(factors.values())] = difference(table, mask, strong, "chains")
        rows.append(
            [
                _trained_on(factors) + more,
                f"{factors['prompts']:.0%}",
                factors["samples"],
                "" if factors["teacher"] == "none" else f"{here['rows'].mean():.0f}",
                pm(mean(here["chains"].to_list()), 1, 100),
                pm(mean(here["answers"].to_list()), 1, 100),
                signed(gains[tuple(factors.values())], 1, 100),
                pm(mean(here["bpb_docs"].to_list())),
            ]
        )
    header = ["model", "prompts", "samples", "answers", "right sums, %", "right answer, %"]
    header += ["minus the strong source", "docs, bits per byte"]
    return {
        "answers": markdown(header, rows) + "\n" + _chance(table),
        "answers-sentence": _first_sentence(table, cells),
    }


def _trained_on(factors: dict[str, Any]) -> str:
    start = STARTS[factors["start"]]
    return f"{start} before" if factors["teacher"] == "none" else f"{start} on {ANSWERS[factors['teacher']]}"


def _first_sentence(table: pandas.DataFrame, cells: list[tuple[dict[str, Any], pandas.Series]]) -> str:
    told = []
    for factors, mask in cells:
        if (factors["per_prompt"], factors["prompts"], factors["samples"]) == ("best", 1.0, 4):
            share = pm(mean(table[mask]["chains"].to_list()), 1, 100)
            told.append(f"{_trained_on(factors)} {share}")
    return f"Held-out problems with right sums, %: {', '.join(told)}.\n"


def _second(table: pandas.DataFrame, results: Path, path: Path) -> dict[str, str]:
    cells = _cells(table, ["method", "pairs", "problems"])
    none = table["method"] == "none"
    found = [
        (factors, mask, difference(table, mask, none, "chains"))
        for factors, mask in cells
        if factors["method"] != "none"
    ]
    corrected = holm([gain for *_, gain in found])
    rows = [
        [LOSSES["none"], "", pm(mean(table[none]["chains"].to_list()), 1, 100), "", "", *_more(table[none])],
        *(
            [
                _named(factors),
                f"{table[mask]['pairs_trained'].mean():.0f}" if factors["method"] != "sft" else "",
                pm(mean(table[mask]["chains"].to_list()), 1, 100),
                signed(gain, 1, 100),
                "?" if np.isnan(p) else f"{p:.3f}",
                *_more(table[mask]),
            ]
            for (factors, mask, gain), p in zip(found, corrected, strict=True)
        ),
    ]
    header = ["second stage", "pairs", "right sums, %", "minus none", "p (Holm)", "docs, bits per byte", "sums written"]
    header += ["chosen, nats", "rejected, nats", "rate", "beta"]
    # Fine-tuning on many problems is so far off that the others would be one dot; the table has it.
    _plot([(_named(factors), gain) for factors, _, gain in found if abs(gain.value) < FAR_OFF], path)
    told = [f"{_named(factors)} {signed(gain, 1, 100)}" for factors, _, gain in found]
    first = pm(mean(table[none]["chains"].to_list()), 1, 100)
    sentence = (
        f"The first stage brings the target from {_before(results, 'chains'):.1%} to {first} % right sums. Second "
        f"stages against it, in points: {'; '.join(told)}. {none.sum()} seeds.\n"
    )
    picture = "![Preference losses against the first stage alone](images/lab_preferences.svg)\n\n"
    return {
        "preferences": markdown(header, rows) + "\n" + _chance(table),
        "preferences-sentence": picture + sentence,
    }


def _named(factors: dict[str, Any]) -> str:
    many = f", {factors['problems']} times the problems" if factors["problems"] > 1 else ""
    return f"{LOSSES[factors['method']]}, {PAIRS[factors['pairs']]}{many}"


def _more(here: pandas.DataFrame) -> list[str]:
    """Return forgetting, the length of answers, what became of the log-probabilities, and the settings."""
    cells = [pm(mean(here["bpb_docs"].to_list())), pm(mean(here["written"].to_list()), 2)]
    for side in ("chosen", "rejected"):
        known = f"{side}_before" in here and here[f"{side}_before"].notna().any()
        if known:
            cells.append(f"{here[f'{side}_before'].mean():.1f} to {here[f'{side}_after'].mean():.1f}")
        else:
            cells.append("")
    for name in ("rate", "beta"):
        # Where nothing was tuned, the table has the word of the question's file.
        values = pandas.to_numeric(here[name], errors="coerce").dropna() if name in here else ()
        cells.append(
            "" if not len(values) or (name == "beta" and (here["method"] == "sft").all()) else f"{values.iloc[0]:g}"
        )
    return cells


def _plot(found: list[tuple[str, Mean]], path: Path) -> None:
    picture, axes = figure(width=7, height=0.26 * len(found) + 0.8)
    forest(axes, found, 100)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("right sums, points against the first stage alone")
    save(picture, path)


def _pilot(results: Path) -> str:
    """Return every setting that the pilot tried: one seed, validation problems."""
    table = read(results, "d_pilot_preferences")
    if table is None:
        return NOT_RUN
    table = table[(table["of"] == "validation")]
    start = table[table["method"] == "none"]["chains"]
    rows = []
    keys = ["method", "pairs", "problems"]
    for values, here in table[table["method"] != "none"].groupby(keys, sort=False):
        factors = dict(zip(keys, values, strict=True))
        best = here.sort_values("chains", ascending=False)
        tried = ", ".join(
            f"{row['learning_rate']:g}" + f" / {row['beta']:g}" + f": {row['chains']:.1%}"
            for row in best.to_dict("records")
        )
        rows.append([_named(factors), tried])
    head = f"Without a second stage: {start.iloc[0]:.1%}.\n\n" if len(start) else ""
    return head + markdown(["second stage", "rate / beta: right sums on validation problems"], rows)
