"""What follows from the settings of ``fusion init``: choices, findings and what the files say."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fusion_plugins.errors import ConfigError
from fusion_plugins.hub import hub_dataset, is_hub
from fusion_plugins.init import choices, findings
from fusion_plugins.init.choices import Choice
from fusion_plugins.init.findings import Finding
from fusion_plugins.init.machine import Machine, this_machine
from fusion_plugins.init.models import Model, read_model
from fusion_plugins.init.names import seen_from, short_names
from fusion_plugins.init.settings import ON_PROMPTS, InitConfig
from fusion_plugins.init.texts import VERIFIED_BY, Lengths, TextFacts, lengths_of, read_texts_facts
from fusion_plugins.scoring.reward_presets import REWARD_PRESETS
from fusion_plugins.sources.presets import PRESETS

#: bytes of a store per token, for K of at most 10 and of at most 64, and for each further entry
_STORE_BYTES = {10: 33, 64: 165}
_PER_ENTRY = 2.5


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
    def columns(self) -> dict[str, Any]:
        """The names of columns that are not the usual ones."""
        return self.config.columns.model_dump(exclude_defaults=True)

    @property
    def entry(self) -> dict[str, Any]:
        """Axolotl's keys that say where the texts are."""
        if self.cut:
            return {"path": self.data}
        if not is_hub(self.texts.path):
            return {"path": self.data, **self.columns}
        found = hub_dataset(self.texts.path)
        column = {"field_messages" if self.texts.chats else "field": found.column}
        keys = {"path": self.seen(found.name), "name": found.config, "revision": found.revision, "split": found.split}
        return self.columns | {key: value for key, value in (keys | column).items() if value is not None}

    @property
    def skips(self) -> str:
        """``on_unusable`` of the files."""
        refused = any(found is not None and found.refused for found in self.lengths.values())
        limit = self.values["sequence_len"].value
        long = any(found is not None and found.longest > limit for found in self.lengths.values())
        return "skip" if self.texts.unusable or refused or (long and not self.cut) else "raise"

    @property
    def trained_first(self) -> str:
        """The model of the first of two trainings."""
        return "sft-full/merged" if self.memory.adapter else "sft"

    @property
    def launcher(self) -> list[str]:
        """Options of `axolotl train` on this machine."""
        return ["--launcher", "python"] if self.machine.gpus == 0 else []

    @property
    def verifiers(self) -> list[str]:
        """The scorers that verify answers to these prompts."""
        return [domain for domain in VERIFIED_BY if domain in self.texts.domains] if self.texts.verifiable else []

    def template_of(self, model: Model) -> str | None:
        """The file with the chat template that takes the place of a model's, as the folder of the run sees it."""
        given = self.config.chat_templates
        path = given.get(model.name, given.get(model.short))
        return path and self.seen(path)

    def model_files(self, model: Model) -> list[str]:
        """The folder of a model, and the file of its chat template."""
        template = self.template_of(model)
        return [*self.files(self.seen(model.name)), *(self.files(template) if template else [])]

    def files(self, seen: str) -> list[str]:
        """A path that a step reads, where it is one and no name on the hub."""
        # The folder is not there yet, so ".." in a path is taken off by hand.
        place = os.path.normpath(os.path.join(os.path.realpath(self.config.out), seen))
        return [seen] if seen == "pieces.jsonl" or os.path.exists(place) else []


def count_tokens(texts: TextFacts, lengths: Lengths | None) -> float:
    """Return about how many tokens texts have; four bytes each where no tokenizer says more."""
    return texts.n_bytes * (lengths.per_byte if lengths is not None else 0.25)


