"""The page of configuration keys: one line a key, every legal value in it. A key without a meaning ends the build."""

import re

from fusion_plugins.keys import Key, Section, sections

__all__ = ["config_page"]


def config_page() -> str:
    """Return the Markdown of the page.

    Raises:
        LookupError: a table of this module names a field that does not exist.
    """
    lines = ["# Configuration keys", "", INTRODUCTION, ""]
    for section in sections():
        lines += [f"## {section.title}", "", section.about, "", '<div class="keys" markdown>', ""]
        lines += ["| key | legal values | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [_line(section, key) for key in section.keys]
        lines += ["", "</div>", ""]
    return "\n".join(lines)


INTRODUCTION = """Every key of every file that this package reads, with its legal values; `fusion keys` prints the same.
The page is generated from the code that checks the files. A key that is not listed here is an error, and the message
names it. `required` in the column *default* means that there is none. `[]` in the name of a key stands for every entry
of a list."""


def _line(section: Section, key: Key) -> str:
    if not key.meaning:
        raise LookupError(
            f"{section.title}: {key.path}: expected a description or a line of a docstring, found neither"
        )
    # Two brackets in a row would be a link.
    meaning = re.sub(r"(?<!\.)\.$", "", key.meaning).replace("][", "]\\[")
    anchor = re.sub(r"[^a-z0-9]+", "-", f"{section.title.partition(':')[0]}-{key.path}".lower()).strip("-")
    cells = (f"`{key.path}`{{ #{anchor} }}", key.values, key.default, meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
