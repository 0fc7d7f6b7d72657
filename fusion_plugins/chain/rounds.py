"""``fusion rounds``: the target answers, the sources say how probable they find it, the target learns; again and again.

A round is a handful of the stock commands, each with a configuration of its own that is written into the folder of the
round. The steps of all rounds are one chain, so that they run, resume and fail as those of ``fusion run`` do; the
chain's file can be run by hand.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, model_validator

from fusion_plugins.chain.settings import NAME, Chain, ChainSettings, Step
from fusion_plugins.config import Settings, load_config, validate
from fusion_plugins.errors import ConfigError
from fusion_plugins.hub import is_hub
from fusion_plugins.inputs import open_prompts
from fusion_plugins.scoring.score import ScoreConfig
from fusion_plugins.sources.capture import CaptureConfig
from fusion_plugins.sources.sample import SampleConfig, SampledSource
from fusion_plugins.store.files import make_folder, write_atomic

#: dataset type whose path becomes the answers of the round
FUSED = "fusion_plugins.axolotl.fused"
CHAIN_FILE = "fusion.yml"
#: of a training whose configuration has none
SEED = 42
HELD_OUT = "held_out"
#: keys of a group of settings that are of the step, not of the command
OF_THE_STEP = ("env", "variables")
#: what the training report of `fusion_plugins.axolotl.best_of_sources` is called in the folder of a model
SFT_REPORT = "fusion_sft.json"
PLACE_OF_MODEL = "{model}"


class TrainSettings(Settings):
    """How each round trains."""

    config: str = Field(
        description="axolotl's file; base_model, output_dir, dataset_prepared_path, the path of its dataset of the "
        f"type {FUSED} and the stores of its sources are filled in for every round"
    )
    command: str = Field("axolotl train", description="the program and its options; the configuration is appended")
    env: str | None = Field(None, description="as for a step of `fusion run`")
    variables: dict[str, str | int | float] = Field(default_factory=dict, description="as for a step of `fusion run`")


class HeldOutSettings(Settings):
    """What is measured of the target before the first round and after every one: a command, or a file of texts."""

    command: str | None = Field(
        None,
        description="a program and its arguments, {model} for the folder of the checkpoint; the last line of its "
        "standard output is a JSON object of numbers",
    )
    texts: str | None = Field(
        None, description="held-out texts or chats; measured is the target's cross-entropy, in nats per byte"
    )
    reads: list[str] = Field(
        default_factory=list, description="files and folders that decide what the command measures"
    )
    env: str | None = Field(None, description="as for a step of `fusion run`")
    variables: dict[str, str | int | float] = Field(default_factory=dict, description="as for a step of `fusion run`")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.command is None) == (self.texts is None):
            raise ValueError("expected either command or texts")
        if self.command is not None and PLACE_OF_MODEL not in self.command:
            raise ValueError(f"command: expected {PLACE_OF_MODEL} in it, where the folder of the checkpoint belongs")
        return self


class RoundsConfig(Settings):
    """Keys of the YAML file of ``fusion rounds``. Paths begin at the folder of the file, where all steps run."""

    target: str = Field(description="folder or hub name of the model that the first round starts from")
    rounds: int = Field(ge=1, description="how many; a larger number later continues")
    out: str = Field(
        "rounds", description="folder of the configurations, answers, stores and checkpoints of all rounds"
    )
    sample: dict[str, Any] = Field(
        description="how the target answers: `prompts`, and the keys of `fusion sample` and of one of its sources "
        "(n, max_tokens, temperature, backend: transformers, vllm or ray, options); env and variables of the step"
    )
    prompts_per_round: int | None = Field(
        None, ge=1, description="each round takes this many prompts, the next ones of the file; default: all of them"
    )
    score: dict[str, Any] | None = Field(
        None, description="keys of `fusion score`, such as scorers, where the answers are scored before the capture"
    )
    capture: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of `fusion capture` for all models, such as top_k, backend and options; env and variables of "
        "the step",
    )
    target_capture: dict[str, Any] = Field(
        default_factory=dict,
        description="keys on top of `capture` for the target itself, which is captured where the training names it "
        "(is_target)",
    )
    sources: list[dict[str, Any]] = Field(
        min_length=1, description="name and model of each source, and keys on top of `capture`"
    )
    train: TrainSettings = Field(description="how each round trains")
    held_out: HeldOutSettings | None = Field(None, description="what is measured of every checkpoint")
    sft_sources: list[str] | None = Field(
        None,
        description=f"names of the sources whose answers the target was tuned on; default: those of its {SFT_REPORT}",
    )
    environments: dict[str, str] = Field(default_factory=dict, description="as in the file of `fusion run`")
    variables: dict[str, str | int | float] = Field(default_factory=dict, description="as in the file of `fusion run`")

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        for place, source in enumerate(self.sources):
            name = source.get("name")
            if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(source.get("model"), str):
                raise ValueError(f"sources.{place}: expected a name (letters, digits, dots, dashes) and a model")
        names = [source["name"] for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError("sources: expected different names")
        for key in ("sample", "target_capture"):
            if (getattr(self, key).get("backend") or self.capture.get("backend", "")) == "openai":
                raise ValueError(
                    f"{key}: a server (backend: openai) would go on with the checkpoint that it was started with, and "
                    "the target is another one in every round; give the target transformers, vllm or ray"
                )
        return self


@dataclass(frozen=True)
class Rounds:
    """Rounds, ready to be written.

    Attributes:
        path: the file of ``fusion rounds``.
        config: its content.
        train: axolotl's configuration.
    """

    path: Path
    config: RoundsConfig
    train: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where paths begin, without links, as the steps see it."""
        return Path(os.path.realpath(Path(os.path.abspath(self.path)).parent))

    @property
    def out(self) -> Path:
        """Folder of all rounds."""
        return Path(os.path.normpath(self.folder / self.config.out))

    def name(self, number: int) -> str:
        """Return the name of a round; it does not depend on how many there are, so that more can be added."""
        return f"{number:02d}"

    def place(self, number: int, *parts: str) -> str:
        """Return a path of a round, from where the steps run."""
        return os.path.join(self.config.out, self.name(number), *parts)

    def checkpoint(self, number: int) -> str:
        """Return the target after a round; after round 0, as it was given."""
        if number == 0:
            return self.config.target
        return self.place(number, "merged" if self.train.get("adapter") else "model")

    def exists(self, place: str) -> bool:
        """Return whether a path of the file is there."""
        return (self.folder / place).exists()

    def folders_of_checkpoint(self, number: int) -> list[str]:
        """Return the folder of the target after a round; before the first one it may be a name of the hub, and none."""
        model = self.checkpoint(number)
        return [model] if number or self.exists(model) else []

    @property
    def own_name(self) -> str:
        """The name of the target among the sources of the training; ``target`` where it is none."""
        return next((source["name"] for source in self._fused if source.get("is_target")), "target")

    @property
    def captures_target(self) -> bool:
        """Whether the training asks for the target's own store."""
        return any(source.get("is_target") for source in self._fused)

    @property
    def _fused(self) -> list[dict[str, Any]]:
        return list(self.train["fusion"]["sources"])


