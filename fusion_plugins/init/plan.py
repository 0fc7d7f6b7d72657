"""The settings of ``fusion init``, and what follows from them: choices, findings and the steps of the run."""

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fusion_plugins.config import Settings
from fusion_plugins.errors import ConfigError
from fusion_plugins.hub import hub_dataset, is_hub
from fusion_plugins.init import choices, findings
from fusion_plugins.init.choices import Choice
from fusion_plugins.init.findings import Finding
from fusion_plugins.init.machine import Machine, this_machine
from fusion_plugins.init.models import Model, ModelFacts, read_model
from fusion_plugins.init.texts import Lengths, TextFacts, lengths_of, read_texts_facts
from fusion_plugins.scoring.reward_presets import REWARD_PRESETS
from fusion_plugins.sources.presets import PRESETS

METHODS = {
    "fusellm": "one target learns from the distributions of several sources",
    "fusechat": "one copy of the target per source learns from its distributions, then the copies are merged",
    "fusechat3": "the target learns from the scored answers of several sources, first the best ones, then pairs",
}
#: bytes of a store per token, for K of at most 10 and of at most 64, and for each further entry
_STORE_BYTES = {10: 33, 64: 165}
_PER_ENTRY = 2.5


class InitConfig(Settings):
    """The choices of ``fusion init``; what is null is chosen."""

    method: Literal["fusellm", "fusechat", "fusechat3"] = Field(description="fusellm, fusechat or fusechat3")
    target: str = Field(min_length=1, description="folder or hub name of the model to train")
    sources: list[str] = Field(min_length=1, description="folders or hub names of the models to learn from")
    texts: str = Field(min_length=1, description="texts, chats or (fusechat3) prompts: .jsonl or .parquet, or a folder")
    out: str = Field(min_length=1, description="folder to write")
    backend: Literal["transformers", "vllm"] = Field("transformers", description="what runs the sources")
    vllm: str | None = Field(None, description="environment with vLLM, where the sources run; implies backend vllm")
    gpus: int | None = Field(None, ge=0, description="GPUs of the machine that trains; default: those of this machine")
    gpu_memory: float | None = Field(None, gt=0, description="memory of one of them in GB")
    adapter: Literal["none", "lora", "qlora"] | None = Field(
        None, description="none, lora or qlora; default: what fits"
    )
    sequence_len: int | None = Field(None, ge=16, description="tokens of a training row")
    lm_loss_weight: float | None = Field(None, ge=0, le=1, description="lambda, the weight of the language-model loss")
    top_k: int | None = Field(None, ge=1, description="entries per position in the stores")
    rule: str = Field("min_ce", description="fusion rule")
    batch: int | None = Field(None, ge=1, description="sequences per step, over all GPUs")
    epochs: int | None = Field(None, ge=1, description="passes over the texts")
    learning_rate: float | None = Field(None, gt=0, description="of the (first) training")
    pad_token: str | None = Field(None, description="token of the target to pad with")
    own: bool = Field(True, description="capture the target, too, so that its own distributions compete")
    merge: Literal["varm", "fusechat_sce"] = Field("varm", description="how fusechat merges")
    samples: int | None = Field(None, ge=2, description="fusechat3: answers per prompt and source")
    max_tokens: int | None = Field(None, ge=1, description="fusechat3: longest answer")
    reward_model: str | None = Field(None, description="fusechat3: reward model, for prompts that cannot be verified")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the reward model")
    chat_templates: dict[str, str] = Field(default_factory=dict, description="model -> file with its chat template")
    facts: dict[str, ModelFacts] = Field(default_factory=dict, description="model -> what it is, said by hand")


@dataclass(frozen=True)
class Step:
    """One step of the run.

    Attributes:
        name: short and unique.
        command: arguments of the stock command, run in the folder.
        why: one line.
        reads: files and folders that decide the result, besides the configuration that the command names.
        writes: what is there when it is done.
        needs: steps that must have ended before, where no file says so.
        samples: it runs the sources, in the environment with vLLM if there is one.
    """

    name: str
    command: list[str]
    why: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    samples: bool = False

    @property
    def line(self) -> str:
        """The command for a shell."""
        return shlex.join(self.command)


