"""The world: texts, tokenizers and models that fusion is given, each made by a stage, and the checks of it."""

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from fusion_lab import ROOT
from fusion_lab.problems import Problem, make_problems

__all__ = [
    *("DOMAINS", "MODELS", "SOURCES", "TWINS", "Lab", "Stage", "check_model", "measure_model", "model", "read_rows"),
    *("stages", "store", "train_model", "write_corpus", "write_data", "write_rows"),
]

MODELS = ("target", "numbers", "digits", "docs")
SOURCES = ("numbers", "digits", "docs")
DOMAINS = ("sums", "docs")
#: sources of the target's architecture: with its own tokenizer, and with the same vocabulary but every digit alone
TWINS = ("same", "split")
#: sources that are not made here but fetched, by `make real-assets`
FETCHED = {"smollm2": ROOT / ".cache" / "real" / "smollm2"}
#: model -> domain -> share of its training batches
SHARES = {
    "target": {"sums": 0.5, "docs": 0.5},
    "numbers": {"sums": 0.85, "docs": 0.15},
    "digits": {"sums": 0.85, "docs": 0.15},
    "docs": {"sums": 0.15, "docs": 0.85},
    "same": {"sums": 1.0},
    "split": {"sums": 1.0},
}
#: texts that a tokenizer is trained on
TOKENIZER_TEXTS = 3000
#: what makes the world one in which the questions can be asked
SOURCES_AT_LEAST, TARGET_AT_MOST = 0.8, 0.3
#: seeds of the problems of each split
SEEDS = {"heldout": 1, "validation": 2, "common": 3, "pretrain": 4}


