"""The steps of a plan: stock commands, what each of them reads and writes, and why it is there."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusion_plugins.init.models import Model

if TYPE_CHECKING:
    from fusion_plugins.init.plan import Plan


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


def steps_of(plan: "Plan") -> Iterator[Step]:
    """Yield the steps of a plan in their order."""
    method = plan.config.method
    if method == "fusechat3":
        yield from _scored(plan)
        yield from _training(plan, "sft", "learn the best answers")
        yield from _training(plan, "dpo", "prefer the better of two answers")
    elif method == "rounds":
        if not plan.config.tuned:
            yield from _scored(plan)
            yield from _training(plan, "sft", "learn the best answers, so that the own ones are worth an opinion")
        yield _rounds(plan)
    else:
        yield from _captures(plan)
        yield from _fused(plan) if method == "fusellm" else _merged(plan)


def _captures(plan: "Plan") -> Iterator[Step]:
    if plan.cut:
        yield _cut(plan)
    for model in plan.captured:
        name = f"capture-{model.short}"
        command, why = ["fusion", "capture", "--config", f"{name}.yml"], f"store what {model.short} says"
        reads = (*plan.files(plan.data), *plan.model_files(model))
        yield Step(name, command, why, reads, (f"stores/{model.short}",), samples=True)
    if plan.config.own:
        stores = [f"stores/{source.short}" for source in plan.sources]
        command = ["fusion", "doctor", *stores, "--target", f"stores/{plan.target.short}", "--out", "doctor"]
        yield Step("doctor", command, "ask whether fusing can help, before any training", writes=("doctor",))


def _cut(plan: "Plan") -> Step:
    names = [plan.seen(model.name) for model in (plan.target, *plan.sources)]
    texts, limit = plan.seen(plan.texts.path), str(plan.values["sequence_len"].value)
    command = ["fusion", "cut", "--texts", texts, "--out", "pieces.jsonl", "--max-length", limit]
    command += [part for name in names for part in ("--tokenizer", name)]
    command += ["--set", "on_unusable=skip"] if plan.skips == "skip" else []
    command += ["--set", f"columns={json.dumps(plan.columns)}"] if plan.columns else []
    why = "cut long texts into pieces that fit every model"
    reads = [path for place in (texts, *names) for path in plan.files(place)]
    return Step("cut", command, why, tuple(reads), ("pieces.jsonl",))


def _fused(plan: "Plan") -> Iterator[Step]:
    yield from _training(plan, "train", "train the target on the fused distributions", plan.captured, "fused")


def _merged(plan: "Plan") -> Iterator[Step]:
    own = [plan.target] if plan.config.own else []
    for source in plan.sources:
        why = f"one copy of the target learns from {source.short}"
        yield from _training(plan, f"train-{source.short}", why, [source, *own])
    copies = tuple(f"train-{source.short}" for source in plan.sources)
    yield Step("merge-check", ["fusion", "merge-check", "merge.yml"], "look for mistakes before the merge", copies)
    cache = ["--lora-merge-cache", "lora-cache"] if plan.memory.adapter else []
    command = ["mergekit-yaml", "merge.yml", "merged", *cache]
    yield Step("merge", command, "merge the copies", copies, ("merged",), ("merge-check",))
    yield _report("merged", "see who contributed what")


def _scored(plan: "Plan") -> Iterator[Step]:
    why = "every source answers every prompt several times"
    reads = plan.files(plan.data)
    reads += [path for source in plan.sources for path in plan.model_files(source)]
    command = ["fusion", "sample", "--config", "sample.yml"]
    yield Step("sample", command, why, tuple(reads), ("responses",), samples=True)
    reward = plan.files(plan.seen(plan.config.reward_model)) if plan.config.reward_model else []
    command = ["fusion", "score", "--config", "score.yml"]
    yield Step("score", command, "score the answers", ("responses", *reward), ("scored",))
    yield _report("scored", "see how good the sources are")


def _rounds(plan: "Plan") -> Step:
    own = plan.model_files(plan.target) if plan.config.tuned else [plan.trained_first, "scored"]
    held_out = plan.files(plan.seen(plan.config.held_out)) if plan.config.held_out else []
    reads = [*own, "train.yml", *plan.files(plan.data), *held_out]
    reads += [path for source in plan.sources for path in plan.model_files(source)]
    why = "the target answers, the sources say how probable that is, the target learns; again and again"
    return Step("rounds", ["fusion", "rounds", "--config", "rounds.yml"], why, tuple(reads), ("rounds",))


def _report(folder: str, why: str) -> Step:
    return Step("report", ["fusion", "report", folder, "--out", "report.html"], why, (folder,), ("report.html",))


def _training(
    plan: "Plan", name: str, why: str, learnt: Sequence[Model] = (), made: str | None = None
) -> Iterator[Step]:
    made = made or name
    reads = [f"stores/{model.short}" for model in learnt]
    reads += plan.files(plan.data) if learnt else ["scored"]
    reads += [plan.trained_first] if name == "dpo" else plan.model_files(plan.target)
    needs = ("doctor",) if learnt and plan.config.own else ()
    yield Step(name, ["axolotl", "train", f"{name}.yml", *plan.launcher], why, tuple(reads), (made,), needs)
    if plan.memory.adapter and plan.config.method != "fusechat":
        # axolotl writes into a folder `merged` of its own choice inside this one.
        folders = ["--lora-model-dir", f"./{made}", "--output-dir", f"./{made}-full"]
        command = ["axolotl", "merge-lora", f"{name}.yml", *folders]
        yield Step(f"{name}-full", command, "put the adapter into the weights", (made,), (f"{made}-full",))