def load_rounds(path: str | Path, flags: Mapping[str, Any], assignments: list[str] | None = None) -> Rounds:
    """Return the rounds that a file describes.

    Raises:
        ConfigError: a setting is wrong, here or in the configurations of the commands that it is for.
    """
    config = load_config(RoundsConfig, path, flags, assignments)
    file = Path(os.path.abspath(path)).parent / config.train.config
    train = load_config(_AnyKeys, file, {}).model_dump()
    fused = [entry for entry in train.get("datasets") or [] if entry.get("type") == FUSED]
    if len(fused) != 1:
        raise ConfigError(f"{file}: expected one dataset of the type {FUSED} for the answers, got {len(fused)}")
    block = train.get("fusion")
    named = block.get("sources") if isinstance(block, Mapping) else None
    if not isinstance(named, list) or not all(isinstance(source, Mapping) and source.get("name") for source in named):
        raise ConfigError(f"{file}: expected `fusion.sources`, each with a name, got {named!r:.200}")
    wanted = {source["name"] for source in named if not source.get("is_target")}
    given = {source["name"] for source in config.sources}
    if wanted != given:
        raise ConfigError(
            f"{path}: expected the sources of {file}, {', '.join(sorted(wanted))}, got {', '.join(sorted(given))}. "
            f"Name the same ones in both files; the target itself (is_target) is named in {file} alone."
        )
    rounds = Rounds(Path(path), config, train)
    for number in (1, 2):  # the first and any other one
        _configurations(rounds, number)
    return rounds


class _AnyKeys(Settings):
    """The file of another program, which checks it itself."""

    model_config = {"extra": "allow"}