@dataclass(frozen=True)
class Plan:
    """A whole run, before its files are written.

    Attributes:
        config: what was asked for.
        target: the model to train.
        sources: the models to learn from.
        texts: what they are asked about.
        machine: GPUs.
        lengths: model -> tokens of the texts.
        memory: adapter and stage of ZeRO.
        values: name of a setting -> its choice.
        findings: what cannot work, or should be looked at.
        cut: whether texts are cut first.
    """

    config: InitConfig
    target: Model
    sources: list[Model]
    texts: TextFacts
    machine: Machine
    lengths: dict[str, Lengths | None]
    memory: choices.Memory
    batch: choices.Batch
    values: dict[str, Choice]
    findings: list[Finding] = field(default_factory=list)
    cut: bool = False

    @property
    def captured(self) -> list[Model]:
        """The models whose distributions are stored."""
        return [*self.sources, *([self.target] if self.config.own else [])]

    @property
    def tokens(self) -> float:
        """Tokens of all texts in the target's tokenizer."""
        return count_tokens(self.texts, self.lengths[self.target.short])

    @property
    def store_bytes(self) -> float:
        """Bytes of all stores, from what a stored token takes (docs/store.md)."""
        k = self.values["top_k"].value
        per_token = next((size for most, size in _STORE_BYTES.items() if k <= most), k * _PER_ENTRY)
        return self.tokens * per_token * len(self.captured)

    def seen(self, path: str) -> str:
        """Return a path as the folder of the run sees it; names on the hub stay as they are."""
        return seen_from(self.config.out, path)

    @property
    def data(self) -> str:
        """The texts that are captured and trained on."""
        return "pieces.jsonl" if self.cut else self.seen(self.texts.path)

    @property
    def entry(self) -> dict[str, str]:
        """Axolotl's keys that say where the texts are."""
        if self.cut or not is_hub(self.texts.path):
            return {"path": self.data}
        found = hub_dataset(self.texts.path)
        column = {"field_messages" if self.texts.chats else "field": found.column}
        keys = {"path": self.seen(found.name), "name": found.config, "revision": found.revision, "split": found.split}
        return {key: value for key, value in (keys | column).items() if value is not None}

    @property
    def skips(self) -> str:
        """``on_unusable`` of the files."""
        refused = any(found is not None and found.refused for found in self.lengths.values())
        limit = self.values["sequence_len"].value
        long = any(found is not None and found.longest > limit for found in self.lengths.values())
        return "skip" if self.texts.unusable or refused or (long and not self.cut) else "raise"

    def steps(self) -> Iterator[Step]:
        """Yield the steps in their order."""
        yield from self._scored_steps() if self.config.method == "fusechat3" else self._captured_steps()

    def _captured_steps(self) -> Iterator[Step]:
        if self.cut:
            yield self._cut_step()
        for model in self.captured:
            name = f"capture-{model.short}"
            command, why = ["fusion", "capture", "--config", f"{name}.yml"], f"store what {model.short} says"
            reads = (*self._files(self.data), *self._model_files(model))
            yield Step(name, command, why, reads, (f"stores/{model.short}",), samples=True)
        if self.config.own:
            stores = [f"stores/{source.short}" for source in self.sources]
            command = ["fusion", "doctor", *stores, "--target", f"stores/{self.target.short}", "--out", "doctor"]
            yield Step("doctor", command, "ask whether fusing can help, before any training", writes=("doctor",))
        if self.config.method == "fusellm":
            yield from self._training("train", "train the target on the fused distributions", self.captured, "fused")
            return
        own = [self.target] if self.config.own else []
        for source in self.sources:
            why = f"one copy of the target learns from {source.short}"
            yield from self._training(f"train-{source.short}", why, [source, *own])
        copies = tuple(f"train-{source.short}" for source in self.sources)
        yield Step("merge-check", ["fusion", "merge-check", "merge.yml"], "look for mistakes before the merge", copies)
        cache = ["--lora-merge-cache", "lora-cache"] if self.memory.adapter else []
        command = ["mergekit-yaml", "merge.yml", "merged", *cache]
        yield Step("merge", command, "merge the copies", copies, ("merged",), ("merge-check",))
        yield self._report_step("merged", "see who contributed what")

    def _cut_step(self) -> Step:
        names = [self.seen(model.name) for model in (self.target, *self.sources)]
        texts, limit = self.seen(self.texts.path), str(self.values["sequence_len"].value)
        command = ["fusion", "cut", "--texts", texts, "--out", "pieces.jsonl", "--max-length", limit]
        command += [part for name in names for part in ("--tokenizer", name)]
        command += ["--set", "on_unusable=skip"] if self.skips == "skip" else []
        why = "cut long texts into pieces that fit every model"
        reads = [path for place in (texts, *names) for path in self._files(place)]
        return Step("cut", command, why, tuple(reads), ("pieces.jsonl",))

    def _scored_steps(self) -> Iterator[Step]:
        why = "every source answers every prompt several times"
        reads = self._files(self.seen(self.texts.path))
        reads += [path for source in self.sources for path in self._model_files(source)]
        command = ["fusion", "sample", "--config", "sample.yml"]
        yield Step("sample", command, why, tuple(reads), ("responses",), samples=True)
        reward = self._files(self.seen(self.config.reward_model)) if self.config.reward_model else []
        command = ["fusion", "score", "--config", "score.yml"]
        yield Step("score", command, "score the answers", ("responses", *reward), ("scored",))
        yield self._report_step("scored", "see how good the sources are")
        yield from self._training("sft", "learn the best answers")
        yield from self._training("dpo", "prefer the better of two answers")

    def _report_step(self, folder: str, why: str) -> Step:
        return Step("report", ["fusion", "report", folder, "--out", "report.html"], why, (folder,), ("report.html",))

    def _training(self, name: str, why: str, learnt: Sequence[Model] = (), made: str = "") -> Iterator[Step]:
        single = ["--launcher", "python"] if self.machine.gpus == 0 else []
        made = made or name
        reads = [f"stores/{model.short}" for model in learnt]
        reads += self._files(self.data) if learnt else ["scored"]
        reads += [self.trained_first] if name == "dpo" else self._model_files(self.target)
        needs = ("doctor",) if learnt and self.config.own else ()
        yield Step(name, ["axolotl", "train", f"{name}.yml", *single], why, tuple(reads), (made,), needs)
        if self.memory.adapter and self.config.method != "fusechat":
            # axolotl writes into a folder `merged` of its own choice inside this one.
            folders = ["--lora-model-dir", f"./{made}", "--output-dir", f"./{made}-full"]
            command = ["axolotl", "merge-lora", f"{name}.yml", *folders]
            yield Step(f"{name}-full", command, "put the adapter into the weights", (made,), (f"{made}-full",))

    @property
    def trained_first(self) -> str:
        """The model of the first of two trainings."""
        return "sft-full/merged" if self.memory.adapter else "sft"

    def template_of(self, model: Model) -> str | None:
        """The file with the chat template that takes the place of a model's, as the folder of the run sees it."""
        given = self.config.chat_templates
        path = given.get(model.name, given.get(model.short))
        return path and self.seen(path)

    def _model_files(self, model: Model) -> list[str]:
        """The folder of a model, and the file of its chat template."""
        template = self.template_of(model)
        return [*self._files(self.seen(model.name)), *(self._files(template) if template else [])]

    def _files(self, seen: str) -> list[str]:
        """A path that a step reads, where it is one and no name on the hub."""
        # The folder is not there yet, so ".." in a path is taken off by hand.
        place = os.path.normpath(os.path.join(os.path.realpath(self.config.out), seen))
        return [seen] if seen == "pieces.jsonl" or os.path.exists(place) else []


