"""Time and memory of the fusion loss, as ratios to the plain dense form (what the published trainer does).

    python benchmarks/bench_loss.py [--tokens 1024] [--vocabulary 32000] [--hidden 512] [--entries 10]

Each form runs in a process of its own, forward and backward from hidden states through the output layer:

* ``dense``: a dense (B, T, V) target, softmax over all logits, product, sum.
* ``sparse``: ``fusion_loss`` over all logits.
* ``chunked``: ``chunked_fusion_loss``.

Memory is the most that tensors hold at once above what they held before the step (a GPU: the allocator's peak).
"""

import argparse
import json
import multiprocessing
import os
import time
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusion_plugins.core.fusion.losses import chunked_fusion_loss, fusion_loss

FORMS = ("dense", "sparse", "chunked")
REPEATS = 3


def dense_loss(logits, ids, logprobs):
    """Cross-entropy against a target that is dense over the vocabulary."""
    target = torch.zeros_like(logits).scatter(-1, ids, logprobs.exp())
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


def run(form, tokens, vocabulary, hidden, entries, chunk, out):
    """Measure one form; write seconds per step, bytes and the loss as JSON to ``out``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    head = torch.nn.Linear(hidden, vocabulary, bias=False, device=device)
    states = torch.randn(1, tokens, hidden, device=device, requires_grad=True)
    ids = torch.randint(0, vocabulary, (1, tokens, entries), device=device)
    logprobs = torch.randn(1, tokens, entries, device=device).log_softmax(-1)
    mask, rows = torch.ones_like(ids, dtype=torch.bool), torch.ones(1, tokens, dtype=torch.bool, device=device)

    def loss():
        if form == "dense":
            return dense_loss(head(states), ids, logprobs)
        if form == "sparse":
            return fusion_loss(head(states), ids, logprobs, mask, rows)
        return chunked_fusion_loss(states, head, ids, logprobs, mask, rows, chunk_size=chunk)

    head.weight.grad = torch.zeros_like(head.weight)
    held = peak_bytes(lambda: loss().backward(), device)
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        value = loss()
        value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    result = {"seconds": min(seconds[1:]), "bytes": held, "loss": value.item()}
    Path(out).write_text(json.dumps(result))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make and that are still alive; keeps the peak."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation, then look at what it returned."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        """Count a storage once, until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        """Forget a storage."""
        self.alive.discard(key)
        self.now -= size


def peak_bytes(step, device):
    """The most that tensors made by one step hold at once."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        step()
    return live.peak


def main():
    """Measure all forms and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--entries", type=int, default=10)
    parser.add_argument("--chunk", type=int, default=256)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, GPU: {torch.cuda.is_available()}; {vars(options)}")
    results = {}
    for form in FORMS:
        out = f"/tmp/bench_loss_{os.getpid()}_{form}.json"
        arguments = (form, options.tokens, options.vocabulary, options.hidden, options.entries, options.chunk, out)
        process = multiprocessing.get_context("spawn").Process(target=run, args=arguments)
        process.start()
        process.join()
        results[form] = json.loads(Path(out).read_text())
        Path(out).unlink()
    dense = results["dense"]
    print("form      ms/step   of dense              MiB   of dense   loss")
    for form, found in results.items():
        print(
            f"{form:8}{found['seconds'] * 1e3:10.1f}{found['seconds'] / dense['seconds']:10.2f}x"
            f"{found['bytes'] / 2**20:17.0f}{found['bytes'] / dense['bytes']:10.2f}x   {found['loss']:.6f}"
        )


if __name__ == "__main__":
    main()