def make_plan(config: InitConfig) -> Plan:
    """Read models and texts, and decide everything.

    Raises:
        ConfigError: a model cannot be read, or a setting does not fit the others.
        DataError: no text can be used.
    """
    names = short_names([config.target, *config.sources])
    unknown = {*config.facts, *config.chat_templates} - {*names, *names.values()}
    if unknown:
        raise ConfigError(
            f"--facts and --chat-template: expected some of the models {', '.join(names)}, got "
            f"{', '.join(sorted(unknown))}"
        )
    texts = read_texts_facts(config.texts, prompts=config.method in ON_PROMPTS, names=config.columns)
    if config.held_out is not None:
        read_texts_facts(config.held_out, prompts=False)  # raises where it has none
    target, *sources = (_read(name, short, config) for name, short in names.items())
    if config.pad_token is not None:
        target = _with_pad_token(target, config.pad_token)
    machine = this_machine(config.gpus, config.gpu_memory)
    lengths = {model.short: lengths_of(model, texts) for model in (target, *sources)}
    memory = choices.memory(target.facts.parameters, machine, config.adapter, reference=config.method == "fusechat3")
    values = dict(_values(config, target, sources, lengths, machine, memory.adapter, texts.count))
    limit = values["sequence_len"].value
    known = [found for found in lengths.values() if found is not None]
    can_cut = config.method == "fusellm" and texts.chats == 0
    cut = can_cut and any(found.longest > limit for found in known)
    packed = packs(config.method, machine)
    sequences = max(count_tokens(texts, lengths[target.short]) / limit, 1) if packed else texts.count
    batch = choices.batch(sequences, target.facts.parameters, machine, config.batch)
    needs_chats = config.method in ON_PROMPTS or texts.chats > 0
    found = [
        *findings.about_models(target, sources, needs_chats),
        *findings.about_texts(texts, config.method),
        *findings.about_lengths(texts, lengths, [target, *sources], limit, can_cut),
        *findings.about_sizes(target, sources, machine, memory, config.uses_vllm),
        *_about_scoring(config, texts, machine),
    ]
    return Plan(config, target, sources, texts, machine, lengths, memory, batch, values, found, cut)


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
    count: int,
) -> Iterator[tuple[str, Choice]]:
    """Yield the settings that the files repeat."""

    def chosen(name: str, value: Choice) -> tuple[str, Choice]:
        asked = getattr(config, name)
        return name, value if asked is None else Choice(asked, "as asked")

    windows = [model.facts.window for model in (target, *sources)]
    known = [found.longest for found in lengths.values() if found is not None]
    longest = max(known) if len(known) == len(windows) and max(known) else None
    if config.method in ON_PROMPTS or packs(config.method, machine):
        longest = None  # answers are as long as they are, and packed rows are filled
    yield "sequence_len", choices.sequence_len(windows, longest, config.sequence_len)
    yield "attention", choices.attention(target.facts.model_type, machine)
    size, kind, method = target.facts.parameters, target.facts.model_type, config.method
    first = {"fusechat3": "sft", "rounds": "rounds" if config.tuned else "sft"}.get(method, method)
    yield chosen("learning_rate", choices.learning_rate(first, size, kind, adapter))
    yield chosen("epochs", choices.epochs(first, size))
    if method == "fusechat3":
        yield "dpo_loss", choices.preference_loss(kind)[0]
        yield "dpo_beta", choices.preference_loss(kind)[1]
        yield "dpo_learning_rate", choices.learning_rate("dpo", size, kind, adapter)
        return
    yield chosen("lm_loss_weight", choices.OWN_LM_LOSS_WEIGHT if method == "rounds" else choices.LM_LOSS_WEIGHT)
    yield chosen("top_k", choices.ENTRIES)
    yield chosen("rule", choices.rule(method, len(sources)))
    if method == "rounds":
        yield "loss", choices.OWN_LOSS
        yield "prompts_per_round", choices.prompts_per_round(count, config.rounds)
        if first != "rounds":
            yield "round_learning_rate", choices.learning_rate("rounds", size, kind, adapter)
            yield "round_epochs", choices.epochs("rounds", size)
    else:
        yield "fallback", choices.FALLBACK


def packs(method: str, machine: Machine) -> bool:
    """Return whether texts share a row: plain texts on GPUs; on a CPU full rows cost more than they save."""
    return method == "fusellm" and machine.gpus > 0


#: what scores prompts that cannot be verified, if nothing is named: it runs no code of its own
REWARD_PRESET = "skywork-v2-llama-3.1-8b"


def _about_scoring(config: InitConfig, texts: TextFacts, machine: Machine) -> Iterator[Finding]:
    if config.method not in ON_PROMPTS or config.tuned or texts.verifiable == texts.count:
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