def count_tokens(texts: TextFacts, lengths: Lengths | None) -> float:
    """Return about how many tokens texts have; four bytes each where no tokenizer says more."""
    return texts.n_bytes * (lengths.per_byte if lengths is not None else 0.25)


def seen_from(folder: str, path: str) -> str:
    """Return a path of this folder as another folder sees it.

    A name on the hub and an absolute path stay as they are. A file of the folder begins with ``./``, because mergekit
    asks the hub about names like "word/word".

    Example:
        >>> seen_from("runs/one", "org/name"), seen_from("one", "/data/a.jsonl")
        ('org/name', '/data/a.jsonl')
    """
    if is_hub(path) and (place := hub_dataset(path).name) != (seen := seen_from(folder, place)):
        return path.replace(place, seen, 1)
    if os.path.isabs(path) or not Path(path).exists():
        return path
    # Programs that run there know no links above them.
    seen = Path(os.path.relpath(path, os.path.realpath(folder))).as_posix()
    return seen if seen.startswith("..") else f"./{seen}"


def make_plan(config: InitConfig) -> Plan:
    """Read models and texts, and decide everything.

    Raises:
        ConfigError: a model cannot be read, or a setting does not fit the others.
        DataError: no text can be used.
    """
    config = _completed(config)
    names = _short_names([config.target, *config.sources])
    unknown = {*config.facts, *config.chat_templates} - {*names, *names.values()}
    if unknown:
        raise ConfigError(
            f"--facts and --chat-template: expected some of the models {', '.join(names)}, got "
            f"{', '.join(sorted(unknown))}"
        )
    texts = read_texts_facts(config.texts, prompts=config.method == "fusechat3")
    target, *sources = (_read(name, short, config) for name, short in names.items())
    if config.pad_token is not None:
        target = _with_pad_token(target, config.pad_token)
    machine = this_machine(config.gpus, config.gpu_memory)
    lengths = {model.short: lengths_of(model, texts) for model in (target, *sources)}
    memory = choices.memory(target.facts.parameters, machine, config.adapter, reference=config.method == "fusechat3")
    values = dict(_values(config, target, sources, lengths, machine, memory.adapter))
    limit = values["sequence_len"].value
    known = [found for found in lengths.values() if found is not None]
    can_cut = config.method == "fusellm" and texts.chats == 0
    cut = can_cut and any(found.longest > limit for found in known)
    packed = packs(config.method, machine)
    sequences = max(count_tokens(texts, lengths[target.short]) / limit, 1) if packed else texts.count
    batch = choices.batch(sequences, target.facts.parameters, machine, config.batch)
    needs_chats = config.method == "fusechat3" or texts.chats > 0
    found = [
        *findings.about_models(target, sources, needs_chats),
        *findings.about_texts(texts, config.method),
        *findings.about_lengths(texts, lengths, [target, *sources], limit, can_cut),
        *findings.about_sizes(target, sources, machine, memory, config.backend == "vllm"),
        *_about_scoring(config, texts, machine),
    ]
    return Plan(config, target, sources, texts, machine, lengths, memory, batch, values, found, cut)


