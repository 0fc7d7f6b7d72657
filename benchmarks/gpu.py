"""What fusion costs on one GPU, beside the plain way: the loss, a whole training step, and capture.

    python benchmarks/gpu.py                                    # all parts; at most five minutes on one H100
    .venv-vllm/bin/python benchmarks/gpu.py --parts capture     # with vLLM, which has an environment of its own
    python benchmarks/gpu.py --tokens 2048 --hidden 512 --vocabulary 32000 --chunk 256      # any shape

Without a GPU the same parts run at a small shape on the CPU, to show that they run; the goals are then not judged
unless the shape is given. What is not installed is left out and named.

Both sides of a ratio take turns in one process. Time is the least of several turns: wall time on a GPU, processor time
on a CPU. Memory is the most that is held at once above what was there before the turn.

Ends with status 1 when a goal is missed.
"""

import argparse
import copy
import dataclasses
import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests" / "support")]

import torch
from bench_loss import peak_bytes

from fusion_plugins.core.fusion.logit_change import LogitChange
from fusion_plugins.core.fusion.one_pass import weighted_losses

CAP = 30.0
LM_WEIGHT = 0.9


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of everything that is measured."""

    tokens: int
    hidden: int
    vocabulary: int
    entries: int
    chunk: int | None
    layers: int
    sequence: int
    sequences: int
    texts: int
    turns: int


#: the loss of an 8B model with Llama-3's vocabulary; the step of a 1B model
LARGE = Shape(8192, 4096, 128_256, 64, None, 16, 2048, 4, 64, 5)
SMALL = Shape(128, 32, 640, 8, 64, 2, 128, 2, 4, 2)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table."""

    part: str
    name: str
    seconds: float
    bytes: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Goal:
    """A ratio, or an amount, and its bound."""

    name: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the value is on the right side of the bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def device() -> str:
    """Where everything runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time on a GPU, processor time of all threads on a CPU."""
    if device() == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(part: str, works: dict[str, Callable[[], object]], tokens: int, turns: int) -> list[Line]:
    """Run all works in turns; memory is measured before, in a run that warms up."""
    held, seconds = {}, {name: [] for name in works}
    for name, work in works.items():
        if device() == "cuda":  # what is compiled in the first run takes memory
            work()
        held[name] = peak_bytes(work, device())
    for _ in range(turns):
        for name, work in works.items():
            seconds[name].append(seconds_of(work))
    return [Line(part, name, min(seconds[name]), held[name], tokens) for name in works]


def loss_part(shape: Shape, notes: list[str]) -> list[Line]:
    """Both losses and their gradients from the last hidden states on, beside cross-entropies without fusion."""
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    torch.manual_seed(0)
    layer = torch.nn.Linear(shape.hidden, shape.vocabulary, bias=False, device=device(), dtype=dtype)
    states = torch.randn(1, shape.tokens, shape.hidden, device=device(), dtype=dtype, requires_grad=True)
    ids = torch.randint(0, shape.vocabulary, (1, shape.tokens, shape.entries), device=device())
    logprobs = torch.randn(ids.shape, device=device()).log_softmax(-1)
    labels = torch.randint(0, shape.vocabulary, (1, shape.tokens), device=device())
    following = labels[0, 1:]
    layer.weight.grad, states.grad = torch.zeros_like(layer.weight), torch.zeros_like(states)

    def plain(change=None):
        logits = layer(states)[0, :-1]
        logits = change(logits) if change else logits
        return torch.nn.functional.cross_entropy(logits.float(), following)

    def fused(weight=layer.weight, hidden=states, **options):
        found = weighted_losses(
            hidden, weight, None, labels, (ids, logprobs), lm_weight=LM_WEIGHT, at_most=shape.tokens - 1, **options
        )
        return found.total / shape.tokens

    chunk = {"chunk_size": shape.chunk}
    forms = {
        "plain cross-entropy": plain,
        "plain cross-entropy, capped": partial(plain, LogitChange(cap=CAP)),
        "fusion from the logits": lambda: fused(None, layer(states), **chunk),
        "fusion": partial(fused, **chunk),
        "fusion, capped": partial(fused, change=LogitChange(cap=CAP), **chunk),
        "fusion, jsd": partial(fused, kind="jsd", **chunk),
    }
    forms |= library_losses(shape, layer, states, following, notes)
    works = {name: lambda form=form: form().backward() for name, form in forms.items()}
    return measure("loss", works, shape.tokens, shape.turns)


