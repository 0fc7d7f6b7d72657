"""Documentation that is installed on this machine: docstrings, Markdown, reStructuredText, package descriptions.

Which split a text belongs to follows from the name of its file alone, so that copies of one file in several packages
(vendored ones) never stand on both sides.
"""

import ast
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

__all__ = ["CHUNK_BYTES", "SPLITS", "harvest", "split_of", "versions"]

#: Longest text in bytes; short enough to stay below 512 tokens of every tokenizer here.
CHUNK_BYTES = 1000
#: Shortest text in bytes.
LEAST_BYTES = 200
#: Split -> share of the files.
SPLITS = {"heldout": 0.08, "common": 0.25, "pretrain": 0.67}
#: What comes with the package and its hosts anyway: no text changes when something else is installed.
PACKAGES = (
    "accelerate aiohttp anyio axolotl click datasets fsspec httpx huggingface_hub jinja2 joblib matplotlib mergekit "
    "mpmath networkx numba numpy packaging pandas peft PIL pluggy pyarrow pydantic pygments requests rich scipy "
    "setuptools sklearn sympy torch tqdm transformers trl typer urllib3 werkzeug"
).split()
#: At most this many files of one package and chunks of one file: no package rules the data.
FILES_PER_PACKAGE = 120
CHUNKS_PER_FILE = 12
FILE_BYTES = 80_000
FOLDERS_PASSED_OVER = {
    *("test", "tests", "testing", "site-packages", "_vendor", "idlelib", "lib2to3", "licenses", "__pycache__")
}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def split_of(path: Path) -> str:
    """The split of a file, by its name (and for a package's METADATA by the package)."""
    name = path.parent.name if path.name == "METADATA" else path.name
    if name in {"__init__.py", "README.md"}:
        name = f"{path.parent.name}/{name}"
    place = int.from_bytes(_digest(name)[:4], "big") / 2**32
    for split, share in SPLITS.items():
        if place < share:
            return split
        place -= share
    return split


def _docstrings(source: str) -> list[str]:
    """Return the docstrings of Python source.

    Raises:
        SyntaxError: the source is no Python of this version.
    """
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _chunks(text: str) -> list[str]:
    """Cut at blank lines, then pack the paragraphs into texts of ``LEAST_BYTES`` to ``CHUNK_BYTES``; longer ones go."""
    packed, current = [], ""
    for part in text.split("\n\n"):
        part = part.strip("\n").rstrip()
        joined = f"{current}\n\n{part}" if current else part
        if len(joined.encode()) <= CHUNK_BYTES:
            current = joined
            continue
        packed.append(current)
        current = part if len(part.encode()) <= CHUNK_BYTES else ""
    packed.append(current)
    return [chunk for chunk in packed if len(chunk.encode()) >= LEAST_BYTES]


def _texts_of(path: Path) -> list[str]:
    """Return the texts of one file; none where it cannot be read or parsed."""
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix != ".py":
            return _chunks(content.partition("\n\n")[2] if path.name == "METADATA" else content)
        docstrings = _docstrings(content)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return []
    return [chunk for text in docstrings for chunk in _chunks(text)]


def _below(folder: Path) -> Iterator[Path]:
    """Sources and documents below ``folder``."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in FOLDERS_PASSED_OVER]
        for name in names:
            if (name.endswith((".py", ".md", ".rst")) or name == "METADATA") and not name.startswith("test_"):
                yield Path(place, name)


def _files() -> Iterator[Path]:
    """Sources and documents, a bounded number of each package, in an order that the names decide."""
    library, packages = (Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib"))
    groups = {"python": list(_below(library))}
    for name in PACKAGES:
        folders = [packages / name, *packages.glob(f"{name}-*.dist-info")]
        groups[name] = [path for folder in folders for path in _below(folder)]
    chosen = []
    for name, files in groups.items():
        ranked = sorted((_digest(f"{name}/{path.parent.name}/{path.name}"), path) for path in files)
        # The standard library counts as ten packages.
        chosen += ranked[: FILES_PER_PACKAGE * (10 if name == "python" else 1)]
    yield from (path for _, path in sorted(chosen))


def versions() -> dict[str, str]:
    """Package -> installed version, of all that the texts come from."""
    found = {d.name.lower().replace("-", "_"): d.version for d in distributions()}
    names = {"sklearn": "scikit_learn", "PIL": "pillow"}
    return {"python": sys.version, **{name: found[names.get(name, name)] for name in PACKAGES}}


def harvest(budgets: dict[str, int]) -> dict[str, list[str]]:
    """Collect texts until every split has its bytes, or the files end.

    Args:
        budgets: split -> bytes wanted.

    Returns:
        split -> distinct texts.
    """
    texts: dict[str, list[str]] = {split: [] for split in budgets}
    left = dict(budgets)
    seen: set[bytes] = set()
    for path in _files():
        split = split_of(path)
        if left.get(split, 0) <= 0 or path.stat().st_size > FILE_BYTES:
            continue
        for chunk in _texts_of(path)[:CHUNKS_PER_FILE]:
            key = _digest("".join(chunk.split()))
            if left[split] > 0 and key not in seen:
                seen.add(key)
                texts[split].append(chunk)
                left[split] -= len(chunk.encode())
        if all(amount <= 0 for amount in left.values()):
            break
    return texts
