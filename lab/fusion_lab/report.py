"""Tables, plots and ``docs/evidence.md`` from the CSV files of ``results/``; nothing of them is typed by hand.

Each module of ``sections`` has a function ``make(results, images)`` that returns text by marker. A marker is a pair of
comments in the page, ``<!-- lab:NAME -->`` and ``<!-- /lab -->``; what is between them is replaced.
"""

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import yaml

from fusion_lab import ROOT
from fusion_lab.runner import QUESTIONS, RESULTS
from fusion_lab.statistics import Mean

__all__ = ["NOT_RUN", "SECTIONS", "figure", "fill", "forest", "hypotheses", "markdown", "read", "save", "write_page"]

PAGE = ROOT / "docs" / "evidence.md"
IMAGES = ROOT / "docs" / "images"
SECTIONS = ("world", "fusellm", "settings", "real", "cliff", "choice", "merges", "preferences", "rounds")
#: what stands where a question has no results yet
NOT_RUN = "Declared, not run yet.\n"
_MARKED = re.compile(r"(<!-- lab:([\w-]+) -->\n).*?(<!-- /lab -->)", re.DOTALL)


def read(results: Path, name: str) -> pandas.DataFrame | None:
    """Return a table of results; None where there is none yet."""
    path = results / f"{name}.csv"
    return pandas.read_csv(path, keep_default_na=True) if path.exists() else None


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; the columns after the first are aligned to the right."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *(list(map(str, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def hypotheses(name: str) -> str:
    """Return the hypotheses of a question as a list, as its file has them."""
    values = yaml.safe_load((QUESTIONS / f"{name}.yml").read_text(encoding="utf-8"))
    return "".join(f"- {' '.join(text.split())}\n" for text in values["hypotheses"])


@cache
def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "fusion", "font.size": 9, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "figure.constrained_layout.use": True})
    from matplotlib import pyplot

    return pyplot


def figure(columns: int = 1, width: float = 7.0, height: float = 2.8, **options: Any) -> tuple[Any, Any]:
    """Return a new figure and its axes in one row."""
    return _pyplot().subplots(1, columns, figsize=(width, height), **options)


def forest(axes: Any, found: Sequence[tuple[str, Mean]], factor: float = 1.0) -> None:
    """Draw one named mean per line, times a factor, each with its interval where there is one."""
    places = range(len(found), 0, -1)
    halves = [0 if np.isnan(value.half) else factor * value.half for _, value in found]
    axes.errorbar([factor * value.value for _, value in found], places, xerr=halves, fmt="o", capsize=2)
    axes.set_yticks(list(places), [name for name, _ in found])


def save(picture: Any, path: Path) -> None:
    """Write a figure as SVG, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, metadata={"Date": None})
    _pyplot().close(picture)
    # matplotlib leaves spaces at the ends of lines.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n", encoding="utf-8")


def fill(page: str, texts: dict[str, str]) -> str:
    """Replace what is between the markers of a page; a marker without a text keeps what it has."""

    def text(found: re.Match[str]) -> str:
        new = texts.get(found[2])
        return found[0] if new is None else f"{found[1]}{new.rstrip()}\n{found[3]}"

    return _MARKED.sub(text, page)


def write_page(results: Path = RESULTS, page: Path = PAGE, images: Path = IMAGES) -> list[str]:
    """Make everything anew; return the markers that were filled."""
    texts: dict[str, str] = {}
    for name in SECTIONS:
        make: Callable[[Path, Path], dict[str, str]] = importlib.import_module(f"fusion_lab.sections.{name}").make
        texts |= make(results, images)
    page.write_text(fill(page.read_text(encoding="utf-8"), texts), encoding="utf-8")
    return sorted(texts)
