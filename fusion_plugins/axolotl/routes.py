"""Which source teaches which row: the conditions of ``fusion.sources``, what the stores lack, and own answers.

Everything is decided here, before anything is fused, for all rows of a dataset at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from axolotl.utils.logging import get_logger

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.fusion_losses import cuts_chunks, problem_of_rule
from fusion_plugins.axolotl.preference_rows import Unusable
from fusion_plugins.axolotl.source_args import FusedSourceArgs
from fusion_plugins.core.arrays import BoolArray
from fusion_plugins.core.fusion.routing import Route
from fusion_plugins.errors import ConfigError, MismatchError
from fusion_plugins.model_names import is_same_model
from fusion_plugins.plugins import lookup
from fusion_plugins.store import Store
from fusion_plugins.where import columns_of, require_columns, selected, value_of

LOG = get_logger(__name__)
Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Table:
    """The rows of a dataset, as far as routes depend on them.

    Attributes:
        path: of the dataset, for messages.
        ids: N ids of the texts.
        names: what the rows are called in messages.
        columns: name -> N values, of the columns that conditions name, and of those that say whose an answer is.
        answers: the rows are responses.
        all_columns: names of all columns of the dataset, for messages; those of ``columns`` where it is empty.
    """

    path: str
    ids: Sequence[str]
    names: Sequence[str]
    columns: Columns
    answers: bool = False
    all_columns: Sequence[str] = ()


@dataclass(frozen=True)
class Routes:
    """The routes of the rows of a dataset.

    Attributes:
        distinct: the routes.
        numbers: (N,) number of each row's route; -1 for a row that is left out.
        missing: rows that are left out because a store lacks them.
        untaught: rows that are left out because no source takes part in them.
        texts: domain -> source, or that there is none -> rows.
        without: source -> rows that are used, that it would teach and that its store lacks.
    """

    distinct: list[Route]
    numbers: np.ndarray
    missing: list[Unusable] = field(default_factory=list)
    untaught: list[Unusable] = field(default_factory=list)
    texts: dict[str, dict[str, int]] = field(default_factory=dict)
    without: dict[str, int] = field(default_factory=dict)


def columns_needed(block: FusionBlock, names: Sequence[str]) -> list[str]:
    """Return which of a dataset's columns routes depend on."""
    wanted = {"domain", "source", "model", "is_target"}
    wanted.update(*(columns_of(source.conditions) for source in block.sources))
    return [name for name in names if name in wanted]


def make_routes(table: Table, block: FusionBlock, stores: Sequence[Store], base_model: str) -> Routes:
    """Decide which sources teach each row.

    Raises:
        ConfigError: a condition names a column that the rows lack; a rule would choose by cross-entropy on the
            target's own answers, or cannot fuse chunks; or no source of some texts has a weight.
        MismatchError: a store lacks a row that its source is to teach (with ``on_missing_text: raise``), or no source
            takes part in a row (with ``on_no_source: raise``).
    """
    domains = _domains(table)
    part = _meant(table, block)
    _warn_of_unknown_domains(block, domains, table.path)
    kept = np.ones(len(table.ids), np.bool_)
    missing: dict[int, str] = {}
    lacking: dict[str, BoolArray] = {}
    for number, store in enumerate(stores):
        absent = np.array([id not in store for id in table.ids], np.bool_) & part[number]
        if not absent.any():
            continue
        if block.on_missing_text == "skip_source":
            part[number] &= ~absent
            lacking[block.sources[number].name] = absent
        else:
            kept &= ~absent
            for place in np.flatnonzero(absent).tolist():
                missing.setdefault(place, f"missing in the store {store.path}")
        nothing_left = not (part[number] & kept).any()
        if block.on_missing_text == "raise" or nothing_left:
            meant = int((part[number] | absent).sum())
            _refuse_missing(table, store, np.flatnonzero(absent), meant, block.sources[number].name)
    bare = kept & ~part.any(axis=0)
    untaught = _untaught(table, block, domains, np.flatnonzero(bare))
    if untaught:
        kept &= ~bare
    without = {name: int((absent & kept).sum()) for name, absent in lacking.items()}
    routes: dict[Route, int] = {}
    numbers = np.full(len(table.ids), -1, np.int64)
    for place in np.flatnonzero(kept).tolist():
        route = Route(tuple(np.flatnonzero(part[:, place]).tolist()), domains[place])
        numbers[place] = routes.setdefault(route, len(routes))
    distinct = list(routes)
    _refuse_rules(table, block, distinct)
    _refuse_own_answers(table, block, distinct, numbers, base_model)
    left_out = [Unusable(table.names[place], missing[place]) for place in sorted(missing)]
    return Routes(distinct, numbers, left_out, untaught, _texts(block, distinct, numbers), without)


