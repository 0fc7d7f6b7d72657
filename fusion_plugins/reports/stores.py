"""The part about stores: what was captured of which source."""

import os
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fusion_plugins.column_names import ColumnNames
from fusion_plugins.config import validate
from fusion_plugins.core.fusion.types import Record
from fusion_plugins.core.text.token_bytes import readable_tokens
from fusion_plugins.errors import FusionError, StoreError
from fusion_plugins.hub import is_hub
from fusion_plugins.inputs import Selection, open_texts
from fusion_plugins.reports.blocks import Block, Section, Table, Text, Tokens, cut, number
from fusion_plugins.store import Store, open_store
from fusion_plugins.store.manifest import Manifest

#: bytes of the texts up to which their domains are counted
MOST_BYTES = 256 << 20
#: folders above a store that relative paths in its notes may begin at
PARENTS = 3
#: example texts of one store, and tokens of each
EXAMPLES, EXAMPLE_TOKENS = 3, 160
#: loss of a token in nats up to which it has a class; the last class has the rest
LOSSES = (0.5, 1.5, 3.0, 6.0)
HEADS = ("source", "model", "state", "engine", "texts", "tokens", "bytes", "bytes per token", "top k")


def captured(stores: Sequence[tuple[str, Path]], base: Path) -> list[Block]:
    """Return the tables of stores: sizes, and the domains of their texts. A damaged store is named below them.

    Args:
        stores: name and folder.
        base: folder where the paths in their notes begin.
    """
    rows: list[list[str]] = []
    domains: dict[str, Counter[str]] = {}
    notes: list[Text] = []
    for name, folder in stores:
        try:
            store = open_store(folder)
        except StoreError as error:
            notes.append(Text(f"{name} cannot be shown: {error}", "poor"))
            continue
        rows.append(_row(name, store.manifest))
        found = domains_of(store, base)
        if isinstance(found, str):
            notes.append(Text(f"{name}: {found}"))
        else:
            domains[name] = found
    blocks: list[Block] = [Table("Stores", HEADS, rows, words=4)] if rows else []
    if names := sorted({domain for counts in domains.values() for domain in counts}):
        by_domain = [[name or "none", *(number(domains[store][name]) for store in domains)] for name in names]
        blocks.append(Table("Texts by domain and store", ["domain", *domains], by_domain))
    return [*blocks, *notes]


def _row(name: str, manifest: Manifest) -> list[str]:
    per_token = manifest.bytes / manifest.tokens if manifest.tokens else None
    return [
        *(name, manifest.model, "complete" if manifest.complete else "unfinished"),
        f"{manifest.engine} {manifest.engine_version}, {manifest.dtype}",
        *(number(manifest.rows), number(manifest.tokens), number(manifest.bytes), number(per_token)),
        number(manifest.top_k),
    ]


def domains_of(store: Store, base: Path) -> Counter[str] | str:
    """Return how many of a store's texts are of each domain ("" for none), or why that is not known.

    The texts are read one by one, and only those that the store has count.
    """
    named = store.manifest.provenance.get("texts")
    paths = [named] if isinstance(named, str) else named
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        return "domains are not known: the store does not say which texts it was captured from"
    if any(map(is_hub, paths)):
        return "domains are not counted: the texts are on the hub"
    # Notes hold paths as the capture saw them; whose texts these are, the ids tell.
    bases = [base, *store.path.resolve().parents[:PARENTS]]
    found = ([folder / os.path.expanduser(path) for path in paths] for folder in bases)
    places = next((each for each in found if all(place.exists() for place in each)), None)
    if places is None:
        return f"domains are not known: {', '.join(paths)} cannot be found"
    if sum(map(_bytes, places)) > MOST_BYTES:
        return f"domains are not counted: the texts have more than {MOST_BYTES >> 20} MiB"
    try:
        names = validate(ColumnNames, store.manifest.provenance.get("columns") or {}, where="columns")
        texts = open_texts(places, unusable={}, selection=Selection(names=names))
        counts = Counter(text.domain or "" for text in texts if text.id in store)
    except FusionError as error:
        return f"domains are not known: {error}"
    return counts or f"domains are not known: {', '.join(paths)} holds other texts now"


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def sections(folder: Path) -> list[Section]:
    """Return the page's sections about one store.

    Raises:
        StoreError: it is damaged.
    """
    store = open_store(folder)
    manifest = store.manifest
    facts = manifest.identity() | {"engine": f"{manifest.engine} {manifest.engine_version}"}
    facts |= {"logits_width": manifest.logits_width, "made_by": manifest.made_by, "created": manifest.created}
    notes = {name: value for name, value in manifest.provenance.items() if name != "merged"}
    made = [[name, cut(str(value), 300)] for name, value in (facts | notes).items() if value is not None]
    examples = [_example(store, record) for record in islice(store, EXAMPLES)]
    said = (
        f"The first {len(examples)} of {len(store):,} texts, up to {EXAMPLE_TOKENS} tokens of each. The loss of a "
        "token is its negative log-probability under the source, in nats. A dot is a token that "
        "ends within a character."
    )
    return [
        Section("What was captured", captured([(folder.resolve().name, folder)], Path.cwd())),
        Section("Example texts", [Text(said if examples else "The store holds no texts.")], examples),
        Section("Version and configuration", [Table("Configuration", ("setting", "value"), made, words=2)]),
    ]


def _example(store: Store, record: Record) -> Section:
    ids = record.text.input_ids[:EXAMPLE_TOKENS].tolist()
    losses = [None, *(-record.topk.token_logprobs).tolist()][: len(ids)]
    texts = readable_tokens([store.table.bytes_of(id) for id in ids])
    tokens = [(text, loss_class(loss), _said(loss)) for text, loss in zip(texts, losses, strict=True)]
    ends = (f"below {LOSSES[0]:g} nats", *(f"up to {loss:g}" for loss in LOSSES[1:]), f"above {LOSSES[-1]:g}")
    legend = [(f"q{place}" if place else "same", text) for place, text in enumerate(ends)]
    about = f"{len(ids)} of {len(record.text.input_ids):,} tokens; {number(record.ce_per_token)} nats per token"
    title = f"Text {cut(record.id, 60)}"
    return Section(title, [Text(about), Tokens(f"{title}, tokens coloured by their loss", tokens, legend)])


def _said(loss: float | None) -> str:
    return "no loss" if loss is None or loss != loss else f"{loss:.2f} nats"


def loss_class(loss: Any) -> str:
    """Return the class of a token's colour.

    Example:
        >>> [loss_class(loss) for loss in (None, 0.1, 1.0, 7.0)]
        ['', 'same', 'q1', 'q4']
    """
    if loss is None or loss != loss:
        return ""
    place = sum(loss > limit for limit in LOSSES)
    return f"q{place}" if place else "same"
