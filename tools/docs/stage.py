"""Lay out what the site is built from: the documents as they are, generated pages, and files that documents link to.

The documents also have to read well as plain files in the repository, so they link to recipes, examples and benchmarks
beside ``docs/``. Here such a link is pointed at the page or the copy that the site has of it, and an example for
doctest, which Markdown would take for quotations, becomes a block of code.
"""

import re
import shutil
from collections.abc import Iterator
from os.path import relpath
from pathlib import Path

__all__ = ["GENERATED", "stage"]

#: document outside of docs/ -> its page
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/demo/README.md": "demo.md",
}
#: folder of YAML files -> title on the page of recipes
RECIPES = {
    "axolotl_configs": "axolotl",
    "mergekit_configs": "mergekit",
    "examples/fusechat3": "Sampling and scoring",
}
RECIPE_PAGE = "reference/recipes.md"
#: pages that documents may link to although no file of docs/ has them
GENERATED = frozenset(
    {"reference/config.md", "reference/cli.md", RECIPE_PAGE}
    | {f"reference/api/{name}.md" for name in ("core", "store", "scoring", "hosts", "package")}
)
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def stage(root: Path, out: Path) -> None:
    """Write everything that the site is built from to ``out``, which is emptied before.

    Args:
        root: the repository.
        out: folder of the staged pages.

    Raises:
        FileNotFoundError: a document links to what does not exist.
    """
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(root / "docs", out)
    for path in sorted((root / "docs").rglob("*.md")):
        _write(root, out, path, str(path.relative_to(root / "docs")))
    for place, page in PAGES.items():
        _write(root, out, root / place, page)
    for page, text in generated_pages(root):
        (out / page).parent.mkdir(parents=True, exist_ok=True)
        (out / page).write_text(text, encoding="utf-8")


def generated_pages(root: Path) -> Iterator[tuple[str, str]]:
    """Yield place and Markdown of every page of :data:`GENERATED`."""
    from api_reference import PAGES as API
    from api_reference import api_page
    from cli_reference import cli_page
    from config_reference import config_page

    yield "reference/config.md", config_page()
    yield "reference/cli.md", cli_page()
    yield RECIPE_PAGE, _recipe_page(root)
    for name in API:
        yield f"reference/api/{name}.md", api_page(name)


def _recipe_page(root: Path) -> str:
    lines = [
        "# Recipes",
        "",
        "The configurations that the package ships. Every one begins with what to prepare and the command.",
    ]
    for folder, title in RECIPES.items():
        lines += ["", f"## {title}", "", f"In `{folder}/`.", ""]
        for path in sorted((root / folder).glob("*.yml")):
            lines += [f"### {path.name}", "", "```yaml", path.read_text(encoding="utf-8").rstrip(), "```", ""]
    return "\n".join(lines)


def _write(root: Path, out: Path, path: Path, page: str) -> None:
    def point(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        return f"{relpath(out / _staged(root, out, path, target), (out / page).parent)}{anchor}"

    text = _LINK.sub(point, path.read_text(encoding="utf-8"))
    (out / page).parent.mkdir(parents=True, exist_ok=True)
    (out / page).write_text(_with_fenced_doctests(text), encoding="utf-8")


def _staged(root: Path, out: Path, path: Path, target: str) -> str:
    """Where the site has what ``target``, a link in ``path``, leads to; a file without a page is copied."""
    place = (path.parent / target).resolve()
    inside = relpath(place, root / "docs")
    if inside in GENERATED or not inside.startswith(".."):
        return inside
    name = relpath(place, root)
    if name in PAGES:
        return PAGES[name]
    if any(name == folder or name.startswith(f"{folder}/") for folder in RECIPES):
        return RECIPE_PAGE
    if not place.is_file():
        raise FileNotFoundError(f"{path}: the link to {target!r} leads to no file, no page and no folder of recipes")
    (out / "files" / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(place, out / "files" / name)
    return f"files/{name}"


def _with_fenced_doctests(text: str) -> str:
    """Put every example that stands by itself between fences."""
    lines, fenced, inside = [], False, False
    for line in text.split("\n"):
        fenced ^= line.startswith("```") and not inside
        if not fenced and not inside and line.startswith(">>> "):
            inside = True
            lines.append("```pycon")
        elif inside and not line.strip():
            inside = False
            lines.append("```")
        lines.append(line)
    return "\n".join([*lines, *(["```"] if inside else [])])
