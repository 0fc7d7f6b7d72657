"""The decisions of a plan: small functions from what is known to a value and the reason, which the files repeat.

What was measured is in docs/evidence.md and docs/measurements.md; what the papers published is named as theirs. Every
choice can be made by a flag in place of these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusion_plugins.init.machine import Machine

#: parameters from which on models count as large: the papers' settings are of such models
LARGE = 6.5e9
#: below it, what was measured on small models is nearer than what was published for large ones
SMALL = 3e9
#: below it a model is a toy of a test or a tutorial
TOY = 1e8
#: the papers' sequences, and the sequences of one step
SEQUENCE, BATCH = 2048, 128
#: least steps of an epoch: a small set gets smaller batches
STEPS = 50
#: prompts from which on a round has enough of its own
ROUND_PROMPTS = 1000
#: share of a GPU's memory that weights, gradients and optimizer may take; the rest is for activations and logits
SHARE = 0.7
#: bytes per parameter: bfloat16 weights, gradients and AdamW without DeepSpeed; and frozen weights in 16 and 4 bits
TRAINED, WEIGHTS, WEIGHTS_4BIT = 8, 2, 0.6
#: bytes per parameter that ZeRO divides over the GPUs: gradients, and AdamW's float32 copies
SHARDED = 14
#: bytes per logit while a forward pass is captured
LOGIT_BYTES = 8
_FEWEST_TOKENS, _MOST_TOKENS = 1024, 32_768


@dataclass(frozen=True)
class Choice:
    """A value and why it was chosen, in one line."""

    value: Any
    why: str


def sequence_len(windows: Sequence[int | None], longest: int | None, asked: int | None = None) -> Choice:
    """Return the length of a training row: within all windows.

    Args:
        windows: of the target and the sources, in tokens; None: no limit.
        longest: tokens of the longest text in any tokenizer; None where it is not known.
        asked: by the user.

    Example:
        >>> sequence_len([4096, 1024], longest=5000).value, sequence_len([4096], longest=300).value
        (1024, 320)
    """
    limit = min((window for window in windows if window is not None), default=SEQUENCE)
    if asked is not None:
        return Choice(asked, f"as asked; the smallest window is {limit}")
    most = min(limit, SEQUENCE)
    rounded = None if longest is None else -(-longest // 64) * 64
    if rounded is not None and rounded < most:
        return Choice(rounded, f"the longest text has {longest} tokens; all windows have at least {limit}")
    if most < SEQUENCE:
        return Choice(most, "the smallest window of target and sources")
    return Choice(most, f"the papers' length; all windows have at least {limit}")


#: lambda: docs/evidence.md, FuseLLM by amount of text
LM_LOSS_WEIGHT = Choice(
    0.5,
    "the papers' is 0.9, which gained a sixth to a quarter as much in our small world, at every amount of text "
    "(docs/evidence.md). Try both on a large target",
)
#: what a position without a distribution teaches
FALLBACK = Choice(
    "next_label",
    "with `mask` these positions would count for lambda only; in our experiments next_label was as good or better, "
    "most where a source's tokens are longer than the target's (docs/evidence.md)",
)
#: lambda of rounds
OWN_LM_LOSS_WEIGHT = Choice(0.0, "the target's own answers are no examples to imitate")
#: K of the stores
ENTRIES = Choice(
    64, "with the papers' 10 the gain was smaller in our small world (docs/evidence.md); 10 take a fifth of the disk"
)
#: loss of rounds
OWN_LOSS = Choice("jsd", "half of it is what the sources would have said instead, half what they would not have said")


def rule(method: str, sources: int) -> Choice:
    """Return the fusion rule for that many sources."""
    if method == "rounds" and sources > 1:
        return Choice(
            "fixed_weights", "by cross-entropy, the best source of an own answer is the one that shares its mistakes"
        )
    return Choice("min_ce", "the papers'; the rules differ by less than fusing gains (docs/evidence.md)")


def prompts_per_round(prompts: int, rounds: int) -> Choice:
    """Return how many prompts each round takes: new ones where there are many, else all of them (None)."""
    each = prompts // rounds
    if rounds > 1 and each >= ROUND_PROMPTS:
        return Choice(each, "each round has prompts of its own")
    return Choice(None, "all of them: they are too few to divide")


def human(parameters: float) -> str:
    """Return a number of parameters as people write it.

    Example:
        >>> human(6.74e9), human(7.2e4), human(494e6)
        ('6.7B', '72K', '494M')
    """
    unit, size = next((pair for pair in (("B", 1e9), ("M", 1e6)) if parameters >= pair[1]), ("K", 1e3))
    number = parameters / size
    return f"{number:.1f}{unit}" if number < 10 else f"{number:.0f}{unit}"


@dataclass(frozen=True)
class Memory:
    """How a target fits: full training or an adapter, and which stage of ZeRO.

    Attributes:
        adapter: None, lora or qlora.
        stage: of ZeRO; 0 for none.
        why: in one line.
        fits: False where nothing does.
    """

    adapter: str | None
    stage: int
    why: str
    fits: bool = True


def memory(parameters: float, machine: Machine, adapter: str | None = None, *, reference: bool = False) -> Memory:
    """Return how a target is trained on a machine.

    Args:
        parameters: of the target.
        machine: GPUs and their memory.
        adapter: none, lora or qlora, as asked; None to choose.
        reference: whether a frozen copy of the model is loaded beside it, as for DPO.

    Example:
        >>> memory(7e9, Machine(8, 80e9, True)).stage, memory(70e9, Machine(8, 80e9, True)).adapter
        (2, 'lora')
        >>> memory(1e9, Machine(1, 24e9, True)).adapter, memory(7e9, Machine(1, 24e9, True)).adapter
        (None, 'lora')
    """
    if machine.gpus == 0:
        chosen = adapter if adapter in ("lora", "qlora") else None
        return Memory(chosen, 0, "no GPU: a run on the CPU")
    room, gpus = SHARE * machine.memory, machine.gpus
    size = f"{human(parameters)} parameters on {gpus} x {machine.memory / 1e9:.0f} GB"
    frozen = WEIGHTS * parameters if reference else 0.0
    full = {
        0: TRAINED * parameters + frozen,
        2: (WEIGHTS + SHARDED / gpus) * parameters + frozen,
        3: (WEIGHTS + SHARDED) / gpus * parameters + frozen / gpus,
    }
    if adapter in (None, "none"):
        for stage in (2, 3) if gpus > 1 else (0,):
            if full[stage] <= room:
                return Memory(None, stage, f"{size} need {full[stage] / 1e9:.1f} GB each")
        if adapter == "none":
            return Memory(None, 3 if gpus > 1 else 0, f"{size}: they do not fit", fits=False)
    # An adapter needs no second copy for DPO: without it the model is its own reference.
    needs = (("lora", 0, WEIGHTS), ("lora", 3, WEIGHTS / gpus), ("qlora", 0, WEIGHTS_4BIT))
    for name, stage, each in needs:
        if adapter in (None, name) and each * parameters <= room:
            return Memory(name, stage, f"{size}: weights of {each * parameters / 1e9:.1f} GB each, beside an adapter")
    return Memory(adapter or "qlora", 0, f"{size}: they do not fit", fits=False)


def batch_tokens(parameters: float, vocab_size: int, machine: Machine) -> Choice | None:
    """Return the tokens of one forward pass of a captured source; None where its weights do not fit on one GPU."""
    if machine.gpus == 0:
        return Choice(2048, "on the CPU")
    room = 0.9 * machine.memory - WEIGHTS * parameters
    if room <= 0:
        return None
    tokens = _FEWEST_TOKENS
    while tokens * 2 <= min(0.5 * room / (LOGIT_BYTES * vocab_size), _MOST_TOKENS):
        tokens *= 2
    return Choice(tokens, f"logits of {vocab_size:,} ids, in what {machine.memory / 1e9:.0f} GB leave beside weights")


def tensor_parallel(parameters: float, machine: Machine) -> int | None:
    """Return how many GPUs one copy of a source needs with vLLM: a power of two; None for more than there are."""
    needed = 1
    while WEIGHTS * parameters > SHARE * machine.memory * needed:
        needed *= 2
    return needed if needed <= max(machine.gpus, 1) else None


@dataclass(frozen=True)
class Batch:
    """Sequences of one step: ``micro`` on each of the GPUs, ``steps`` times."""

    micro: int
    accumulate: int
    total: int
    why: str


def batch(sequences: float, parameters: float, machine: Machine, asked: int | None = None) -> Batch:
    """Return how many sequences a step has.

    Example:
        >>> batch(1e6, 7e9, Machine(8, 80e9, True))
        Batch(micro=1, accumulate=16, total=128, why='128 sequences, as in the papers')
    """
    total, why = asked or BATCH, "as asked" if asked else f"{BATCH} sequences, as in the papers"
    if asked is None:
        while total > 8 and sequences / total < STEPS:
            total //= 2
            why = f"about {sequences:,.0f} sequences: smaller batches, for about {STEPS} steps in an epoch"
    ranks = max(machine.gpus, 1)
    micro = 1 if parameters >= LARGE else 2 if parameters >= SMALL else 4
    micro = max(min(micro, total // ranks), 1)
    accumulate = max(total // (micro * ranks), 1)
    return Batch(micro, accumulate, micro * accumulate * ranks, why)


def learning_rate(stage: str, parameters: float, model_type: str, adapter: str | None) -> Choice:
    """Return the learning rate of a stage: fusellm, fusechat, sft, dpo or rounds."""
    if parameters < TOY:
        return Choice(
            {"dpo": 5e-5, "rounds": 1e-3}.get(stage, 2e-3), "of the tutorials' models: this target is as small"
        )
    if adapter:
        return Choice({"dpo": 5e-6, "rounds": 1e-5}.get(stage, 1e-4), "usual for adapters")
    if stage in ("fusellm", "fusechat"):
        return Choice({"fusellm": 1e-5, "fusechat": 5e-6}[stage], "the paper's")
    if stage == "rounds":
        return Choice(1e-6, "small, because the answers are of the target before the round; not measured")
    of_llama = model_type in LLAMA
    if stage == "sft":
        return Choice(5e-6 if of_llama else 2e-6, "FuseChat-3.0's for this family")
    if of_llama:
        return Choice(8e-7 if parameters >= LARGE else 1e-6, "FuseChat-3.0's for Llama targets of this size")
    return Choice(5e-7 if model_type.startswith("gemma") else 3e-7, "FuseChat-3.0's for this family")


def epochs(stage: str, parameters: float) -> Choice:
    """Return the passes over the texts of a stage: fusellm, fusechat, sft or rounds."""
    if stage == "rounds":
        few = Choice(1, "after it the answers are no longer the target's own")
        return Choice(4, "a target of this size needs several") if parameters < TOY else few
    if parameters < TOY:
        return Choice(10, "a target of this size needs many")
    return Choice({"fusellm": 1}.get(stage, 3), "the paper's")


#: targets of this architecture take the length-normalised loss
LLAMA = ("llama", "mllama", "mllama_text_model")


def preference_loss(model_type: str) -> tuple[Choice, Choice]:
    """Return DPO's loss and beta for a target's architecture."""
    if model_type in LLAMA:
        return (
            Choice("sigmoid_norm", "length-normalised DPO, as FuseChat-3.0 trains Llama targets"),
            Choice(10, "the paper's, large because the loss is per token"),
        )
    return Choice("sigmoid", "plain DPO, as FuseChat-3.0 trains other targets"), Choice(0.01, "the paper's")


def attention(model_type: str, machine: Machine) -> Choice:
    """Return axolotl's ``attn_implementation``."""
    if model_type.startswith("gemma2"):
        return Choice("eager", "Gemma-2 caps its attention scores")
    if machine.gpus and machine.flash_attention:
        return Choice("flash_attention_2", "it is installed here")
    return Choice("sdpa", "works everywhere; flash_attention_2 is faster where it is installed")