def _domains(table: Table) -> list[str]:
    if "domain" not in table.columns:
        return [""] * len(table.ids)
    return [str(value_of("domain", {"domain": value})) for value in table.columns["domain"]]


def _meant(table: Table, block: FusionBlock) -> BoolArray:
    """Return (S, N), which source is meant for which row."""
    part = np.ones((len(block.sources), len(table.ids)), np.bool_)
    for number, source in enumerate(block.sources):
        if not source.conditions:
            continue
        try:
            require_columns(source.conditions, table.all_columns or table.columns, table.path)
        except ConfigError as error:
            raise ConfigError(f"fusion.sources, source {source.name!r}: {error}") from error
        part[number] = selected(source.conditions, table.columns, len(table.ids), table.names.__getitem__)
        if not part[number].any():
            LOG.warning(f"fusion: source {source.name!r} takes part in no row of {table.path}: {source.conditions}")
    return part


def _warn_of_unknown_domains(block: FusionBlock, domains: Sequence[str], path: str) -> None:
    found = set(domains)
    named = {f"rule_by_domain.{domain}": domain for domain in block.rule_by_domain}
    for source in block.sources:
        named |= {f"weight_by_domain.{domain} of {source.name!r}": domain for domain in source.weight_by_domain}
        named |= {f"domains of {source.name!r}": domain for domain in source.domains or () if domain not in found}
    for key, domain in named.items():
        if domain not in found:
            LOG.warning(f"fusion: {key}: no row of {path} has the domain {domain!r}, only {', '.join(sorted(found))}")


def _refuse_missing(table: Table, store: Store, absent: np.ndarray, meant: int, source: str) -> None:
    complete = f"complete: {store.manifest.complete}"
    example = next(iter(store.ids()), None)
    if len(absent) == meant:
        cure = (
            f"Capture it from the texts that you train on, with the same ids (the store has ids such as {example!r}; a "
            f"row without a column id has the sha256 of its content), or say with domains or where which rows "
            f"{source!r} teaches; see fusion.on_no_source for the others."
        )
    else:
        cure = (
            "Capture it from the texts that you train on, or set fusion.on_missing_text: skip, or skip_source to train "
            "on these rows without this source."
        )
    raise MismatchError(
        f"expected every row of {table.path} in the store {store.path} that its source is to teach; {len(absent)} of "
        f"{meant} are missing, the first of them {table.ids[absent[0]]!r}. The store ({len(store)} texts) was captured "
        f"from other texts, or not to the end ({complete}). {cure}"
    )


def _untaught(table: Table, block: FusionBlock, domains: Sequence[str], bare: np.ndarray) -> list[Unusable]:
    """Return the rows without a source that are left out."""
    if not bare.size:
        return []
    if block.on_no_source == "raise":
        place = int(bare[0])
        raise MismatchError(
            f"{len(bare)} of {len(table.ids)} rows of {table.path} have no source that takes part in them. The first: "
            f"{table.names[place]}, domain {domains[place]!r}. Name their domain in one of fusion.sources, or set "
            "fusion.on_no_source: skip (leave them out) or lm_loss (train on them without fusion)."
        )
    if len(bare) == len(table.ids):
        raise MismatchError(
            f"no source takes part in any row of {table.path}. Correct domains and where of the sources."
        )
    what = "are left out" if block.on_no_source == "skip" else "have the language-model loss alone"
    LOG.warning(f"fusion: no source takes part in {len(bare)} of {len(table.ids)} rows of {table.path}; they {what}")
    if block.on_no_source == "lm_loss":
        return []
    return [Unusable(table.names[place], "no source takes part in it") for place in bare.tolist()]