def library_losses(shape: Shape, layer, states, following, notes: list[str]) -> dict[str, Callable]:
    """Fused cross-entropies of other packages, as far as they are installed."""
    found = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=shape.chunk or 2048)
        found["torch's linear_cross_entropy"] = lambda: torch.nn.functional.linear_cross_entropy(
            states[0, :-1], layer.weight, following, options=options
        )
    if device() == "cpu":
        notes.append("Liger's and cut-cross-entropy's kernels need a GPU")
        return found
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger's fused linear cross-entropy"] = lambda: liger(layer.weight, states[0, :-1], following)
    except ImportError as error:
        notes.append(f"Liger left out: {error}")
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = lambda: linear_cross_entropy(states[0, :-1], layer.weight, following)
    except ImportError as error:
        notes.append(f"cut-cross-entropy left out: {error}")
    return found


def loss_goals(lines: list[Line]) -> list[Goal]:
    """Fusion against the fastest fused cross-entropy, and against its memory; capped against plain memory."""
    by_name = {line.name: line for line in lines}
    ours = by_name["fusion"]
    others = [line for name, line in by_name.items() if "'s " in name or name.startswith("cut-")]
    fastest = min(others or [by_name["plain cross-entropy"]], key=lambda line: line.seconds)
    goals = [Goal(f"loss / {fastest.name}, time", ours.seconds / fastest.seconds, 1.10)]
    goals += [
        Goal(
            f"{ours.name}{kind} / plain, memory",
            by_name[f"fusion{kind}"].bytes / by_name[f"plain cross-entropy{kind}"].bytes,
            0.5,
        )
        for kind in ("", ", capped")
    ]
    if device() == "cuda":
        goals.append(Goal(f"loss beyond {fastest.name}, GB", (ours.bytes - fastest.bytes) / 1e9, 1.0))
    return goals


def checkpoint(folder: Path, shape: Shape, tokenizer) -> Path:
    """Save a model of the shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hidden = shape.hidden if device() == "cpu" else 2048
    config = LlamaConfig(
        vocab_size=max(shape.vocabulary, len(tokenizer)),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=max(2048, shape.sequence),
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def texts_of(tokenizer, count: int, tokens: int) -> list[str]:
    """Pieces of this interpreter's own source, each of about as many tokens."""
    text = "".join(path.read_text(errors="replace") for path in sorted(Path(inspect.__file__).parent.glob("[a-d]*.py")))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ids *= 1 + count * tokens // len(ids)
    return [tokenizer.decode(ids[tokens * n : tokens * (n + 1)]) for n in range(count)]


