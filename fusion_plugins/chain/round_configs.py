"""The configurations of the commands of ``fusion rounds``, one folder of them per round."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.chain.round_settings import FUSED, PLUGINS, RoundsConfig
from fusion_plugins.config import Settings, load_config, validate
from fusion_plugins.errors import ConfigError
from fusion_plugins.plugins import get_registry
from fusion_plugins.scoring.score import ADDED_COLUMNS, ScoreConfig
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.sources.sample_config import COLUMNS, SampleConfig, SampledSource
from fusion_plugins.where import Where, columns_of

#: of a training whose configuration has none
SEED = 42
#: keys of a group of settings that are of the step, not of the command
OF_THE_STEP = ("env", "variables")


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
        made = configurations(rounds, number)
    _check_training(made["train.yml"], str(file))
    _check_columns(made, str(path), str(file))
    return rounds


def _check_training(train: Mapping[str, Any], where: str) -> None:
    """Check what a training would refuse, hours of sampling and of capturing later.

    Names that are not known here may be registered where the training runs. It may run in another environment: the
    options of the loss are left to it where there is no torch.

    Raises:
        ConfigError: the plugin is missing, a dataset is of another type, a setting of the block is wrong, or a rule
            would choose between sources on the target's own answers.
    """
    block = validate(FusionBlock, dict(train["fusion"]), where=f"{where}: fusion")
    problems: list[str] = []
    if find_spec("torch") is not None:
        from fusion_plugins.axolotl.fusion_losses import problems_of_fusion_loss

        problems += problems_of_fusion_loss(block)
    if not {*PLUGINS} & {*(train.get("plugins") or [])}:
        problems.append(f"plugins: expected {PLUGINS[0]} among them, got {train.get('plugins')!r:.80}")
    if others := sorted({str(entry.get("type")) for entry in train["datasets"]} - {FUSED}):
        problems.append(f"datasets: expected the type {FUSED} alone, got {', '.join(others)} too, which fuses nothing")
    everywhere = [source.name for source in block.sources if not source.conditions]
    by_cross_entropy = getattr(get_registry("fusion_rules").get(block.rule), "by_cross_entropy", False)
    # Which domains there are is not known yet.
    if not problems and len(everywhere) > 1 and by_cross_entropy and not block.rule_by_domain:
        problems.append(
            f"fusion.rule: {block.rule} cannot choose between {', '.join(everywhere)} on the target's own answers: the "
            "source that finds such an answer most likely is the one that shares the target's mistakes. Give each "
            "domain one source (domains in fusion.sources), or set rule: fixed_weights"
        )
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}")


def _check_columns(made: Mapping[str, Mapping[str, Any]], where: str, training: str) -> None:
    """Refuse conditions on columns that the answers will not have, before they are sampled.

    Raises:
        ConfigError: naming the condition, its columns, and those that the answers have.
    """
    there = {*COLUMNS, *made["sample.yml"].get("keep_columns", ()), *(ADDED_COLUMNS if "score.yml" in made else ())}
    asked: dict[str, Where | None] = {
        f"{where}: where of the capture {name.removeprefix('capture-').removesuffix('.yml')}": settings.get("where")
        for name, settings in made.items()
        if name.startswith("capture-")
    }
    block = validate(FusionBlock, dict(made["train.yml"]["fusion"]), where=f"{training}: fusion")
    asked[f"{training}: fusion.where"] = block.where
    asked |= {f"{training}: where of the source {source.name}": source.conditions for source in block.sources}
    for place, conditions in asked.items():
        stored = zip(conditions or (), columns_of(conditions), strict=True)
        if missing := [name for name, column in stored if column not in there]:
            raise ConfigError(
                f"{place}: expected columns that the answers have, got {', '.join(missing)}. Columns of the prompts go "
                "to their answers if sample.keep_columns lists them, verdicts and rewards come from `score`, and the "
                f"others are {', '.join(COLUMNS)}."
            )


class _AnyKeys(Settings):
    """The file of another program, which checks it itself."""

    model_config = {"extra": "allow"}


def configurations(rounds: Rounds, number: int) -> dict[str, dict[str, Any]]:
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
        run.pop("columns", None)  # the prompts of a round are written under the usual names
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
