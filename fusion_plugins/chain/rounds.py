"""``fusion rounds``: the target answers, the sources say how probable they find it, the target learns; again and again.

A round is a handful of the stock commands, each with a configuration of its own that is written into the folder of the
round. The steps of all rounds are one chain, so that they run, resume and fail as those of ``fusion run`` do; the
chain's file can be run by hand.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from fusion_plugins.chain.round_configs import OF_THE_STEP, Rounds, configurations
from fusion_plugins.chain.round_settings import FUSED, PLACE_OF_MODEL, SFT_REPORT
from fusion_plugins.chain.settings import Chain, ChainSettings, Step
from fusion_plugins.column_names import PromptColumns
from fusion_plugins.config import validate
from fusion_plugins.errors import ConfigError
from fusion_plugins.hub import is_hub
from fusion_plugins.inputs import Unusable, open_prompts
from fusion_plugins.sources.sample import say_unread
from fusion_plugins.store.files import make_folder, write_atomic
from fusion_plugins.terminal import say
from fusion_plugins.where import selects

CHAIN_FILE = "fusion.yml"
HELD_OUT = "held_out"
#: prompts that are named as left out
MOST_NAMED = 10


def write_rounds(rounds: Rounds) -> Chain:
    """Write the configurations of all rounds, and the chain that runs them.

    Raises:
        DataError: there are fewer prompts than one round takes.
    """
    for number in range(1, rounds.config.rounds + 1):
        folder = rounds.out / rounds.name(number)
        make_folder(folder)
        for name, content in configurations(rounds, number).items():
            write_atomic(folder / name, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    if rounds.config.prompts_per_round is not None:
        _write_prompts(rounds, rounds.config.prompts_per_round)
    settings = {
        "folder": os.path.relpath(rounds.folder, rounds.out),
        "environments": rounds.config.environments,
        "variables": rounds.config.variables,
        "steps": [step.model_dump(exclude_defaults=True) for step in _steps(rounds)],
    }
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    write_atomic(rounds.out / CHAIN_FILE, f"# Written by `fusion rounds`, which also runs it.\n{text}")
    return Chain(rounds.out / CHAIN_FILE, validate(ChainSettings, settings, where=str(rounds.out / CHAIN_FILE)))


def _steps(rounds: Rounds) -> Iterator[Step]:
    config = rounds.config
    yield from _measuring(rounds, 0)
    for number in range(1, config.rounds + 1):
        name, configs = rounds.name(number), configurations(rounds, number)

        def read(file: str, *keys: str, configs: Mapping[str, Any] = configs) -> list[str]:
            """Paths that a configuration names; a model may be a name of the hub."""
            places = (configs[file][key] for key in keys)
            flat = [place for each in places for place in (each if isinstance(each, list) else [each])]
            return [place for place in flat if Path(config.out) in Path(place).parents or rounds.exists(place)]

        own = rounds.folders_of_checkpoint(number - 1)
        yield Step(
            name=f"{name}-sample",
            command=["fusion", "sample", "--config", rounds.place(number, "sample.yml")],
            reads=[*own, *read("sample.yml", "prompts")],
            writes=[rounds.place(number, "responses")],
            **_of_step(config.sample),
        )
        if config.score is not None:
            yield Step(
                name=f"{name}-score",
                command=["fusion", "score", "--config", rounds.place(number, "score.yml")],
                reads=[rounds.place(number, "responses")],
                writes=[rounds.place(number, "scored")],
                **_of_step(config.score),
            )
        groups = {source["name"]: source for source in config.sources}
        if rounds.captures_target:
            groups[rounds.own_name] = config.target_capture
        captures = [file for file in configs if file.startswith("capture-")]
        for file in captures:
            source = file.removeprefix("capture-").removesuffix(".yml")
            yield Step(
                name=f"{name}-{file.removesuffix('.yml')}",
                command=["fusion", "capture", "--config", rounds.place(number, file)],
                reads=read(file, "texts", "model"),
                writes=[configs[file]["out"]],
                **_of_step(config.capture, groups[source]),
            )
        yield from _trainings(rounds, number, [*own, *(configs[file]["out"] for file in captures)], configs)
        yield from _measuring(rounds, number)


def _trainings(rounds: Rounds, number: int, read: Sequence[str], configs: Mapping[str, Any]) -> Iterator[Step]:
    train = rounds.config.train
    where = _of_step(train.model_dump(exclude_none=True))
    place = rounds.place(number, "train.yml")
    answers = [entry["path"] for entry in configs["train.yml"]["datasets"] if entry.get("type") == FUSED]
    words = Step(name="x", command=train.command).words
    yield Step(
        name=f"{rounds.name(number)}-train",
        command=[*words, place],
        reads=[*read, *answers],
        writes=[rounds.place(number, "model")],
        **where,
    )
    if rounds.train.get("adapter"):
        yield Step(
            name=f"{rounds.name(number)}-merge",
            command=["axolotl", "merge-lora", rounds.place(number, "merge.yml")],
            needs=[f"{rounds.name(number)}-train"],
            writes=[rounds.checkpoint(number)],
            **where,
        )


def _measuring(rounds: Rounds, number: int) -> Iterator[Step]:
    held_out = rounds.config.held_out
    if held_out is None:
        return
    model, place = rounds.checkpoint(number), rounds.place(number, HELD_OUT)
    common = {
        "name": f"{rounds.name(number)}-measure",
        **_of_step(held_out.model_dump(exclude_none=True)),
    }
    read = rounds.folders_of_checkpoint(number)
    if held_out.command is not None:
        words = [word.replace(PLACE_OF_MODEL, model) for word in Step(name="x", command=held_out.command).words]
        yield Step(command=words, reads=[*held_out.reads, *read], stdout=place, on_change="keep", **common)
        return
    texts = str(held_out.texts)
    options = ["--model", model, "--texts", texts, "--out", place, "--top-k", "1"]
    yield Step(
        command=["fusion", "capture", *options],
        reads=[*read, *([] if is_hub(texts) else [texts])],
        writes=[place],
        on_change="move",
        **common,
    )


def _write_prompts(rounds: Rounds, count: int) -> None:
    """Give every round the next prompts of the file; after the last one the first comes again."""
    paths = _listed(rounds.config.sample.get("prompts"))
    unusable: Unusable | None = {} if rounds.config.sample.get("on_unusable") == "skip" else None
    files = [path if is_hub(path) else str(rounds.folder / path) for path in paths]
    keep = rounds.config.sample.get("keep_columns", ())
    names = validate(PromptColumns, rounds.config.sample.get("columns") or {}, where=f"{rounds.path}: sample.columns")
    prompts = open_prompts(files, unusable=unusable, keep=keep, names=names)
    # The step that samples never sees these.
    for name, reason in islice((unusable or {}).items(), MOST_NAMED):
        say(f"left out of all rounds: {name}: {reason}", stderr=True)
    if unusable:
        say(f"{len(unusable):,} prompts cannot be used and are in no round (on_unusable: skip)", stderr=True)
    total = len(prompts)
    if total < count:
        raise ConfigError(
            f"{rounds.path}: expected at least {count} prompts, one round's (prompts_per_round), got {total}"
        )
    say_unread(prompts, paths, names)  # nor these columns
    for number in range(1, rounds.config.rounds + 1):
        first = (number - 1) * count % total
        chosen = [*islice(prompts, first, first + count), *islice(prompts, max(0, first + count - total))]
        rows = []
        for prompt in chosen:
            text = prompt.text
            content = {"text": text.content} if isinstance(text.content, str) else {"messages": text.content}
            extra = {"tools": text.tools, "reference": prompt.reference, "tests": prompt.tests, **prompt.kept}
            # A column that no prompt of this round has a value in is one of the file all the same.
            given = {key: value for key, value in extra.items() if value is not None}
            given = {**dict.fromkeys(keep), **given}
            rows.append({"id": text.id, **content, "domain": prompt.domain, **given})
        _require_something_to_capture(rounds, number, rows, ("domain", *keep))
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        write_atomic(rounds.out / rounds.name(number) / "prompts.jsonl", "".join(f"{line}\n" for line in lines))


def _require_something_to_capture(
    rounds: Rounds, number: int, rows: Sequence[Mapping[str, Any]], known: Sequence[str]
) -> None:
    """Refuse a round of which a source would capture nothing, hours before its capture does."""
    for source in rounds.config.sources:
        given = {**rounds.config.capture, **source}.get("where") or {}
        where = {column: condition for column, condition in given.items() if column in known}
        if not any(selects(where, row) for row in rows):
            raise ConfigError(
                f"{rounds.path}: expected prompts in round {number} of which source {source['name']!r} captures the "
                f"answers (where: {where}), got none. Rounds take prompts in the order of the file: mix it, or set a "
                "larger prompts_per_round."
            )


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def remove_broken_checkpoints(rounds: Rounds) -> None:
    """Remove the checkpoints that a kill left incomplete: axolotl would try to resume from them for ever.

    The trainer writes ``trainer_state.json`` last.
    """
    for checkpoint in rounds.out.glob("*/model/checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)


def consistency(rounds: Rounds) -> str:
    """Say whether the sources are those whose answers the target was tuned on.

    Where they are not, the gradient of distributions that were stored beforehand has a bias that does not go away
    (Lightning OPD, arXiv 2604.13010).
    """
    tuned, given = rounds.config.sft_sources, "sft_sources"
    if tuned is None:
        given = os.path.join(rounds.config.target, SFT_REPORT)
        tuned = _tuned_on(rounds.folder / given)
    if tuned is None:
        return (
            f"whether the sources are those that the target was tuned on is not known: there is no {given}. Where they "
            "are others, stored distributions lead the training astray; name them as sft_sources."
        )
    names = [{source["name"], source["model"], Path(source["model"]).name} for source in rounds.config.sources]
    strange = [
        source["name"] for source, known in zip(rounds.config.sources, names, strict=True) if not known & set(tuned)
    ]
    if strange:
        return (
            f"WARNING: the target was tuned on answers of {', '.join(tuned)} ({given}), not of {', '.join(strange)}: "
            "with other sources than those of the SFT stage, stored distributions keep a bias that further rounds do "
            "not remove. Tune the target on answers of the same sources first, or take those that it was tuned on."
        )
    return f"the sources are among those that the target was tuned on ({given})"


def _tuned_on(path: Path) -> list[str] | None:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    reports = [report] if "by_source" in report else [each for each in report.values() if isinstance(each, Mapping)]
    found = {name for each in reports for name in each.get("by_source", {})}
    return sorted(found) or None


def _of_step(*groups: Mapping[str, Any]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for group in groups:
        joined |= {key: group[key] for key in OF_THE_STEP if group.get(key) is not None}
    return joined