def make_trainer(base: Path, texts: Path, store: Path | None, out: Path, shape: Shape):
    """Set up axolotl's own trainer, or ours with a store, as `axolotl train` does."""
    import axolotl_runs as runs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import setup_model_and_trainer

    plugins = [runs.PLUGIN] if store else []
    changes = {
        "base_model": str(base),
        "datasets": [{"path": str(texts), "type": runs.FUSED if store else "completion"}],
        "plugins": plugins,
        "fusion": {
            "sources": [{"name": "source", "store": str(store)}],
            "loss_chunk": shape.chunk,
            "lm_loss_weight": LM_WEIGHT,
            "top_k": None,
        },
        "special_tokens": {"pad_token": "<unk>"},
        "sequence_len": shape.sequence,
        "sample_packing": True,
        "micro_batch_size": shape.sequences,
        "max_steps": 1000,
        "pad_to_sequence_len": True,
        "bf16": device() == "cuda",
        "gradient_checkpointing": device() == "cuda",
    }
    if not store:
        changes["fusion"] = None
        if shape.chunk:
            changes |= {"chunked_cross_entropy": True}
            changes["chunked_cross_entropy_num_chunks"] = max(1, shape.sequence * shape.sequences // shape.chunk)
    if device() == "cuda":
        flags = ("liger_rope", "liger_rms_norm", "liger_glu_activation")
        changes["plugins"] = [*plugins, "axolotl.integrations.liger.LigerPlugin"]
        changes |= dict.fromkeys(flags if store else (*flags, "liger_fused_linear_cross_entropy"), True)
    material = runs.Material(out, base, texts, texts)
    runs.forget_plugins()
    cfg = load_cfg(str(runs.write_config(runs.config(material, out, **changes), out)))
    return setup_model_and_trainer(cfg, load_datasets(cfg=cfg))[0]


def step_of(trainer) -> Callable[[], object]:
    """Return a function that does one whole step of a trainer: forward, backward, optimizer."""
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    if hasattr(trainer, "_new_figures"):  # of ours; as a training begins
        trainer._training_figures = trainer._new_figures()
    batch = next(iter(trainer.get_train_dataloader()))

    def step():
        inputs = {name: value.clone() if torch.is_tensor(value) else value for name, value in batch.items()}
        tokens = (inputs["labels"] != -100).sum()
        trainer.training_step(model, inputs, num_items_in_batch=tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_part(shape: Shape, notes: list[str]) -> list[Line]:
    """A whole training step of real axolotl, with and without fusion, from the same texts."""
    try:
        import axolotl_runs as runs
        import tiny
        from axolotl.train import setup_model_and_trainer  # noqa: F401
    except ImportError as error:
        notes.append(f"training step left out: {error}")
        return []
    tokenizer = tiny.sentencepiece_bpe()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = checkpoint(folder / "base", shape, tokenizer)
        count = 2 * shape.sequences * 4
        pieces = texts_of(tokenizer, count, shape.sequence // 4)
        texts = runs.write_rows(
            folder / "texts.jsonl", [{"id": f"t{n}", "text": text} for n, text in enumerate(pieces)]
        )
        source = tiny.llama_checkpoint(folder / "source", tokenizer=tokenizer, max_position_embeddings=shape.sequence)
        store = runs.capture(texts, source, folder / "store", top_k=shape.entries)
        fused = step_of(make_trainer(base, texts, store, folder / "fused", shape))
        plain = step_of(make_trainer(base, texts, None, folder / "plain", shape))
        works = {"axolotl": plain, "axolotl with fusion": fused}
        return measure("step", works, shape.sequence * shape.sequences, shape.turns)


def step_goals(lines: list[Line]) -> list[Goal]:
    """Fusion against the same step without it, and tokens per second on a GPU."""
    plain, fused = lines
    goals = [Goal("step / axolotl without fusion, time", fused.seconds / plain.seconds, 1.05)]
    if device() == "cuda":
        goals.append(Goal("tokens/s of a step", fused.tokens / fused.seconds, 29_500, at_least=True))
    return goals


def capture_part(shape: Shape, notes: list[str]) -> list[Line]:
    """Capture of the top-k beside the same model's forward pass alone."""
    import tiny

    from fusion_plugins.core.text.token_table import TokenTable
    from fusion_plugins.core.text.tokenize import tokenize_content
    from fusion_plugins.errors import FusionError
    from fusion_plugins.sources.backends.base import SourceSettings, open_source

    tokenizer = tiny.sentencepiece_bpe()
    table = TokenTable.from_tokenizer(tokenizer)
    pieces = texts_of(tokenizer, shape.texts, shape.sequence // 2)
    texts = [tokenize_content(tokenizer, table, text)[0] for text in pieces]
    tokens = sum(len(text.input_ids) for text in texts)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint(Path(folder), shape, tokenizer)
        for backend, prefill in {"transformers": transformers_prefill, "vllm": vllm_prefill}.items():
            try:
                source = open_source(SourceSettings(model=str(model), backend=backend), "capture")
            except (FusionError, ImportError, RuntimeError) as error:
                notes.append(f"capture with {backend} left out: {str(error).splitlines()[0]}")
                continue

            def capture(source=source):
                for _ in source.capture([texts], shape.entries):
                    pass

            works = {f"{backend}: prefill": prefill(source, texts), f"{backend}: capture": capture}
            lines += measure("capture", works, tokens, shape.turns)
            source.close()
    return lines


def transformers_prefill(source, texts) -> Callable[[], object]:
    """Return the forward passes of the same texts, 4,096 tokens each as in capture, without their logits."""
    width = max(len(text.input_ids) for text in texts)
    rows = max(1, 4096 // width)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text.input_ids)] = torch.from_numpy(text.input_ids.astype("int64"))

    @torch.inference_mode()
    def prefill():
        for start in range(0, len(texts), rows):
            source._model(ids[start : start + rows].to(source._model.device), use_cache=False, logits_to_keep=1)

    return prefill


def vllm_prefill(source, texts) -> Callable[[], object]:
    """Return vLLM's own work on the same prompts: one token of each, without log-probabilities."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": text.input_ids.tolist()} for text in texts]
    return lambda: source._llm.generate(copy.deepcopy(prompts), SamplingParams(max_tokens=1), use_tqdm=False)


def capture_goals(lines: list[Line]) -> list[Goal]:
    """Capture against prefill, by backend."""
    return [
        Goal(f"{ours.name} / prefill, tokens/s", plain.seconds / ours.seconds, 0.7, at_least=True)
        for plain, ours in zip(lines[::2], lines[1::2], strict=True)
    ]


PARTS = {
    "loss": (loss_part, loss_goals),
    "step": (step_part, step_goals),
    "capture": (capture_part, capture_goals),
}


def show(lines: list[Line], goals: list[Goal], notes: list[str], judged: bool) -> None:
    """Print the tables."""
    print(f"{'part':8} {'what':38} {'ms':>10} {'tokens/s':>12} {'MiB':>10}")
    for line in lines:
        speed = line.tokens / line.seconds
        print(f"{line.part:8} {line.name:38} {1e3 * line.seconds:10.1f} {speed:12,.0f} {line.bytes / 2**20:10.1f}")
    print()
    for goal in goals:
        verdict = ("met" if goal.met else "MISSED") if judged else "not judged at this shape"
        print(f"{goal.name:60} {goal.value:10.2f}  goal {'>=' if goal.at_least else '<='} {goal.bound:g}: {verdict}")
    for note in notes:
        print(f"note: {note}")


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    preset = LARGE if device() == "cuda" else SMALL
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, help=f"default here: {getattr(preset, field.name)}")
    options = vars(parser.parse_args())
    parts, path = options.pop("parts"), options.pop("json")
    given = {name: value for name, value in options.items() if value is not None}
    shape = dataclasses.replace(preset, **given)
    name = torch.cuda.get_device_name() if device() == "cuda" else f"{os.cpu_count()} CPUs, no GPU"
    load = os.getloadavg()[0]
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, load {load:.1f}; {shape}\n")
    lines, goals, notes = [], [], []
    for part in parts:
        run, judge = PARTS[part]
        found = run(shape, notes)
        lines += found
        goals += judge(found) if found else []
    judged = device() == "cuda" or bool(given)
    show(lines, goals, notes, judged)
    if path:
        numbers = {"lines": [dataclasses.asdict(line) for line in lines], "notes": notes}
        numbers["goals"] = [dataclasses.asdict(goal) | {"met": goal.met} for goal in goals]
        path.write_text(json.dumps(numbers, indent=1))
    return int(judged and not all(goal.met for goal in goals))


if __name__ == "__main__":
    sys.exit(main())
