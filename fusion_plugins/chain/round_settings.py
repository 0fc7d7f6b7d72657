"""The keys of the file of ``fusion rounds``."""

from typing import Any, Self

from pydantic import Field, model_validator

from fusion_plugins.chain.settings import NAME
from fusion_plugins.config import Settings

#: names by which axolotl finds the plugin
PLUGINS = ("fusion_plugins.axolotl.FusionPlugin", "fusion_plugins.axolotl.plugin.FusionPlugin")
#: dataset type whose path becomes the answers of the round
FUSED = "fusion_plugins.axolotl.fused"
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