@dataclass(frozen=True)
class Lab:
    """Where everything is, and how large.

    Attributes:
        size: a name of ``sizes.yml``.
        out: folder of everything that is made.
    """

    size: str
    out: Path

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return the settings of the size."""
        sizes: dict[str, Any] = yaml.safe_load((ROOT / "lab" / "sizes.yml").read_text())
        return sizes[self.size]

    @property
    def folder(self) -> Path:
        """The folder of this size."""
        return self.out / self.size

    def data(self, name: str) -> Path:
        """A file of rows."""
        return self.folder / "world" / "data" / f"{name}.jsonl"

    def model(self, name: str) -> Path:
        """The folder of a model of the world, or of one that was fetched."""
        return FETCHED.get(name) or self.folder / "world" / "models" / name

    def store(self, source: str, texts: str = "common") -> Path:
        """The folder of a store."""
        return self.folder / "stores" / texts / source

    def amount(self, name: str) -> int:
        """Texts, and problems, of an amount."""
        return int(self.settings["amounts"][name])

    def problems(self, split: str) -> list[Problem]:
        """Return the problems of a split; no question is in two of them."""
        counts = {
            "heldout": self.settings["heldout_problems"],
            "validation": self.settings["validation_problems"],
            "common": max(self.settings["amounts"].values()),
            "pretrain": self.settings["pretrain_problems"],
        }
        taken: set[str] = set()
        for name, seed in SEEDS.items():
            problems = make_problems(counts[name], seed, taken=taken)
            if name == split:
                return problems
            taken |= {problem.question for problem in problems}
        raise KeyError(split)


@dataclass(frozen=True)
class Stage:
    """Something that cells need, made once.

    Attributes:
        name: unique.
        run: called with a :class:`~fusion_lab.runner.Work`.
        needs: stages before it.
        facts: whatever else decides the result.
    """

    name: str
    run: Any
    needs: tuple[str, ...] = ()
    facts: Any = None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def stages(lab: Lab) -> dict[str, Stage]:
    """Return the stages of the world by name: ``data``, ``model:NAME`` and ``world``."""
    settings = lab.settings
    texts = {key: settings[key] for key in settings if key.endswith(("_bytes", "_problems"))} | settings["amounts"]
    found = [Stage("data", partial(_make_data, lab), facts=texts)]
    found += [model(lab, name) for name in MODELS]
    found.append(Stage("world", partial(_measure_world, lab), tuple(f"model:{name}" for name in MODELS)))
    return {stage.name: stage for stage in found}


def model(lab: Lab, name: str) -> Stage:
    """Return the stage that trains a model; a twin needs the target, whose tokenizer it takes."""
    facts = [lab.settings["models"][name], lab.settings["batch"], SHARES[name]]
    needs = ("data", "model:target") if name in TWINS else ("data",)
    return Stage(f"model:{name}", partial(_make_model, lab, name), needs, facts)


def store(lab: Lab, source: str, texts: str = "common", top_k: str = "64", needs: tuple[str, ...] = ()) -> Stage:
    """Return the stage that captures a model of the world on a file of rows."""

    def run(work: Any) -> None:
        work.command(
            *("fusion", "capture", "--texts", str(lab.data(texts)), "--model", str(lab.model(source))),
            *("--out", str(lab.store(source, texts)), "--top-k", top_k),
        )

    needs = ("data" if source in FETCHED else f"model:{source}", *needs)
    return Stage(f"store:{texts}:{source}", run, needs, {"top_k": top_k, "texts": texts})


def _pieces(text: str, limit: int) -> list[str]:
    """Cut a text at spaces into pieces of at most ``limit`` bytes; those of less than a third of it go."""
    pieces, current = [], ""
    for word in text.split(" "):
        joined = f"{current} {word}" if current else word
        if len(joined.encode()) <= limit:
            current = joined
        else:
            pieces.append(current)
            current = word
    return [piece.strip() for piece in [*pieces, current] if limit / 3 <= len(piece.strip().encode()) <= limit]


def _make_data(lab: Lab, work: Any) -> None:
    figures, found = work.call(write_data, lab)
    work.record("data", **figures)
    work.record("versions", **found)


def write_data(lab: Lab) -> tuple[dict[str, Any], dict[str, str]]:
    """Write one file per split: rows of documentation and rows of problems, with ids that say which.

    Returns:
        The digest of all rows with the texts per split, and the versions of the packages that these are from.
    """
    from fusion_lab.texts import harvest, versions

    settings = lab.settings
    budgets = {split: settings[f"{split}_bytes"] for split in ("pretrain", "common", "heldout")}
    budgets["heldout"] *= 2  # validation and test
    docs = {split: _texts(texts, settings["text_bytes"]) for split, texts in harvest(budgets).items()}
    # By halves, so that pieces of one file are not on both sides.
    middle = len(docs["heldout"]) // 2
    docs["validation"], docs["heldout"] = docs["heldout"][:middle], docs["heldout"][middle:]
    # No more than is used, from all over the files: every source reads all of the common rows.
    docs["validation"] = _spread(docs["validation"], settings["validation_problems"])
    docs["common"] = _spread(docs["common"], max(settings["amounts"].values()))
    digest = hashlib.sha256()
    for split in SEEDS:
        rows = [{"id": f"docs-{split}-{n}", "domain": "docs", "text": text} for n, text in enumerate(docs[split])]
        rows += [
            {"id": f"sums-{split}-{n}", "domain": "sums", "messages": problem.messages(), "gold": problem.gold}
            for n, problem in enumerate(lab.problems(split))
        ]
        write_rows(lab.data(split), rows)
        if split == "common":  # a source that is slow reads the documentation alone
            write_rows(lab.data("common-docs"), [row for row in rows if row["domain"] == "docs"])
        digest.update(lab.data(split).read_bytes())
    return {"sha256": digest.hexdigest(), **{split: len(docs[split]) for split in docs}}, versions()


def write_corpus(lab: Lab, folder: Path, amount: str, seed: int, domains: tuple[str, ...] = DOMAINS) -> dict[str, Path]:
    """Write a sample of the common rows, one file per domain; the seed decides which rows."""
    rows = read_rows(lab.data("common"))
    rng, files = random.Random(seed), {}
    for domain in domains:
        pool = [row for row in rows if row["domain"] == domain]
        rng.shuffle(pool)  # the larger amounts of a seed hold its smaller ones
        files[domain] = folder / f"{domain}.jsonl"
        write_rows(files[domain], pool[: lab.amount(amount)])
    return files


def _spread(texts: list[str], count: int) -> list[str]:
    """Return ``count`` of the texts, evenly spread; all where there are no more."""
    return [texts[n * len(texts) // count] for n in range(count)] if len(texts) > count else texts


def _texts(chunks: list[str], limit: int) -> list[str]:
    return list(dict.fromkeys(piece for chunk in chunks for piece in _pieces(chunk, limit)))


def _make_model(lab: Lab, name: str, work: Any) -> None:
    loss = work.call(train_model, lab, name)
    weights = hashlib.sha256((lab.model(name) / "model.safetensors").read_bytes()).hexdigest()
    work.record("loss", nats_per_token=round(loss, 4), sha256=weights)


def train_model(lab: Lab, name: str) -> float:
    """Train a tokenizer and a model, and save both; return the last loss, nats per token."""
    import torch

    from fusion_lab.models import make_model
    from fusion_lab.pretrain import encode, train

    rows = read_rows(lab.data("pretrain"))
    by_domain = {domain: [row for row in rows if row["domain"] == domain] for domain in DOMAINS}
    tokenizer = _tokenizer(lab, name, by_domain)
    settings = lab.settings["models"][name]
    torch.manual_seed(0)
    model = make_model(name, tokenizer, width=settings["width"], layers=settings["layers"])
    examples = {domain: [encode(tokenizer, row) for row in by_domain[domain]] for domain in DOMAINS}
    loss = train(
        model,
        tokenizer.pad_token_id,
        examples,
        shares=SHARES[name],
        steps=settings["steps"],
        batch=lab.settings["batch"],
        seed=0,
    )
    model.save_pretrained(lab.model(name))
    tokenizer.save_pretrained(lab.model(name))
    return loss


def _tokenizer(lab: Lab, name: str, by_domain: dict[str, list[dict[str, Any]]]) -> Any:
    """Train a tokenizer; that of a twin is the target's, with another way of splitting words for `split`."""
    from fusion_lab.models import SPECS, split_digits
    from fusion_lab.vocabularies import train_tokenizer

    if name in TWINS:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(lab.model("target"))
        return split_digits(tokenizer) if name == "split" else tokenizer
    sample = [row for domain in DOMAINS for row in by_domain[domain][:TOKENIZER_TEXTS]]
    texts = [row["text"] if "text" in row else "\n".join(m["content"] for m in row["messages"]) for row in sample]
    return train_tokenizer(texts, SPECS[name])


