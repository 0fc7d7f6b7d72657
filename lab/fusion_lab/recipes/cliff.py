"""Twins as sources: the same model with the target's tokenizer, and with every digit a token of its own.

Each way of bringing the second one's distributions to the target is a run of `axolotl train`. What the published code
trains on cannot be said with settings, so it is written down as a store over the target's own tokens.
"""

import random
import sys
from pathlib import Path
from typing import Any

from fusion_lab import ROOT, world
from fusion_lab.recipes import fusellm
from fusion_lab.runner import Cell, Work
from fusion_lab.world import TWINS, Lab, Stage

__all__ = ["needs", "run"]

#: method -> the twin that it learns from, and settings of the `fusion:` block
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "same": ("same", {}),
    "ours": ("split", {}),
    "one_to_many": ("split", {"projection": {"vocabulary_map": "one_to_many"}}),
    "exact": ("split", {"projection": {"vocabulary_map": "exact", "chain": False}}),
    "strict": (
        "split",
        {"alignment": {"method": "offsets_strict"}, "projection": {"vocabulary_map": "exact", "chain": False}},
    ),
}


def needs(lab: Lab, cell: Cell) -> list[Stage]:
    """Return the twins and their stores."""
    if cell["method"] == "clm":
        return []
    return [stage for name in TWINS for stage in (world.model(lab, name), world.store(lab, name))]


def run(lab: Lab, cell: Cell, work: Work) -> None:
    """Train a fixed number of steps and measure the last model."""
    pool = [row for row in world.read_rows(lab.data("common")) if row["domain"] == "sums"]
    rows = random.Random(cell.seed).sample(pool, min(cell["problems"], len(pool)))
    path = work.folder / "corpus" / "sums.jsonl"
    world.write_rows(path, rows)
    steps = max(1, len(rows) * cell["epochs"] // lab.settings["batch"])
    settings = fusellm.config(lab, cell, {"sums": path}, steps) | {"save_strategy": "no", "lr_scheduler": "cosine"}
    del settings["save_steps"], settings["save_total_limit"]
    method = cell["method"]
    if method != "clm":
        name, block = METHODS.get(method, ("published", {}))
        store = lab.store(name)
        if name == "published":
            store = work.folder / "published"
            work.call(_write_published, lab, [row["id"] for row in rows], method.removeprefix("published_"), store)
        source = {"name": name, "store": str(store), "is_target": name != "split"}
        block = {"sources": [source], "lm_loss_weight": cell["lm_loss_weight"], **block}
        settings = fusellm.with_plugin(settings, block)
    work.axolotl("train", settings)
    work.record("heldout", **work.call(_measure, lab, work.folder / "model"))
    fusellm.tidy(work)


def _measure(lab: Lab, folder: Path) -> dict[str, float]:
    return world.measure_model(lab, folder, domains=("sums",))


def _write_published(lab: Lab, ids: list[str], mode: str, out: Path) -> None:
    """Write what FuseLLM's published code trains on as the store of a source with the target's tokenizer."""
    sys.path.append(str(ROOT / "benchmarks"))
    import numpy as np
    from compare_alignment import Side, published_vocabulary
    from published_alignment import PublishedText, PublishedVocabulary, published_rows
    from transformers import AutoTokenizer

    from fusion_plugins.core.fusion.align import dtw_path, path_ranges
    from fusion_plugins.core.fusion.record import build_record
    from fusion_plugins.core.fusion.types import TopK
    from fusion_plugins.store import StoreWriter, open_store

    source, target = (Side.of(name, AutoTokenizer.from_pretrained(lab.model(name))) for name in ("split", "target"))
    split, same = open_store(str(lab.store("split"))), open_store(str(lab.store("same")))
    surfaces = dict(enumerate(source.tokenizer.convert_ids_to_tokens(list(range(len(source.tokenizer))))))
    by_surface = published_vocabulary(source, target, set(surfaces.values())).by_surface
    vocabulary = PublishedVocabulary(surfaces, target.tokenizer.get_vocab(), by_surface, {})
    manifest = same.manifest.model_copy(update={"model": f"published_{mode}", "complete": False, "shards": []})
    with StoreWriter(out, manifest, same.table) as writer:
        for id in ids:
            left, right = split[id], same[id]
            names, wanted = source.surfaces(left.text), target.surfaces(right.text)
            path, _ = dtw_path(names, wanted)
            matched = [list(range(a, b + 1)) for a, b in path_ranges(path, axis=1, size=len(wanted)).tolist()]
            entries = [
                (logprobs[ids >= 0].tolist(), ids[ids >= 0].tolist())
                for logprobs, ids in zip(left.topk.logprobs, left.topk.ids, strict=True)
            ]
            text = PublishedText(
                names,
                wanted,
                right.text.input_ids.tolist(),
                matched,
                [logits for logits, _ in entries],
                [kept for _, kept in entries],
                source.marker,
                target.marker,
            )
            taught_ids = np.full((len(wanted), manifest.top_k), -1, np.int32)
            logprobs = np.full((len(wanted), manifest.top_k), -np.inf, np.float32)
            for t, (logits, kept) in enumerate(published_rows(text, vocabulary, family="fusellm", mode=mode)):
                if kept:
                    values = np.array(logits) - np.logaddexp.reduce(logits)
                    order = np.argsort(-values, kind="stable")
                    taught_ids[t, : len(kept)], logprobs[t, : len(kept)] = np.array(kept)[order], values[order]
            # The cross-entropy of the record plays no part, because there is one source.
            topk = TopK(taught_ids, logprobs, right.topk.token_logprobs)
            writer.write(build_record(id, right.text, topk))
        writer.finish()
