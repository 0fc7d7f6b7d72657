"""The page of a whole run: its steps, and the part of every folder that they have written."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion_plugins.chain.records import Record, Records
from fusion_plugins.chain.rounds import CHAIN_FILE, HELD_OUT
from fusion_plugins.chain.settings import Chain, Step, load_chain
from fusion_plugins.config import parse_yaml
from fusion_plugins.errors import FusionError
from fusion_plugins.page import render_part
from fusion_plugins.progress import duration
from fusion_plugins.redaction import without_secret_words, without_secrets
from fusion_plugins.reports.answers import examined_blocks, response_blocks, scored_blocks
from fusion_plugins.reports.blocks import Block, Listing, Part, Section, Table, Text, cut
from fusion_plugins.reports.held_out import (
    ROUNDS_FILE,
    cost_blocks,
    printed_blocks,
    printed_numbers,
    read_costs,
    round_blocks,
)
from fusion_plugins.reports.kinds import Kind, inside, kind_of
from fusion_plugins.reports.stores import captured
from fusion_plugins.reports.trainings import as_yaml, training_sections

#: bytes of a configuration that a page repeats, and configurations
MOST_CONFIG, MOST_CONFIGS = 64 << 10, 60
#: example texts of all trainings of a run together
MOST_EXAMPLES = 12
#: verdicts of each folder of scored responses
MOST_VERDICTS = 6
DONE, STOPPED, WAITING, GONE = (
    "done",
    "started, has not ended well",
    "has not run",
    "done, but what it wrote is missing",
)


@dataclass(frozen=True)
class Options:
    """What decides the size of a page.

    Attributes:
        examples: example texts of each training.
        losses: whether models are run; see :func:`fusion_plugins.reports.losses.losses_of`.
        verdicts: of scored responses; None for the page's own number.
        seed: of their draw.
    """

    examples: int = 4
    losses: bool | None = None
    verdicts: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Output:
    """One folder that a step has written.

    Attributes:
        name: the step, and the folder below what it writes, if any.
        path: the folder.
        kind: what it is.
    """

    name: str
    path: Path
    kind: Kind


@dataclass
class Found:
    """What a run has come to.

    Attributes:
        chain: its steps.
        states: step -> state, and its record if it was started.
        outputs: folders with a part of the page.
        problems: what cannot be read, in the order of the steps.
    """

    chain: Chain
    states: Mapping[str, tuple[str, Record | None]]
    outputs: list[Output] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_run(path: Path) -> Found:
    """Read the steps of a run, and find what they have written.

    Args:
        path: the folder with ``fusion.yml``, or the file itself.

    Raises:
        ConfigError: something in the file is wrong.
    """
    chain = load_chain(path / CHAIN_FILE if path.is_dir() else path)
    found = Found(chain, {})
    records, states = Records(chain), {}
    for name, step in chain.steps.items():
        try:
            record = records.load(name)
        except FusionError as error:
            record = None
            found.problems.append(str(error))
        states[name] = _state(chain, step, record), record
        for place in map(Path, chain.writes(step)):
            try:
                found.outputs += _outputs(name, place)
            except FusionError as error:
                found.problems.append(str(error))
    return Found(chain, states, found.outputs, found.problems)


def _state(chain: Chain, step: Step, record: Record | None) -> str:
    if record is None:
        return WAITING
    if not record.done:
        return STOPPED
    return DONE if all(Path(place).exists() for place in chain.writes(step)) else GONE


def _outputs(name: str, place: Path) -> Iterator[Output]:
    kind = kind_of(place) if place.is_dir() else None
    if kind is not None:
        yield Output(name, place, kind)
        return
    for inner, kind in inside(place):
        yield Output(f"{name}, {inner.name}", inner, kind)


def run_sections(found: Found, options: Options) -> list[Section]:
    """Return the sections about a run; what is missing or damaged is said in its place."""
    by_kind = {kind: [each for each in found.outputs if each.kind is kind] for kind in Kind}
    held_out = [each for each in by_kind[Kind.STORE] if each.path.name == HELD_OUT]
    stores = [each for each in by_kind[Kind.STORE] if each not in held_out]
    trained = by_kind[Kind.TRAINED]
    share = max(1, min(options.examples, MOST_EXAMPLES // max(1, len(trained)))) if options.examples else 0

    def training(folder: Path) -> list[Section]:
        return training_sections(folder, examples=share, losses=options.losses)

    def scored(folder: Path) -> list[Block]:
        return scored_blocks(
            folder, seed=options.seed, verdicts=MOST_VERDICTS if options.verdicts is None else options.verdicts
        )

    return [
        Section("Steps", step_blocks(found)),
        *([Section("What was captured", captured(_names(stores), found.chain.folder))] if stores else []),
        *_each(by_kind[Kind.EXAMINED], "Fusion doctor", examined_blocks),
        *_each(by_kind[Kind.RESPONSES], "Responses", response_blocks),
        *_each(by_kind[Kind.SCORED], "Scored responses", scored),
        *(Section(f"Training: {each.name}", *_training(each.path, training)) for each in trained),
        *_each(by_kind[Kind.MERGED], "Merge", merge_blocks),
        *_measured(found, held_out),
        Section("Versions and configurations", list(_configs(found.chain))),
    ]


def _training(folder: Path, read: Callable[[Path], list[Section]]) -> tuple[list[Block], list[Section]]:
    try:
        parts = read(folder)
    except FusionError as error:
        return [_unreadable(folder, error)], []
    # Two levels are enough for a page: the texts of an example go under its own heading.
    flat = [part for section in parts for part in (Section(section.title, section.blocks), *section.parts)]
    return [], flat


def _each(outputs: list[Output], title: str, read: Callable[[Path], list[Block]]) -> Iterator[Section]:
    for each in outputs:
        yield Section(f"{title}: {each.name}", _tried(each.path, read))


def _tried(folder: Path, read: Callable[[Path], list[Block]]) -> list[Block]:
    try:
        return read(folder)
    except FusionError as error:
        return [_unreadable(folder, error)]


def _unreadable(folder: Path, error: FusionError) -> Text:
    return Text(f"{folder} cannot be shown: {cut(str(error), 500)}", "poor")


def _names(stores: list[Output]) -> list[tuple[str, Path]]:
    """Return name and folder of stores: the name of the folder, or of the step where two have the same."""
    folders = [each.path.name for each in stores]
    return [(each.path.name if folders.count(each.path.name) == 1 else each.name, each.path) for each in stores]


def merge_blocks(folder: Path) -> list[Block]:
    """Return what a whole page says of a merged model, for a page about more.

    Raises:
        DataError: as :func:`fusion_plugins.mergekit.record.read_record`.
    """
    from fusion_plugins.mergekit.report import merge_values

    return [Part(render_part("parts/merge.html", merge_values(folder, level=3)))]


def _measured(found: Found, held_out: list[Output]) -> Iterator[Section]:
    chain = found.chain
    files = {name: Path(chain.place(step.stdout)) for name, step in chain.steps.items() if step.stdout}
    printed = {name: numbers for name, place in files.items() if (numbers := printed_numbers(place))}
    blocks: list[Block] = []
    costs = []
    for each in held_out:
        try:
            costs.append(read_costs(each.name, each.path))
        except FusionError as error:
            blocks.append(_unreadable(each.path, error))
    blocks += cost_blocks(costs) if costs else []
    blocks += _tried(chain.home / ROUNDS_FILE, round_blocks)
    blocks += printed_blocks(printed) if printed else []
    nothing = Text("No step of this run has measured its models on held-out texts.")
    yield Section("Held-out measures", blocks or [nothing])


def step_blocks(found: Found) -> list[Block]:
    """Return the table of the steps, and what is missing."""
    done = sum(state == DONE for state, _ in found.states.values())
    rows = [
        [name, state, duration(record.seconds) if record and record.done else "–", _command(found.chain.steps[name])]
        for name, (state, record) in found.states.items()
    ]
    unfinished = [name for name, (state, _) in found.states.items() if state != DONE]
    blocks: list[Block] = [Text(f"{done} of {len(rows)} steps are done.", "good" if not unfinished else "fair")]
    if unfinished:
        blocks.append(
            Text(f"Not done: {cut(', '.join(unfinished), 500)}. What they write is not on this page, or not whole.")
        )
    blocks.append(Table("Steps", ("step", "state", "time", "command"), rows, words=4))
    return [*blocks, *(Text(cut(problem, 500), "poor") for problem in found.problems)]


def _command(step: Step) -> str:
    return cut(" ".join(without_secret_words(step.words)), 300)


def _configs(chain: Chain) -> Iterator[Block]:
    """Yield the files of settings that the steps name."""
    yield Listing(
        chain.path.name, as_yaml(chain.settings.model_dump(exclude_defaults=True, mode="json") | _commands(chain))
    )
    places = dict.fromkeys(place for step in chain.steps.values() for place in chain.reads(step))
    files = [Path(place) for place in places if place.endswith((".yml", ".yaml")) and Path(place).is_file()]
    for path in files[:MOST_CONFIGS]:
        yield _config(path, chain.folder)
    if len(files) > MOST_CONFIGS:
        yield Text(f"{len(files) - MOST_CONFIGS} more files of settings are not shown.")


def _commands(chain: Chain) -> dict[str, Any]:
    steps = [step.model_dump(exclude_defaults=True) for step in chain.settings.steps]
    return {
        "steps": [each | {"command": _command(step)} for each, step in zip(steps, chain.steps.values(), strict=True)]
    }


def _config(path: Path, base: Path) -> Block:
    name = str(path.relative_to(base)) if path.is_relative_to(base) else str(path)
    if path.stat().st_size > MOST_CONFIG:
        return Text(f"{name} is larger than {MOST_CONFIG >> 10} KiB and is not shown.")
    try:
        return Listing(name, as_yaml(without_secrets(parse_yaml(path.read_text(encoding="utf-8")))))
    except (FusionError, OSError, ValueError) as error:
        return Text(f"{name} cannot be shown: {cut(str(error), 300)}", "fair")
