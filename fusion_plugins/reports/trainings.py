"""The part about a trained model: who taught what, the curves of the training, and what it was trained on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fusion_plugins.errors import DataError
from fusion_plugins.redaction import without_secrets
from fusion_plugins.reports import charts
from fusion_plugins.reports.answers import reasons_of
from fusion_plugins.reports.blocks import Block, Listing, Pictures, Section, Table, Text, cut, number, share
from fusion_plugins.reports.examples import example_sections
from fusion_plugins.reports.kinds import STATE, expected_form, read_json
from fusion_plugins.training_files import FUSED_REPORT, PAIRS_REPORT, SFT_REPORT, TRAINING_RECORD, TRAINING_VERSION

History = Sequence[Mapping[str, Any]]
Report = Mapping[str, Any]

#: rows that a page names as left out
MOST_NAMED = 10
#: chart -> names of its lines, and whether they are shares
CURVES: dict[str, tuple[tuple[str, ...], bool]] = {
    "Losses, nats": (("loss", "lm_loss", "fusion_loss", "router_loss"), False),
    "Losses of the evaluation, nats": (("eval_loss", "eval_lm_loss", "eval_fusion_loss"), False),
    "Coverage and agreement": (("fusion_coverage", "kept_mass", "top1_agreement", "lm_weight"), True),
    "Entropy of the fused distributions, nats": (("fused_entropy",), False),
    "Chunks": (("tokens_per_chunk",), False),
    "Rewards of the preference training": (("rewards/chosen", "rewards/rejected", "rewards/margins"), False),
    "Preferences": (("rewards/accuracies", "eval_rewards/accuracies"), True),
    "Learning rate": (("learning_rate",), False),
}
#: beginning of the names of the figures of one source
SHARE = "share_"
SOURCE_HEADS = (
    *("source", "texts with the lowest CE", "positions", "coverage", "kept mass"),
    *("unaligned", "left out", "low mass", "edited entries", "unmapped entries"),
)


@dataclass(frozen=True)
class Training:
    """What a training has left in its folder.

    Attributes:
        folder: the folder.
        record: content of ``fusion_training.json``; empty without one.
        history: entries of its log.
        ended: whether the training says that it has ended.
        fused, sft, pairs: name of the dataset -> its report.
    """

    folder: Path
    record: Mapping[str, Any]
    history: History
    ended: bool
    fused: Mapping[str, Report]
    sft: Mapping[str, Report]
    pairs: Mapping[str, Report]


def read_training(folder: Path) -> Training:
    """Read the files that a training has left.

    Raises:
        DataError: one of them is damaged, or a later version wrote it.
    """
    record = _object(folder / TRAINING_RECORD)
    if record.get("version", TRAINING_VERSION) != TRAINING_VERSION:
        raise DataError(
            f"{folder / TRAINING_RECORD}: expected version {TRAINING_VERSION}, got {record['version']!r}. Use the "
            "version of fusion-plugins that wrote it."
        )
    history = record.get("log_history") or []
    return Training(
        folder,
        record,
        history or _last_state(folder),
        bool(history),
        _object(folder / FUSED_REPORT),
        _named(_object(folder / SFT_REPORT), "answers"),
        _named(_object(folder / PAIRS_REPORT), "pairs"),
    )


def _object(path: Path) -> Mapping[str, Any]:
    found = read_json(path)
    if found is not None and not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(found).__name__}. Restore the file, or remove it.")
    return found or {}


def _named(found: Mapping[str, Any], known_by: str) -> Mapping[str, Report]:
    """Return reports by name; the report of the only dataset stands alone in its file."""
    return {"": found} if known_by in found else found


def _last_state(folder: Path) -> History:
    """Return the log of the newest checkpoint."""
    states = [folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")]
    found = []
    for path in states:
        try:
            state = read_json(path)
        except DataError:  # a kill left it incomplete
            continue
        if isinstance(state, dict):
            found.append((state.get("global_step") or 0, state.get("log_history") or []))
    return max(found, key=lambda each: each[0])[1] if found else []


def training_sections(folder: Path, *, examples: int, losses: bool | None) -> list[Section]:
    """Return the sections about a trained model.

    Args:
        folder: ``output_dir`` of the training.
        examples: how many example texts.
        losses: whether to compute their losses before and after; None for small models alone.

    Raises:
        DataError: a file that the training left is damaged.
    """
    with expected_form(folder):
        found = read_training(folder)
        return [
            *(_fused_section(name, report) for name, report in found.fused.items()),
            *_composition("Best answers", found.sft, sft_blocks),
            *_composition("Preference pairs", found.pairs, pair_blocks),
            Section("Training curves", curve_blocks(found)),
            *example_sections(found.record, folder, most=examples, losses=losses),
            *_version_section(found.record),
        ]


def _composition(title: str, reports: Mapping[str, Report], blocks_of: Any) -> Iterator[Section]:
    for name, report in reports.items():
        yield Section(f"{title}: {name}" if name else title, blocks_of(report))


def _fused_section(name: str, report: Report) -> Section:
    return Section(f"Who taught what: {cut(name, 80)}", taught_blocks(report))


def taught_blocks(report: Report) -> list[Block]:
    """Return what a fused dataset says of its sources.

    Args:
        report: one entry of ``fusion_report.json``.
    """
    positions, texts = report["positions"], report["texts"]
    fused = share(report["fused_positions"], positions)
    blocks: list[Block] = [
        Text(f"{texts:,} texts, {positions:,} supervised positions, {fused} of them with a fused distribution.")
    ]
    if taught := {domain or "all domains": counts for domain, counts in (report.get("taught") or {}).items()}:
        blocks.append(Pictures([charts.stacked("Positions by the source that teaches them", taught, "domain")]))
    if chunks := report.get("chunks"):
        rows = [[name.replace("_", " "), number(value)] for name, value in chunks.get("shares", {}).items()]
        blocks.append(Table("Chunks", ("figure", "value"), rows))
    if report["sources"]:
        blocks += [
            Table("Sources", SOURCE_HEADS, [_source_row(name, report) for name in report["sources"]]),
            Text(
                "Coverage is the share of the positions at which the source has a distribution, kept mass the mean "
                "probability that is left of it over the target's vocabulary. The other shares are of the positions, "
                "and of the entries."
            ),
        ]
    return [*blocks, *_left_out(report)]


def _source_row(name: str, report: Report) -> list[str]:
    source = report["sources"][name]
    shares = (report.get("shares") or {}).get(name, {})
    positions = source["positions"]
    entries = source["exact"] + source["edited"] + source["unmapped"]
    chosen = (report.get("chosen") or {}).get(name, 0)
    return [
        *(name, f"{chosen:,} ({share(chosen, report['texts'])})", number(positions)),
        *(f"{shares[key]:.1%}" if key in shares else "–" for key in ("coverage", "mass_kept")),
        *(share(source.get(key, 0), positions) for key in ("unaligned", "left_out", "low_mass")),
        *(share(source[key], entries) for key in ("edited", "unmapped")),
    ]


def _left_out(report: Report) -> Iterator[Block]:
    """Yield how many rows were left out, and the first of them."""
    counted = {
        "cannot be used": report.get("unusable"),
        "are missing in a store": report.get("missing_from_stores"),
        "have no source": report.get("without_source"),
        "are longer than sequence_len": report.get("longer_than_sequence_len"),
        "are empty answers": report.get("empty_answers"),
    }
    for what, rows in counted.items():
        count = len(rows) if isinstance(rows, list) else rows
        if count:
            yield Text(f"{count:,} rows {what}.", "fair")
        if isinstance(rows, list) and rows:
            names = [[_row_name(row), _reason(row)] for row in rows[:MOST_NAMED]]
            title = f"The first {len(names)} of the rows that {what}"
            yield Table(title, ("row", "reason"), names, words=2, folded=title)
    for name, count in (report.get("sources_left_out") or {}).items():
        if count:
            yield Text(f"{count:,} rows are taught without {name}, whose store lacks them.", "fair")


def _row_name(row: Any) -> str:
    found = (row.get("row") or row.get("id") or row) if isinstance(row, Mapping) else row
    return cut(str(found), 200)


def _reason(row: Any) -> str:
    return cut(str(row.get("reason") or ""), 300) if isinstance(row, Mapping) else ""


def sft_blocks(report: Report) -> list[Block]:
    """Return what the best answers are made of.

    Args:
        report: ``fusion_sft.json``, or one entry of it.
    """
    by_source = report.get("by_source") or {}
    return [
        Text(f"{report['answers']:,} answers to {report['kept']:,} of {report['prompts']:,} prompts."),
        *_pictures_of({"answers": by_source}, "Answers by source", ""),
        *_selection(report),
    ]


def pair_blocks(report: Report) -> list[Block]:
    """Return what the preference pairs are made of.

    Args:
        report: ``fusion_pairs.json``, or one entry of it.
    """
    pairs = f"{report['pairs']:,} pairs of {report['kept']:,} of {report['prompts']:,} prompts."
    blocks: list[Block] = [Text(pairs)]
    if lengths := report.get("lengths"):
        rows = [
            [key, number(each["count"]), number(float(each["mean"])), number(float(each["median"]))]
            for key, each in lengths.items()
        ]
        heads = ("source, and chosen or rejected", "answers", "mean characters", "median")
        blocks.append(Table("Answers of the pairs", heads, rows))
    if (limits := report.get("limits")) and any(limit is not None for limit in limits):
        blocks.append(Text(f"Window of the reward gap: {number(limits[0])} to {number(limits[1])}."))
    return [*blocks, *_selection(report)]


def _selection(report: Report) -> Iterator[Block]:
    """Yield what was left out on the way from responses to rows, and why."""
    for key in ("dropped_prompts", "dropped_responses", "dropped_pairs"):
        if counts := report.get(key):
            title = key.replace("_", " ").capitalize()
            yield Table(title, ("reason", "count"), reasons_of(counts))
    if split := report.get("split"):
        text = f"Split: {split['sft']:,} prompts for SFT, {split['dpo']:,} for the preference training."
        yield Text(text)
        if split.get("dropped"):
            yield Table("Prompts of neither part", ("reason", "count"), reasons_of(split["dropped"]))
    for warning in report.get("warnings") or ():
        yield Text(str(warning), "fair")
    yield from _left_out(report)


def _pictures_of(bars: Mapping[str, Mapping[str, float]], title: str, first: str) -> Iterator[Block]:
    if any(bars.values()):
        yield Pictures([charts.stacked(title, bars, first)])


def curve_blocks(training: Training) -> list[Block]:
    """Return the curves of a training."""
    if not training.history:
        return [Text("There are no figures yet: the training has not ended, and has written no checkpoint.", "fair")]
    blocks: list[Block] = []
    if not training.ended:
        blocks.append(Text("The training has not ended. These are the figures of its last checkpoint.", "fair"))
    pictures = []
    for title, (names, shares) in _curves(training.history):
        lines = {name: points for name in names if (points := _points(training.history, name))}
        if lines:
            pictures.append(charts.lines(title, lines, "step", shares=shares))
    return [*blocks, Pictures(pictures)] if pictures else [*blocks, Text("The log has no figures of a loss.")]


def _curves(history: History) -> Iterator[tuple[str, tuple[tuple[str, ...], bool]]]:
    yield from CURVES.items()
    names = tuple(dict.fromkeys(name for entry in history for name in entry if name.startswith(SHARE)))
    yield "Share of the positions that each source teaches", (names, True)


def _points(history: History, name: str) -> list[tuple[float, float]]:
    found = ((entry.get("step"), entry.get(name)) for entry in history)
    return [(x, float(y)) for x, y in found if isinstance(x, int | float) and isinstance(y, int | float)]


def _version_section(record: Mapping[str, Any]) -> Iterator[Section]:
    if not record:
        return
    blocks: list[Block] = []
    if versions := record.get("versions"):
        rows = [[str(name), str(found)] for name, found in versions.items()]
        blocks.append(Table("Versions", ("package", "version"), rows, words=2))
    if config := record.get("config"):
        blocks.append(Listing("Configuration of the training, as axolotl understood it", as_yaml(config)))
    yield Section("Version and configuration", blocks)


def as_yaml(values: Any) -> str:
    """Return settings as YAML, without secrets."""
    return str(yaml.safe_dump(without_secrets(values), sort_keys=False, allow_unicode=True, width=100))
