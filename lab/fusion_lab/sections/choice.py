"""Question e: how often MinCE chooses a specialist of the text's domain."""

from pathlib import Path

import numpy as np

from fusion_lab.report import figure, hypotheses, markdown, read, save
from fusion_lab.statistics import mean, pm


def make(results: Path, images: Path) -> dict[str, str]:
    """Return the table and the sentence."""
    table = read(results, "e_choice")
    if table is None:
        return {}
    amounts = sorted(set(table["bytes"].astype(str)), key=lambda amount: np.inf if amount == "all" else float(amount))
    table = table.assign(bytes=table["bytes"].astype(str))
    rows, picture, axes = [], *figure()
    found = {}
    for domain in ("docs", "sums"):
        for metric in ("byte", "token"):
            here = table[(table["domain"] == domain) & (table["metric"] == metric)]
            shares = [mean(here[here["bytes"] == amount]["right"].to_list()) for amount in amounts]
            found[domain, metric] = dict(zip(amounts, shares, strict=True))
            rows.append([f"{domain}, per {metric}", *(pm(share, 1, 100) for share in shares)])
            axes.plot(
                amounts,
                [100 * share.value for share in shares],
                marker="o",
                linestyle="-" if metric == "byte" else "--",
                color="tab:blue" if domain == "docs" else "tab:red",
                label=f"{domain}, per {metric}",
            )
    axes.set_xlabel("bytes of the text that count")
    axes.set_ylabel("specialist chosen, %")
    axes.legend(frameon=False)
    save(picture, images / "lab_choice.svg")
    whole = [f"{domain} {pm(found[domain, metric]['all'], 1, 100)} % per {metric}" for domain, metric in found]
    sentence = f"At whole texts MinCE chooses a specialist of the domain: {', '.join(whole)}.\n"
    header = ["specialist chosen, %", *(f"{amount} bytes" if amount != "all" else "whole text" for amount in amounts)]
    return {"choice": markdown(header, rows), "choice-sentence": sentence, "choice-hypotheses": hypotheses("e_choice")}
