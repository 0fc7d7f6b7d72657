"""Top-k rows of logits with a stated tie rule, in bounded memory."""

import torch
from torch import Tensor

__all__ = ["top_k_rows"]

#: elements of scratch at a time, in float32 and float64: few enough to stay in a CPU's cache
SCRATCH = 1 << 22


def top_k_rows(logits: Tensor, gold: Tensor, k: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k most probable ids of each row, by descending probability, ties by lowest id.

    The normaliser runs over all W logits, in float32; ids from ``vocab_size`` on (padding of the output matrix) are
    never returned.

    Args:
        logits: (N, W) of any float dtype.
        gold: (N,) int64 the token whose log-probability is asked for.
        k: entries per row, at most ``vocab_size``.
        vocab_size: ids that the tokenizer knows.

    Returns:
        ids (N, k) int32, logprobs (N, k) float32 nats, logprobs of ``gold`` (N,) float32; all on the CPU.
    """
    step = max(1, SCRATCH // logits.shape[-1])
    parts = [_top_k(chunk, ids, k, vocab_size) for chunk, ids in zip(logits.split(step), gold.split(step), strict=True)]
    ids, logprobs, gold_logprobs = (torch.cat(part) for part in zip(*parts, strict=True))
    return ids, logprobs, gold_logprobs


def _top_k(logits: Tensor, gold: Tensor, k: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    gold_logprobs = logprobs.gather(-1, gold[:, None])[:, 0]
    # torch.topk leaves the order of ties open. A float32 made a float64 has 29 low bits that are zero: with the id in
    # them, the lower id is the larger of two equal negative numbers, and one topk settles both.
    keys = logprobs[:, :vocab_size].clamp(min=torch.finfo(torch.float32).min).double()
    keys.view(torch.int64).bitwise_or_(torch.arange(vocab_size, device=logits.device))
    ids = keys.topk(min(k, vocab_size), dim=-1).indices
    return ids.to(torch.int32).cpu(), logprobs.gather(-1, ids).cpu(), gold_logprobs.cpu()