def _completed(config: InitConfig) -> InitConfig:
    if config.vllm is not None and config.backend != "vllm":
        return config.model_copy(update={"backend": "vllm"})
    return config


def _short_names(names: list[str]) -> dict[str, str]:
    """Return name -> short name: the last part, made different from those before it."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"expected different models, got {', '.join(twice)} twice. "
            "The target is captured by itself and needs no second mention; name every source once."
        )
    short: dict[str, str] = {}
    for name in names:
        last = Path(name.rstrip("/")).name if Path(name).is_dir() else name.rstrip("/").rsplit("/", 1)[-1]
        last = "".join(letter if letter.isascii() and letter.isalnum() or letter in "._-" else "-" for letter in last)
        last = last.lower().strip(".-") or "model"
        candidate, number = last, 2
        while candidate in short.values():
            candidate, number = f"{last}-{number}", number + 1
        short[name] = candidate
    return short


def _read(name: str, short: str, config: InitConfig) -> Model:
    given = config.facts.get(name, config.facts.get(short))
    template = config.chat_templates.get(name, config.chat_templates.get(short))
    return read_model(name, short, given.model_dump() if given is not None else None, template)


def _with_pad_token(target: Model, token: str) -> Model:
    if target.tokenizer is not None and token not in target.tokenizer.get_vocab():
        raise ConfigError(
            f"--pad-token: expected a token of {target.name}, got {token!r}, which its tokenizer does not have. A new "
            "token would have an untrained row: name one that is there."
        )
    named = target.tokenizer is not None and target.tokenizer.pad_token == token
    facts = target.facts.model_copy(update={"pad_token": token, "names_pad": named})
    return replace(target, facts=facts)


def _values(
    config: InitConfig,
    target: Model,
    sources: list[Model],
    lengths: dict[str, Lengths | None],
    machine: Machine,
    adapter: str | None,
) -> Iterator[tuple[str, Choice]]:
    """Yield the settings that the files repeat."""

    def chosen(name: str, value: Choice) -> tuple[str, Choice]:
        asked = getattr(config, name)
        return name, value if asked is None else Choice(asked, "as asked")

    windows = [model.facts.window for model in (target, *sources)]
    known = [found.longest for found in lengths.values() if found is not None]
    longest = max(known) if len(known) == len(windows) and max(known) else None
    attention = choices.attention(target.facts.model_type, machine)
    if config.method == "fusechat3" or packs(config.method, machine):
        longest = None  # answers are as long as they are, and packed rows are filled
    yield "sequence_len", choices.sequence_len(windows, longest, config.sequence_len)
    size, kind, method = target.facts.parameters, target.facts.model_type, config.method
    yield chosen("lm_loss_weight", choices.lm_loss_weight(size))
    yield chosen("top_k", choices.entries([source.facts.parameters for source in sources]))
    first = "sft" if method == "fusechat3" else method
    yield chosen("learning_rate", choices.learning_rate(first, size, kind, adapter))
    yield "dpo_learning_rate", choices.learning_rate("dpo", size, kind, adapter)
    epochs = {"fusellm": 1, "fusechat": 3, "fusechat3": 3}[method]
    toy = size < choices.TOY
    yield chosen("epochs", Choice(10, "a target of this size needs many") if toy else Choice(epochs, "the paper's"))
    yield "attention", attention
    loss, beta = choices.preference_loss(kind)
    yield "dpo_loss", loss
    yield "dpo_beta", beta


def packs(method: str, machine: Machine) -> bool:
    """Return whether texts share a row: plain texts on GPUs; on a CPU full rows cost more than they save."""
    return method == "fusellm" and machine.gpus > 0


#: what scores prompts that cannot be verified, if nothing is named: it runs no code of its own
REWARD_PRESET = "skywork-v2-llama-3.1-8b"


def _about_scoring(config: InitConfig, texts: TextFacts, machine: Machine) -> Iterator[Finding]:
    if config.method != "fusechat3" or texts.verifiable == texts.count:
        return
    unverified = texts.count - texts.verifiable
    model = config.reward_model or REWARD_PRESETS[REWARD_PRESET]["model"]
    on_cpu = " It runs on the CPU here, which is slow." if machine.gpus == 0 else ""
    yield Finding(
        texts.path,
        f"{unverified} of {texts.count} prompts cannot be verified: the reward model {model} scores them. Name another "
        f"with --reward-model.{on_cpu}",
    )
    if "armorm" in model.lower() and not config.trust_remote_code:
        yield Finding(
            model, "its gated score is computed by code that comes with it: give --trust-remote-code, or another", True
        )


def sampling_of(model: Model, plan: Plan) -> dict[str, Any]:
    """Return the sampling settings of a source: the published ones where it is one of FuseChat-3.0's."""
    wanted = model.name.rsplit("/", 1)[-1].lower()
    parts = {preset: preset.removeprefix("fusechat3-").split("-") for preset in PRESETS}
    fitting = [preset for preset, words in parts.items() if all(word in wanted for word in words)]
    settings: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
    if fitting:
        settings = {"preset": max(fitting, key=lambda preset: len(parts[preset]))}
    return settings | {"max_tokens": answer_tokens(model, plan)}


def answer_tokens(model: Model, plan: Plan) -> int:
    """Return the longest answer that leaves room for the longest prompt in the window."""
    if plan.config.max_tokens is not None:
        return plan.config.max_tokens
    limit = min(plan.values["sequence_len"].value, model.facts.window or choices.SEQUENCE)
    found = plan.lengths[model.short]
    prompt = found.longest if found is not None and found.longest < limit else limit // 2
    return max(limit - prompt - 8, 16)
