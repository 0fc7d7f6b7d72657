"""Time and memory of the fusion loss, beside a dense target (the published trainer) and beside the cheapest losses.

    python benchmarks/bench_loss.py [--tokens 2048] [--vocabulary 32000] [--hidden 512] [--entries 64]

Each form runs in a process of its own, forward and backward from hidden states through the output layer:

* ``products``: the three products with the output layer's weight alone, by chunks: the lower bound.
* ``plain``: cross-entropy of the labels over all logits, no fusion.
* ``fused CE``: torch's ``linear_cross_entropy`` by chunks, no fusion.
* ``dense``: a dense (B, T, V) target, softmax over all logits, product, sum, and the labels.
* ``chunked``: ``token_losses``: both losses, the output layer runs again in the backward pass.
* ``one pass``: ``weighted_losses``, what training uses for linear output layers; ``one pass jsd`` with another loss.

Times are processor seconds, the median of several steps.

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

from fusion_plugins.core.fusion.losses import token_losses
from fusion_plugins.core.fusion.one_pass import weighted_losses

FORMS = ("products", "plain", "fused CE", "dense", "chunked", "one pass", "one pass jsd")
REPEATS = 5
LM_WEIGHT = 0.5


def products(states, head, chunk):
    """The three matrix products that every loss of a linear output layer needs."""
    with torch.no_grad():
        of_weight = torch.zeros_like(head.weight)
        for start in range(0, states.shape[1], chunk):
            part = states[0, start : start + chunk]
            logits = part @ head.weight.t()
            logits @ head.weight
            of_weight.addmm_(logits.t(), part)


def dense_loss(logits, labels, ids, logprobs):
    """Both losses with a target that is dense over the vocabulary."""
    target = torch.zeros_like(logits).scatter(-1, ids, logprobs.exp())
    own = logits.log_softmax(-1)
    lm = torch.nn.functional.nll_loss(own[0, :-1], labels[0, 1:])
    return LM_WEIGHT * lm + (1 - LM_WEIGHT) * -(target * own).sum(-1).mean()


def make_step(form, options):
    """Return the function that runs one step, and the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    head = torch.nn.Linear(options.hidden, options.vocabulary, bias=False, device=device)
    states = torch.randn(1, options.tokens, options.hidden, device=device, requires_grad=True)
    ids = torch.rand(1, options.tokens, options.vocabulary, device=device).topk(options.entries, -1).indices
    logprobs = torch.randn(ids.shape, device=device).log_softmax(-1)
    labels = torch.randint(0, options.vocabulary, (1, options.tokens), device=device)
    chunk = options.chunk
    by_chunks = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=chunk)

    def loss():
        if form == "plain":
            return torch.nn.functional.cross_entropy(head(states)[0, :-1], labels[0, 1:])
        if form == "fused CE":
            following = labels[0, 1:]
            return torch.nn.functional.linear_cross_entropy(states[0, :-1], head.weight, following, options=by_chunks)
        if form == "dense":
            return dense_loss(head(states), labels, ids, logprobs)
        if form == "chunked":
            found = token_losses(states, head, labels, (ids, logprobs), chunk_size=chunk)
            return (LM_WEIGHT * found.lm + (1 - LM_WEIGHT) * found.fusion) / options.tokens
        kind = "jsd" if form.endswith("jsd") else "ce"
        fused = (ids, logprobs)
        found = weighted_losses(
            states, head.weight, None, labels, fused, lm_weight=LM_WEIGHT, kind=kind, chunk_size=chunk
        )
        return found.total / options.tokens

    def step():
        if form == "products":
            return products(states, head, chunk)
        value = loss()
        value.backward()
        return value.item()

    head.weight.grad = torch.zeros_like(head.weight)
    return step, device


def run(form, options, out):
    """Measure one form; write seconds per step, bytes and the loss as JSON to ``out``."""
    if options.threads:
        torch.set_num_threads(options.threads)
    step, device = make_step(form, options)
    held = peak_bytes(step, device)
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        value = step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.process_time() - start)
    Path(out).write_text(json.dumps({"seconds": sorted(seconds)[REPEATS // 2], "bytes": held, "loss": value}))


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
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--entries", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, GPU: {torch.cuda.is_available()}; {vars(options)}")
    results = {}
    for form in FORMS:
        out = f"/tmp/bench_loss_{os.getpid()}.json"
        process = multiprocessing.get_context("spawn").Process(target=run, args=(form, options, out))
        process.start()
        process.join()
        results[form] = json.loads(Path(out).read_text())
        Path(out).unlink()
    print("form           ms/step   of products   of fused CE   of dense       MiB   of plain   loss")
    for form, found in results.items():
        ratios = [found["seconds"] / results[other]["seconds"] for other in ("products", "fused CE", "dense")]
        value = "" if found["loss"] is None else f"{found['loss']:.6f}"
        print(
            f"{form:13}{found['seconds'] * 1e3:9.0f}{ratios[0]:13.2f}x{ratios[1]:13.2f}x{ratios[2]:10.2f}x"
            f"{found['bytes'] / 2**20:10.0f}{found['bytes'] / results['plain']['bytes']:10.2f}x   {value}"
        )


if __name__ == "__main__":
    main()