def _texts(block: FusionBlock, distinct: Sequence[Route], numbers: np.ndarray) -> dict[str, dict[str, int]]:
    counts = np.bincount(numbers[numbers >= 0], minlength=len(distinct))
    found: dict[str, dict[str, int]] = {}
    for route, count in zip(distinct, counts.tolist(), strict=True):
        own = found.setdefault(route.domain, {})
        for name in [source.name for source in _teachers(block, route)] or ["(no source)"]:
            own[name] = own.get(name, 0) + count
    return found


def _refuse_rules(table: Table, block: FusionBlock, distinct: Sequence[Route]) -> None:
    """Refuse what would fail at the first text of a route, perhaps hours later."""
    for route in distinct:
        if not route.sources:
            continue
        rule, sources = _rule(block, route), [block.sources[number] for number in route.sources]
        what = f"{', '.join(source.name for source in sources)} in texts of {table.path}"
        what += f" of the domain {route.domain!r}" if route.domain else ""
        if len(sources) > 1 and cuts_chunks(block) and (problem := problem_of_rule(rule, block.loss)):
            raise ConfigError(f"fusion.rule: {problem}. The sources are {what}.")
        if not _teachers(block, route):
            raise ConfigError(
                f"fusion.sources: expected a weight above 0 of {what}, which no other source teaches, got 0. Give one "
                "of them a weight, or leave the domain out of its domains or where, and see fusion.on_no_source."
            )


def _teachers(block: FusionBlock, route: Route) -> list[FusedSourceArgs]:
    """Return a route's sources, without those to which the configuration gives no weight in its domain."""
    sources = [block.sources[number] for number in route.sources]
    rule = lookup("fusion_rules", _rule(block, route)) if sources else None
    if block.weights_from is not None or not getattr(rule, "weighted", False):
        return sources
    return [source for source in sources if source.weight_by_domain.get(route.domain, source.weight)]


def _rule(block: FusionBlock, route: Route) -> str:
    own = block.rule_by_domain.get(route.domain)
    return block.rule if own is None else own.rule


def _refuse_own_answers(
    table: Table, block: FusionBlock, distinct: Sequence[Route], numbers: np.ndarray, base_model: str
) -> None:
    """Refuse to let the sources' cross-entropies decide who teaches the target's own answers."""
    if not table.answers:
        return
    own = _own_answers(table, block, base_model)
    if block.own_source is not None and not own.any():
        LOG.warning(f"fusion: no answer in {table.path} is of fusion.own_source {block.own_source!r}")
    for number, route in enumerate(distinct):
        places = np.flatnonzero(own & (numbers == number))
        rule = _rule(block, route)
        if places.size and len(route.sources) > 1 and getattr(lookup("fusion_rules", rule), "by_cross_entropy", False):
            raise ConfigError(
                f"fusion.rule: {rule} cannot choose between sources on the target's own answers, and {len(places)} "
                f"rows of {table.path} are such (the first: {table.names[int(places[0])]}): the source that finds such "
                "an answer most likely is the one that shares the target's mistakes. Give each domain one source "
                "(domains in fusion.sources), or set rule: fixed_weights with a weight for each source or with "
                "weights_from: SCORED_RESPONSES, which weighs them by how often they are right."
            )


def _own_answers(table: Table, block: FusionBlock, base_model: str) -> BoolArray:
    """Return (N,) bool, which answers are the target's own."""
    names = {source.name for source in block.sources if source.is_target} | {block.own_source} - {None}
    own = np.zeros(len(table.ids), np.bool_)
    if "source" in table.columns:
        own |= np.array([source in names for source in table.columns["source"]], np.bool_)
    if "model" in table.columns:
        same = {model: is_same_model(model, base_model) for model in set(table.columns["model"])}
        own |= np.array([same[model] for model in table.columns["model"]], np.bool_)
    if "is_target" in table.columns:
        own |= np.array([value is True for value in table.columns["is_target"]], np.bool_)
    return own
