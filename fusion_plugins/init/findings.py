"""What cannot work, or should be looked at, before hours are spent on it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fusion_plugins.init import choices
from fusion_plugins.init.machine import Machine
from fusion_plugins.init.models import Model
from fusion_plugins.init.settings import ON_PROMPTS
from fusion_plugins.init.texts import VERIFIED_BY, Lengths, TextFacts, first


@dataclass(frozen=True)
class Finding:
    """One sentence or two about one thing.

    Attributes:
        about: a model, or the texts.
        text: what is the matter, and the cure.
        stops: a run would fail, or do something else than it should.
    """

    about: str
    text: str
    stops: bool = False


def about_models(target: Model, sources: list[Model], chats: bool) -> Iterator[Finding]:
    """Yield what the models themselves are in the way of; ``chats``: every one of them has to render chats."""
    for model in (target, *sources):
        if model.problem:
            yield Finding(
                model.short, f"{model.problem} Every text would be read wrong: use another tokenizer or model.", True
            )
        if chats and not model.facts.chat_template:
            yield Finding(
                model.short,
                "it has no chat template, and the texts are chats: name a file with one, --chat-template "
                f"{model.short}=FILE, or take an instruction-tuned model",
                stops=True,
            )
        if chats and model.facts.reasons:
            cure = (
                "it is written with `enable_thinking: false`, so that it answers at once; remove that to keep reasoning"
                if model.facts.thinking_switch
                else "it cannot be turned off. Reasoning is matched apart from answers (docs/chats.md)"
            )
            yield Finding(model.short, f"its chat template knows reasoning: {cure}")
    if target.facts.pad_token is None:
        yield Finding(
            target.short, "its tokenizer has no token to pad with: name one of its tokens with --pad-token", True
        )


def about_texts(texts: TextFacts, method: str) -> Iterator[Finding]:
    """Yield what is wrong with rows, or missing in them, for a method."""
    if texts.unusable:
        place, reason = next(iter(texts.unusable.items()))
        yield Finding(
            texts.path,
            f"{len(texts.unusable)} rows cannot be used, the first of them {place}: {reason} The files say "
            "`on_unusable: skip`, and every run names what it leaves out",
        )
    if method == "fusechat" and texts.chats < texts.count:
        yield Finding(
            texts.path,
            f"{texts.count - texts.chats} of {texts.count} rows have `text` and no `messages`: they are learnt as "
            "plain texts. FuseChat is for chats",
        )
    if method in ("fusellm", "fusechat") and texts.ends_with_user:
        yield Finding(
            texts.path,
            f"{texts.ends_with_user} of {texts.count} chats end without an answer of the assistant, which is what is "
            "learnt from: add the answers, or use fusechat3, which takes prompts",
            stops=texts.ends_with_user == texts.count,
        )
    if method in ON_PROMPTS:
        for domain, column in VERIFIED_BY.items():
            count = texts.domains.get(domain, 0)
            if count and not texts.verifiable:
                yield Finding(
                    texts.path,
                    f"{count} prompts are of the domain {domain} and none has `{column}`, so no answer can be verified",
                )


def about_lengths(
    texts: TextFacts, lengths: Mapping[str, Lengths | None], models: list[Model], limit: int, can_cut: bool
) -> Iterator[Finding]:
    """Yield which windows are too short for the texts, and which chats a template refuses."""
    for model in models:
        found = lengths[model.short]
        if found is None:
            continue
        window = model.facts.window
        if window is not None and limit > window:
            yield Finding(
                model.short,
                f"its window is {window} tokens, and the sequence length {limit}: lower --sequence-len",
                True,
            )
        shortest = limit if window is None else min(window, limit)
        if found.longest > shortest:
            what = "window" if window is not None and window < limit else "sequence length"
            cure = "`fusion cut` cuts them first" if can_cut else "they are left out and named"
            yield Finding(
                model.short, f"its longest text has {found.longest} tokens, and the {what} is {shortest}: {cure}"
            )
        if found.refused:
            looked = len({text.id for text in (*texts.longest, *texts.spread)})
            reason = next(iter(found.refused.values()))
            yield Finding(
                model.short,
                f"it refuses {len(found.refused)} of {looked} texts that were tried ({first([*found.refused])}): "
                f"{reason}",
                stops=len(found.refused) == looked,
            )


def about_sizes(
    target: Model, sources: list[Model], machine: Machine, memory: choices.Memory, vllm: bool
) -> Iterator[Finding]:
    """Yield what does not fit into the memory of the GPUs."""
    if not memory.fits:
        yield Finding(
            target.short, f"{memory.why}. Use more GPUs or larger ones, a smaller target, or an adapter", True
        )
    for source in sources:
        size = f"{choices.human(source.facts.parameters)} parameters"
        if vllm and choices.tensor_parallel(source.facts.parameters, machine) is None:
            yield Finding(
                source.short, f"{size} do not fit on {machine.gpus} GPUs: capture it on a larger machine", True
            )
        elif not vllm and choices.batch_tokens(source.facts.parameters, source.facts.vocab_size, machine) is None:
            yield Finding(source.short, f"{size} do not fit on one GPU: use --backend vllm, which divides them", True)
        if machine.gpus == 0 and source.facts.parameters > choices.SMALL:
            yield Finding(source.short, f"{size} on a CPU take days: plan for a machine with GPUs (--gpus)")
