"""Work divided over machines: part i of n of a set of texts or prompts, by their ids alone.

So the parts do not depend on the order of the rows, on the batches, or on which other rows there are; a part that is
captured with other batches has the same texts. Every part goes into a folder of its own, which says which part it is,
and ``fusion store merge`` joins them. It marks the joined folder as complete only if no part is missing.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator

from fusion_plugins.errors import MismatchError
from fusion_plugins.store.manifest import MANIFEST_NAME, PART, load_manifest
from fusion_plugins.texts import Prompt, Text

_FORM = re.compile(r"([0-9]+)/([0-9]+)")
Item = TypeVar("Item", Text, Prompt)


def _checked(value: str) -> str:
    found = _FORM.fullmatch(value.strip())
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError("expected i/n with i from 1 to n, such as 2/3")
    return f"{int(found[1])}/{int(found[2])}"


#: the type of a setting ``shard``
Shard = Annotated[str, AfterValidator(_checked)]


def in_part(id: str, part: str) -> bool:
    """Return whether a text or prompt belongs to a part.

    Example:
        >>> [part for part in ("1/3", "2/3", "3/3") if in_part("t0", part)]
        ['1/3']
    """
    index, count = map(int, part.split("/"))
    digest = hashlib.sha256(id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % count == index - 1


def chosen(items: Iterable[Item], limit: int | None, part: str | None) -> Iterator[Item]:
    """Yield the first ``limit`` items that belong to a part; the limit counts those of all parts.

    Args:
        items: texts or prompts.
        limit: None for all.
        part: ``i/n``; None for all.
    """
    for item in islice(items, limit):
        if part is None or in_part(item.text.id if isinstance(item, Prompt) else item.id, part):
            yield item


def require_part(folder: Path, part: str | None) -> None:
    """Refuse to add one part to the folder of another.

    Raises:
        MismatchError: the folder holds another part, or everything.
    """
    if not (folder / MANIFEST_NAME).exists():
        return
    found = load_manifest(folder).provenance.get(PART)
    if found != part:
        names = [f"part {name} of the texts" if name else "all texts, undivided" for name in (found, part)]
        raise MismatchError(
            f"{folder} does not fit. It was made for {names[0]}, and this run is for {names[1]}. Give every part a "
            "folder of its own and join them: `fusion store merge PART... --out FOLDER`."
        )
