"""The ten jobs of the soak: what each starts from, its command, and what it leaves in a form that can be compared."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import store_jobs
from store_contents import content, flip, make_store

from fusion_plugins.store import open_rows, open_store


@dataclass
class Material:
    """What the jobs work on, made on first use."""

    folder: Path

    @cached_property
    def model(self) -> Path:
        import source_checks

        return source_checks.checkpoint(self.folder / "model")

    @cached_property
    def texts(self) -> Path:
        import source_checks

        return source_checks.texts(self.folder / "texts.jsonl", repeat=3)

    @cached_property
    def few_texts(self) -> Path:
        import source_checks

        return source_checks.texts(self.folder / "few.jsonl")

    @cached_property
    def prompts(self) -> Path:
        import source_checks

        return source_checks.prompts(self.folder / "prompts.jsonl", 12)

    @cached_property
    def parts(self) -> list[Path]:
        half = store_jobs.N_ITEMS // 2
        ranges = {"part-a": range(half + 2), "part-b": range(half - 2, store_jobs.N_ITEMS)}
        return [make_store(self.folder / name, numbers, finish=False) for name, numbers in ranges.items()]

    @cached_property
    def store(self) -> Path:
        """A store of many small shards."""
        return make_store(self.folder / "store", range(store_jobs.N_ITEMS), finish=False)

    @cached_property
    def damaged(self) -> Path:
        folder = Path(shutil.copytree(self.store, self.folder / "damaged"))
        for number in (3, 7, 11):
            flip(folder / f"shard-{number:06d}.parquet", b"PAR1", 300)
        return folder

    @cached_property
    def responses(self) -> Path:
        from fusion_plugins.store import RowManifest, RowWriter

        columns = {"prompt_id": "string", "source": "string", "index": "int64", "prompt": "json"}
        columns |= {"response": "string", "domain": "string", "reference": "string"}
        manifest = RowManifest(stage="responses", columns=columns, key=("prompt_id", "source", "index"))
        with RowWriter(self.folder / "responses", manifest) as rows:
            for number in range(40):
                row = {"prompt_id": f"p{number // 4}", "source": "a", "index": number % 4, "domain": "math"}
                row |= {"prompt": "How much?", "response": rf"It is \boxed{{{number % 3}}}.", "reference": "1"}
                rows.write(row)
            rows.finish()
        return self.folder / "responses"

    @cached_property
    def merge_config(self) -> Path:
        import merging
        import yaml

        models = merging.make_models(self.folder / "models")
        path = self.folder / "merge.yml"
        path.write_text(yaml.safe_dump(merging.config_of(models, "one", "two", dtype="float32")))
        return path

    @cached_property
    def training(self) -> Any:
        import axolotl_runs

        return axolotl_runs.make_material(self.folder / "training")


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        command: material and the path to write -> the arguments of the command.
        result: that path -> what it holds.
        modules: what its process imports before it is started.
        start: puts there what has to be there before; returns nothing.
        done: text by which a command says that the result is there already.
    """

    command: Callable[[Material, Path], list[str]]
    result: Callable[[Path], Any]
    modules: tuple[str, ...] = ()
    start: Callable[[Material, Path], object] = field(default=lambda material, out: None)
    done: str | None = None


def records_of(out: Path) -> Any:
    import source_checks

    store = open_store(out)
    return store.manifest.complete, source_checks.contents(store)


def rows_of(out: Path) -> Any:
    rows = open_rows(out)
    return rows.manifest.complete, sorted(json.dumps(row, sort_keys=True) for row in rows)


def tables_of(out: Path) -> Any:
    import pyarrow.parquet as pq

    return [pq.read_table(path).to_pylist().__repr__() for path in sorted(out.iterdir())]


def dataset_of(out: Path) -> Any:
    from datasets import load_from_disk

    folders = [path.parent for path in (out / "prepared").glob("*/dataset_info.json")]
    return [list(load_from_disk(str(folder))) for folder in folders]