def _measure_world(lab: Lab, work: Any) -> None:
    """Measure every model on the held-out rows, and refuse a world in which the questions cannot be asked."""
    for name in MODELS:
        figures = work.call(measure_model, lab, lab.model(name))
        work.record(name, **figures)
        check_model(lab, name, figures["chains"])


def check_model(lab: Lab, name: str, chains: float) -> None:
    """Refuse a source of sums that has not mastered them, and a target that has; a quick world has neither.

    Args:
        lab: the world's.
        name: of the model.
        chains: share of the held-out problems that it solves with right sums.

    Raises:
        ValueError: it is not what its name says.
    """
    if not lab.settings["checked"]:
        return
    if name in ("numbers", "digits") and chains < SOURCES_AT_LEAST:
        raise ValueError(f"{name} solves {chains:.1%} with right sums; expected {SOURCES_AT_LEAST:.0%}")
    if name == "target" and chains > TARGET_AT_MOST:
        raise ValueError(f"the target solves {chains:.1%}; expected at most {TARGET_AT_MOST:.0%}")


def measure_model(
    lab: Lab, folder: Path, split: str = "heldout", *, domains: tuple[str, ...] = DOMAINS, solved: bool = True
) -> dict[str, float]:
    """Return bits per byte of each domain and their mean, and how many problems are solved."""
    from fusion_lab.measure import bits_per_byte, load, solve

    model, tokenizer = load(folder)
    rows = read_rows(lab.data(split))
    figures = {
        f"bpb_{domain}": bits_per_byte(model, tokenizer, [row for row in rows if row["domain"] == domain])
        for domain in domains
    }
    figures["bpb"] = sum(figures.values()) / len(domains)
    if solved:
        figures |= asdict(solve(model, tokenizer, lab.problems(split)))
    return figures