def _configurations(rounds: Rounds, number: int) -> dict[str, dict[str, Any]]:
    """Return the configurations of the commands of one round: name of the file -> content.

    Raises:
        ConfigError: a command would not take one of them.
    """
    config, where = rounds.config, str(rounds.path)
    answers = rounds.place(number, "responses")
    made = {"sample.yml": _sampling(rounds, number)}
    if config.score is not None:
        made["score.yml"] = {**_of_command(config.score), "responses": answers, "out": rounds.place(number, "scored")}
        answers = rounds.place(number, "scored")
        validate(ScoreConfig, made["score.yml"], where=f"{where}: score")
    models = {source["name"]: {**config.capture, **source} for source in config.sources}
    if rounds.captures_target:
        own = {"name": rounds.own_name, "model": rounds.checkpoint(number - 1)}
        models[rounds.own_name] = {**config.capture, **config.target_capture, **own}
    for name, settings in models.items():
        store = {"texts": answers, "out": rounds.place(number, "stores", name)}
        made[f"capture-{name}.yml"] = {**_of_command(settings), **store}
        validate(CaptureConfig, made[f"capture-{name}.yml"], where=f"{where}: capture of {name}")
    made["train.yml"] = _training(rounds, number, answers)
    if rounds.train.get("adapter"):
        # axolotl merges into the folder `merged` of output_dir.
        merged = {"lora_model_dir": rounds.place(number, "model"), "output_dir": rounds.place(number)}
        made["merge.yml"] = made["train.yml"] | merged
    return made


def _sampling(rounds: Rounds, number: int) -> dict[str, Any]:
    config = rounds.config
    given = _of_command(config.sample)
    own = {key: value for key, value in given.items() if key in SampledSource.model_fields and key != "n"}
    run = {key: value for key, value in given.items() if key not in own}
    if config.prompts_per_round is not None:
        run["prompts"] = rounds.place(number, "prompts.jsonl")
    # Each round draws anew, also to prompts that another round had.
    run["seed"] = run.get("seed", 0) + number - 1
    own |= {"name": rounds.own_name, "model": rounds.checkpoint(number - 1)}
    made = {**run, "out": rounds.place(number, "responses"), "sources": [own]}
    validate(SampleConfig, made, where=f"{rounds.path}: sample")
    return made


def _training(rounds: Rounds, number: int, answers: str) -> dict[str, Any]:
    train = dict(rounds.train)
    train["base_model"] = rounds.checkpoint(number - 1)
    train["output_dir"] = rounds.place(number, "model")
    train["dataset_prepared_path"] = rounds.place(number, "prepared")
    train["datasets"] = [
        entry | {"path": answers} if entry.get("type") == FUSED else entry for entry in train["datasets"]
    ]
    sources = [
        source | {"store": rounds.place(number, "stores", source["name"])} for source in train["fusion"]["sources"]
    ]
    train["fusion"] = train["fusion"] | {"sources": sources}
    # A training that was killed goes on from its last checkpoint, if it makes any. Without a seed axolotl would shuffle
    # the rows anew.
    train.setdefault("auto_resume_from_checkpoints", True)
    train.setdefault("seed", SEED)
    return train


def _of_command(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in OF_THE_STEP}


def _of_step(*groups: Mapping[str, Any]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for group in groups:
        joined |= {key: group[key] for key in OF_THE_STEP if group.get(key) is not None}
    return joined


def write_rounds(rounds: Rounds) -> Chain:
    """Write the configurations of all rounds, and the chain that runs them.

    Raises:
        DataError: there are fewer prompts than one round takes.
    """
    for number in range(1, rounds.config.rounds + 1):
        folder = rounds.out / rounds.name(number)
        make_folder(folder)
        for name, content in _configurations(rounds, number).items():
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
        name, configs = rounds.name(number), _configurations(rounds, number)

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
        groups = {source["name"]: source for source in config.sources} | {rounds.own_name: config.target_capture}
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
    prompts = open_prompts([path if is_hub(path) else str(rounds.folder / path) for path in paths])
    total = len(prompts)
    if total < count:
        raise ConfigError(
            f"{rounds.path}: expected at least {count} prompts, one round's (prompts_per_round), got {total}"
        )
    for number in range(1, rounds.config.rounds + 1):
        first = (number - 1) * count % total
        chosen = [*islice(prompts, first, first + count), *islice(prompts, max(0, first + count - total))]
        rows = []
        for prompt in chosen:
            text = prompt.text
            content = {"text": text.content} if isinstance(text.content, str) else {"messages": text.content}
            extra = {"tools": text.tools, "reference": prompt.reference, "tests": prompt.tests}
            given = {key: value for key, value in extra.items() if value is not None}
            rows.append(json.dumps({"id": text.id, **content, "domain": prompt.domain, **given}, ensure_ascii=False))
        write_atomic(rounds.out / rounds.name(number) / "prompts.jsonl", "".join(f"{row}\n" for row in rows))


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