def tensors_of(out: Path) -> Any:
    import tiny

    digests = {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tiny.tensors_of(out).items()
    }
    return digests, json.loads((out / "fusion_merge.json").read_text())["mean_weights"]


def sample_command(material: Material, out: Path) -> list[str]:
    source = f"{{name: a, model: {material.model}, max_tokens: 3}}"
    path = out.with_name(f"{out.name}.yml")
    path.write_text(f"prompts: {material.prompts}\nout: {out}\nn: 2\nbatch_requests: 4\nsources: [{source}]\n")
    return ["fusion", "sample", "-c", str(path)]


def cut_command(material: Material, out: Path) -> list[str]:
    path = out.with_name(f"{out.name}.yml")
    path.write_text(f"texts: {material.few_texts}\nout: {out}\ntokenizers: [{material.model}]\nmax_length: 24\n")
    return ["fusion", "cut", "-c", str(path)]


def preprocess_command(material: Material, out: Path) -> list[str]:
    import axolotl_runs

    return ["axolotl", "preprocess", str(axolotl_runs.write_config(axolotl_runs.config(material.training, out), out))]


def copied(name: str) -> Callable[[Material, Path], object]:
    return lambda material, out: shutil.copytree(getattr(material, name), out)


TORCH = ("torch", "transformers", "fusion_plugins.cli")
JOBS = {
    "capture": Job(
        lambda material, out: (
            ["fusion", "capture", "--texts", str(material.texts), "--model", str(material.model)]
            + ["--out", str(out), "--top-k", "8", "--set", "batch_bytes=200"]
        ),
        records_of,
        (*TORCH, "fusion_plugins.sources.capture", "fusion_plugins.sources.backends.transformers_local"),
    ),
    "sample": Job(
        sample_command,
        rows_of,
        (*TORCH, "fusion_plugins.sources.sample", "fusion_plugins.sources.backends.transformers_local"),
    ),
    "score": Job(
        lambda material, out: (
            ["fusion", "score", "--responses", str(material.responses), "--out", str(out)]
            + ["--set", "scorers={math: {}}", "--set", "batch_rows=4"]
        ),
        rows_of,
        ("fusion_plugins.cli", "fusion_plugins.scoring.score", "fusion_plugins.scoring.math_scorer"),
    ),
    "merge": Job(
        lambda material, out: ["fusion", "store", "merge", *map(str, material.parts), "--out", str(out)],
        content,
        ("fusion_plugins.cli", "fusion_plugins.store.maintain"),
    ),
    "compact": Job(
        lambda material, out: ["fusion", "store", "compact", str(out)],
        content,
        ("fusion_plugins.cli", "fusion_plugins.store.maintain"),
        copied("store"),
    ),
    "verify": Job(
        lambda material, out: ["fusion", "store", "verify", str(out), "--drop-damaged"],
        content,
        ("fusion_plugins.cli", "fusion_plugins.store.maintain"),
        copied("damaged"),
    ),
    "export": Job(
        lambda material, out: ["fusion", "store", "export", str(material.store), "--out", str(out)],
        tables_of,
        ("fusion_plugins.cli", "fusion_plugins.store.export"),
        done="expected an empty or new folder",
    ),
    "cut": Job(cut_command, Path.read_bytes, (*TORCH, "fusion_plugins.sources.cut")),
    "preprocess": Job(
        preprocess_command,
        dataset_of,
        (
            *TORCH,
            "axolotl.cli.main",
            "axolotl.cli.preprocess",
            "axolotl.common.datasets",
            "fusion_plugins.axolotl.fused",
        ),
        lambda material, out: out.mkdir(),
    ),
    "mergekit-yaml": Job(
        lambda material, out: ["mergekit-yaml", str(material.merge_config), str(out), "--quiet"],
        tensors_of,
        ("torch", "transformers", "mergekit.scripts.run_yaml", "fusion_plugins.mergekit.methods"),
    ),
}
