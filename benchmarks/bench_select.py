"""Speed of choosing who trains on what, with counts equal to a plain reference, and the ratio to it.

    python benchmarks/bench_select.py [--responses 50000]

Both stages choose from one table of scored responses, as the dataset types do: best answers and pairs of all prompts,
and which prompt trains which stage. The reference (tests/support/selection_reference.py) counts with plain loops. Times
are core seconds, the best of several runs, interleaved. Exits 1 when a count differs or the figure is missed.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import selection_reference

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.selection import choose_best, choose_pairs

REACH = 10.0  # core seconds for both stages


def chosen(columns: dict[str, list[Any]]) -> dict[str, Any]:
    """Choose for both stages, with and without the split; return the counts that the reference gives."""
    whole, divided = FusionBlock(sft={}, pairs={}), FusionBlock(sft={}, pairs={}, split={})
    answers, report = choose_best(columns, whole)
    pairs, _ = choose_pairs(columns, whole)
    return {
        "best": Counter(answer.source for answer in answers),
        "pairs": Counter(pair.chosen.source for pair in pairs),
        "dropped": Counter(report["dropped_responses"]),
        "sft": len(choose_best(columns, divided)[0]),
        "dpo": len(choose_pairs(columns, divided)[0]),
    }


def main() -> int:
    """Compare counts, and time both stages of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=50_000)
    count = parser.parse_args().responses
    rows = selection_reference.responses(count)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    equal = chosen(columns) == selection_reference.counts(rows)
    block = FusionBlock(sft={}, pairs={}, split={})
    ours, plain = [], []
    for _ in range(3):
        start = time.process_time()
        choose_best(columns, block)
        choose_pairs(columns, block)
        ours.append(time.process_time() - start)
        start = time.process_time()
        selection_reference.counts(rows)
        plain.append(time.process_time() - start)
    print(
        f"select {count:,} responses for both stages: {min(ours):.2f} s, plain loops {min(plain):.2f} s, "
        f"ratio {min(plain) / min(ours):.2f}x, equal counts: {equal}"
    )
    good = equal and min(ours) <= REACH
    print("reached" if good else "NOT reached")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
