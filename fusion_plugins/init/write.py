"""A plan -> the files of its folder. Every YAML file is checked against the settings of the command that reads it."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

import fusion_plugins
from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.chain.round_settings import RoundsConfig
from fusion_plugins.chain.settings import Chain, ChainSettings
from fusion_plugins.config import parse_yaml, validate
from fusion_plugins.errors import ConfigError
from fusion_plugins.escape import for_terminal
from fusion_plugins.init import choices
from fusion_plugins.init.choices import Choice
from fusion_plugins.init.models import Model
from fusion_plugins.init.plan import REWARD_PRESET, Plan, answer_tokens, packs, sampling_of
from fusion_plugins.init.settings import METHODS, ON_PROMPTS
from fusion_plugins.init.steps import steps_of
from fusion_plugins.install import missing_package_error
from fusion_plugins.recipes import recipe_files
from fusion_plugins.scoring.score import ScoreConfig
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.sources.presets import SAMPLES_PER_PROMPT
from fusion_plugins.sources.sample_config import SampleConfig
from fusion_plugins.store.files import make_folder, write_atomic

#: the steps, where `fusion run` looks for them
RUN_FILE = "fusion.yml"
#: what the templates see of a plan under its own name
_OF_THE_PLAN = ("config", "target", "sources", "texts", "machine", "memory", "verifiers")
#: beginning of a file's name -> who reads it
_READERS: dict[str, type[BaseModel]] = {
    "capture-": CaptureConfig,
    "sample": SampleConfig,
    "score": ScoreConfig,
    "rounds": RoundsConfig,
}


def files_of(plan: Plan) -> dict[str, str]:
    """Return the files of a plan: name -> content.

    Raises:
        ConfigError: jinja2 is not installed; or a file would be refused by the command that reads it.
    """
    files = dict(_files(plan))
    # Refuses steps that write the same place, or wait for each other.
    Chain(Path(plan.config.out) / RUN_FILE, validate(ChainSettings, parse_yaml(files[RUN_FILE]), where=RUN_FILE))
    for name, content in files.items():
        if name.endswith(".yml") and name != RUN_FILE:
            _check(name, parse_yaml(content))
    return files


def write_files(files: dict[str, str], out: Path) -> None:
    """Write files; what is there and differs is not overwritten.

    Raises:
        ConfigError: a file of that name has another content.
    """
    changed = [name for name in files if (out / name).exists() and (out / name).read_bytes() != files[name].encode()]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} in {out} differ from what would be written and are not overwritten. Move them away, "
            "or give another --out."
        )
    for name, content in files.items():
        make_folder((out / name).parent)
        write_atomic(out / name, content)


def _check(name: str, values: Any) -> None:
    reader = next((model for prefix, model in _READERS.items() if name.startswith(prefix)), None)
    if reader is not None:
        validate(reader, values, where=name)
    elif "fusion" in values:
        validate(FusionBlock, values["fusion"], where=f"{name}, fusion")


def _files(plan: Plan) -> Iterator[tuple[str, str]]:
    render = _Renderer(plan)
    if plan.config.method in ON_PROMPTS:
        yield from _files_of_answers(plan, render)
    else:
        yield from _files_of_stores(plan, render)
    if plan.memory.stage:
        name = f"deepspeed/zero{plan.memory.stage}.json"
        yield name, recipe_files()[f"axolotl_configs/{name}"].read_text(encoding="utf-8")
    yield RUN_FILE, run_file(plan)
    yield "README.md", render("README.md")


def _files_of_stores(plan: Plan, render: "_Renderer") -> Iterator[tuple[str, str]]:
    base = plan.seen(plan.target.name)
    for model in plan.captured:
        yield f"capture-{model.short}.yml", render.capture(model)
    if plan.config.method == "fusellm":
        yield "train.yml", render("fused.yml", name="train", made="fused", base=base, learnt=plan.sources)
        return
    for source in plan.sources:
        name = f"train-{source.short}"
        yield f"{name}.yml", render("fused.yml", name=name, made=name, base=base, learnt=[source])
    yield "merge.yml", render("merge.yml")


def _files_of_answers(plan: Plan, render: "_Renderer") -> Iterator[tuple[str, str]]:
    base, tuned = plan.seen(plan.target.name), f"./{plan.trained_first}"
    if plan.config.tuned:
        tuned = base
    else:
        yield "sample.yml", render("sample.yml")
        yield "score.yml", render("score.yml")
        yield "sft.yml", render("sft.yml", name="sft", made="sft", base=base)
    values = plan.values
    if plan.config.method == "fusechat3":
        own = {"learning_rate": values["dpo_learning_rate"], "epochs": Choice(1, "the paper's")}
        yield "dpo.yml", render("dpo.yml", name="dpo", made="dpo", preferences=True, base=tuned, **own)
        return
    own = {key: values.get(f"round_{key}", values[key]) for key in ("learning_rate", "epochs")}
    yield "rounds.yml", render("rounds.yml", base=tuned)
    yield "train.yml", render("round.yml", name="train", made="model", base=tuned, scheduler="constant", **own)


def run_file(plan: Plan) -> str:
    """Return ``fusion.yml``: the steps for ``fusion run``."""
    steps = []
    for step in steps_of(plan):
        entry: dict[str, Any] = {"name": step.name, "command": step.line}
        entry |= {key: list(value) for key in ("needs", "reads", "writes") if (value := getattr(step, key))}
        if step.samples and plan.config.vllm is not None:
            entry["env"] = "vllm"
        steps.append(entry)
    values: dict[str, Any] = {"steps": steps}
    if plan.config.vllm is not None:
        values = {"environments": {"vllm": plan.seen(plan.config.vllm)}, **values}
    head = "# The steps of this run. Run: fusion run\n"
    return head + yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _Renderer:
    """The templates, with everything that they name."""

    def __init__(self, plan: Plan) -> None:
        try:
            from jinja2 import Environment, PackageLoader, StrictUndefined
        except ModuleNotFoundError as error:
            raise missing_package_error(error, "`fusion init`") from error
        self._plan = plan
        # The files are YAML, not HTML: whatever is not ours goes through one of these filters.
        self._environment = Environment(
            loader=PackageLoader("fusion_plugins"),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        filters = {"human": choices.human, "yaml": as_yaml, "comment": one_line, "choice": _choice, "text": one_line}
        self._environment.filters |= filters
        self._values = self._of_the_plan(plan)

    def __call__(self, file: str, **values: Any) -> str:
        return self._environment.get_template(f"init/{file}").render({**self._values, **values})

    def capture(self, model: Model) -> str:
        """The settings that store what one model says."""
        return self(
            "capture.yml",
            model=model,
            template=self._values["templates"][model.short],
            parallel=self._values["parallel"][model.short],
        )

    def _batch_tokens(self, model: Model) -> Choice:
        facts, machine = model.facts, self._plan.machine
        return choices.batch_tokens(facts.parameters, facts.vocab_size, machine) or Choice(1024, "it does not fit")

    def _of_the_plan(self, plan: Plan) -> dict[str, Any]:
        config, models = plan.config, [plan.target, *plan.sources]
        templates = {model.short: plan.template_of(model) for model in models}
        unverified = plan.texts.verifiable < plan.texts.count
        asks = config.method in ON_PROMPTS
        rewards = asks and (unverified or config.reward_model is not None)
        parallel = {
            model.short: choices.tensor_parallel(model.facts.parameters, plan.machine) or max(plan.machine.gpus, 1)
            for model in models
        }
        return {
            **{name: getattr(plan, name) for name in _OF_THE_PLAN},
            **plan.values,
            "plan": plan,
            "batch": plan.batch,
            "seen": plan.seen,
            "templates": templates,
            "target_template": templates[plan.target.short],
            "names": " and ".join(source.short for source in plan.sources),
            "packing": packs(config.method, plan.machine),
            "asks": asks,
            "preferences": False,
            "scheduler": "cosine",
            "warmup": {"fusellm": 0.008, "fusechat": 0.03}.get(config.method, 0.1),
            "sampling": {source.short: sampling_of(source, plan) for source in plan.sources},
            "own_tokens": answer_tokens(plan.target, plan),
            "samples": {name: SAMPLES_PER_PROMPT.get(name, 5) for name in plan.texts.domains},
            "parallel": parallel,
            "batch_tokens": {model.short: self._batch_tokens(model) for model in models},
            "short_sources": [source.short for source in plan.sources],
            "rewards": rewards,
            "reward_preset": REWARD_PRESET,
            "domains": sorted(plan.texts.domains),
            "about": METHODS[config.method],
            "version": fusion_plugins.__version__,
            "folder": shlex.quote(config.out),
            "stops": [finding for finding in plan.findings if finding.stops],
            "notes": [finding for finding in plan.findings if not finding.stops],
            "steps": list(steps_of(plan)),
            "chosen": list(chosen_settings(plan)),
        }


def chosen_settings(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and reason of what was chosen, for a table."""
    for name, choice in plan.values.items():
        yield name, "all" if choice.value is None else str(choice.value), choice.why
    trained = plan.memory.adapter or "all weights"
    stage = f", ZeRO-{plan.memory.stage}" if plan.memory.stage else ""
    yield "training", trained + stage, plan.memory.why
    yield "batch", str(plan.batch.total), plan.batch.why
    pad = plan.target.facts.pad_token
    yield "pad_token", str(pad), "the tokenizer's own" if plan.target.facts.names_pad else "a token that ends no turn"


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which writes a line break in a text as one unless the text stands in double quotes."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text)


def as_yaml(value: Any) -> str:
    r"""Return a value in one line of YAML.

    Example:
        >>> as_yaml("a: #b"), as_yaml(1e-05), as_yaml({"a": [1, "x\n"]})
        ("'a: #b'", '1.0e-05', '{a: [1, "x\\n"]}')
    """
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1 << 30)
    return str(text).removesuffix("...\n").strip()


def one_line(value: Any) -> str:
    """Return a text for a comment or a cell of a table: one line, no control characters."""
    return " ".join(for_terminal(str(value)).split()).replace("|", "\\|")


def _choice(choice: Choice) -> str:
    return f"{as_yaml(choice.value)}  # {one_line(choice.why)}"
