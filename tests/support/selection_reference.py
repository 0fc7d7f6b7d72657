"""Who trains on what, the slow and plain way: loops over rows, as the documentation says it.

Rewards of the made responses are all different, so that no tie has to be broken.
"""

import math
import random
from collections import Counter, defaultdict
from typing import Any

Row = dict[str, Any]
SOURCES = ("near", "also", "far", "other")


def responses(count: int, seed: int = 0) -> list[Row]:
    """Make about so many responses: four sources, five each per prompt, of four domains, some of them unusable."""
    draw = random.Random(seed)
    rows: list[Row] = []
    for number in range(math.ceil(count / (len(SOURCES) * 5))):
        domain = draw.choices(("instruction", "math", "code", "chinese"), (6, 2, 1, 1))[0]
        skill = draw.random()
        for source in SOURCES:
            level = draw.gauss(0, 0.02)
            for index in range(5):
                verified = domain in ("math", "code") and draw.random() < 0.95
                kind = draw.random()
                rows.append(
                    {
                        "prompt_id": f"p{number}",
                        "source": source,
                        "index": index,
                        "prompt": f"Question {number}?",
                        "response": "" if kind < 0.02 else f"{source} says {index if kind < 0.9 else 0}",
                        "domain": domain,
                        "dataset": f"{domain}-{number % 3}",
                        "finish_reason": "length" if 0.5 < kind < 0.53 else "stop",
                        "reward": None if kind > 0.99 else 0.15 + level + draw.gauss(0, 0.025),
                        "correct": draw.random() < skill if verified else None,
                    }
                )
    draw.shuffle(rows)
    return rows[:count]


def counts(rows: list[Row], sft_share: float = 0.4) -> dict[str, Any]:
    """Count what the published rules choose: answers, pairs and prompts of both stages, and what is left out."""
    dropped: Counter[str] = Counter()
    prompts: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        prompts[row["prompt_id"]].append(row)
    best: dict[str, Row] = {}
    pairs: dict[str, tuple[Row, Row]] = {}
    for prompt_id, group in prompts.items():
        usable = _usable(group, dropped)
        verified = any(row["domain"] in ("math", "code") or row["correct"] is not None for row in usable)
        right = [row for row in usable if row["correct"] is True or not verified]
        wrong = [row for row in usable if row["correct"] is False or not verified]
        rewarded = [row for row in right if row["reward"] is not None]
        if len(right) == 1 or rewarded:
            best[prompt_id] = right[0] if len(right) == 1 else max(rewarded, key=lambda row: row["reward"])
        for source in SOURCES:
            better = [row for row in right if row["source"] == source and row["reward"] is not None]
            worse = [row for row in wrong if row["source"] == source and row["reward"] is not None]
            if not better or not worse:
                continue
            chosen, rejected = max(better, key=lambda row: row["reward"]), min(worse, key=lambda row: row["reward"])
            gap = chosen["reward"] - rejected["reward"]
            outside = chosen["domain"] != "code" and not 0.01 - 1e-6 <= gap <= 0.1 + 1e-6
            if chosen is rejected or outside or chosen["response"] == rejected["response"]:
                continue
            if prompt_id not in pairs or pairs[prompt_id][0]["reward"] < chosen["reward"]:
                pairs[prompt_id] = chosen, rejected
    sft, dpo = _divided(prompts, best, pairs, sft_share)
    return {
        "best": Counter(row["source"] for row in best.values()),
        "pairs": Counter(chosen["source"] for chosen, _ in pairs.values()),
        "dropped": dropped,
        "sft": sft,
        "dpo": dpo,
    }


def _divided(
    prompts: dict[str, list[Row]], best: dict[str, Row], pairs: dict[str, tuple[Row, Row]], sft_share: float
) -> tuple[int, int]:
    divided: Counter[tuple[bool, str]] = Counter()
    sft = dpo = 0
    for prompt_id in prompts:
        group = prompts[prompt_id]
        chosen = best.get(prompt_id) or pairs.get(prompt_id, (None,))[0]
        if chosen is not None and prompt_id in pairs and group[0]["domain"] != "chinese":
            divided[chosen["domain"] in ("math", "code"), chosen["dataset"]] += 1
        elif prompt_id in best and group[0]["domain"] in ("chinese", "math", "code"):
            sft += 1
    for (verified, _), number in divided.items():
        # The share as a fraction of tenths: 0.4 in binary is not 4 / 10.
        own = 0 if verified else number * round(sft_share * 10) // 10
        sft, dpo = sft + own, dpo + number - own
    return sft, dpo


def _usable(group: list[Row], dropped: Counter[str]) -> list[Row]:
    kept: list[Row] = []
    # Of equal responses one with a verdict stays, then one with a reward, then the first.
    for row in sorted(group, key=lambda row: (row["correct"] is None, row["reward"] is None, row["index"])):
        if row["finish_reason"] == "length":
            dropped["truncated"] += 1
        elif not row["response"].strip():
            dropped["empty_response"] += 1
        elif any(row["source"] == other["source"] and row["response"] == other["response"] for other in kept):
            dropped["duplicate_response"] += 1
        else:
            kept.append(row)
    return kept
