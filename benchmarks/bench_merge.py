"""Time and peak memory of merges, against mergekit's own methods and against one in memory.

    python benchmarks/bench_merge.py [--hidden 1024] [--layers 8] [--tuned 2] [--repeats 3] [--markdown TABLE.md]

Makes a Llama of random weights and fine-tuned copies of it (bfloat16, safetensors) and merges them with every method
through `mergekit.merge.run_merge`, each run in a process that is forked after the imports. Prints the medians of wall
and processor time and the largest resident memory beyond the imports. `linear` gets the same checkpoints, base
included. Inputs are read once before each run, so that all methods find them in the page cache. On a machine that is
busy with other work, compare processor times.
"""

import argparse
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

GRANULARITIES = ("matrix", "row", "element", "module", "layer", "model")


def main() -> None:
    """Run every method and print the table."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        models, parameters = _in_a_fork(_make_models, folder, arguments)
        _import_everything()
        rows = []
        for name, method, settings, how in _cases():
            if arguments.only not in name and name != "linear":
                continue
            config = _config(models, method, settings, arguments.dtype)
            runs = [_run(folder, config, how, arguments.threads) for _ in range(arguments.repeats)]
            rows.append((name, {key: statistics.median(run[key] for run in runs) for key in runs[0]}))
            print(name, rows[-1][1], file=sys.stderr)
    table = _table(rows, arguments, parameters)
    print(table)
    if arguments.markdown:
        Path(arguments.markdown).write_text(table + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--tuned", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", help="mergekit's dtype; 'none' leaves the inputs as they are")
    parser.add_argument("--scratch", default=None, help="folder for the models")
    parser.add_argument("--only", default="", help="run the merges whose name contains this, besides linear")
    parser.add_argument("--markdown", default=None, help="also write the table to this file")
    return parser.parse_args()


def _cases() -> list[tuple[str, str, dict, str]]:
    varm = [(f"varm, {granularity}", "varm", {"granularity": granularity}, "mergekit") for granularity in GRANULARITIES]
    sce = [
        (f"{name}, select {share}", name, {"select_topk": share}, "mergekit")
        for name in ("sce", "fusechat_sce")
        for share in (1.0, 0.1)
    ]
    linear = ("linear", "linear", {"weight": 1.0}, "mergekit")
    return [linear, *varm, ("varm, matrix, in memory", "varm", {}, "memory"), *sce]


def _import_everything() -> None:
    import mergekit.merge
    import transformers.models.llama.modeling_llama  # noqa: F401

    import fusion_plugins.core.merging.sce  # noqa: F401

    assert hasattr(mergekit.merge.run_merge, "__wrapped__"), "fusion_plugins is not installed in this environment"


def _in_a_fork(function, *arguments):
    """Call in a forked process, so that neither its memory nor its threads remain."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def _make_models(folder: Path, arguments: argparse.Namespace) -> tuple[list[str], int]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 7 // 2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(arguments.hidden // 256, 1),
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    paths = []
    for index in range(arguments.tuned + 1):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(base[name] + index * 1e-3 * torch.randn_like(base[name]))
        model.save_pretrained(folder / str(index), max_shard_size="500MB")
        paths.append(str(folder / str(index)))
    return paths, sum(tensor.numel() for tensor in base.values())


def _config(models: list[str], method: str, settings: dict, dtype: str) -> dict:
    config = {"merge_method": method, "models": [{"model": model} for model in models[1:]], "parameters": settings}
    if method == "linear":
        config["models"].append({"model": models[0]})
    else:
        config["base_model"] = models[0]
    return config | ({} if dtype == "none" else {"dtype": dtype, "out_dtype": "bfloat16"})


def _run(folder: Path, config: dict, how: str, threads: int) -> dict:
    out = folder / "merged"
    for model in [*config["models"], {"model": config.get("base_model", config["models"][0]["model"])}]:
        for file in Path(model["model"]).glob("*.safetensors"):
            file.read_bytes()
    result = _in_a_fork(_merge, config, str(out), how, threads)
    for file in out.iterdir():
        file.unlink()
    return result


def _merge(config: dict, out: str, how: str, threads: int) -> dict:
    import torch

    torch.set_num_threads(threads)
    before, wall, processor = _memory("VmRSS"), time.perf_counter(), time.process_time()
    (_merge_in_memory if how == "memory" else _merge_with_mergekit)(config, out)
    return {
        "wall": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
        "memory": _memory("VmHWM") - before,
    }


def _merge_with_mergekit(config: dict, out: str) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(out_shard_size=100_000_000, copy_tokenizer=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(config), out, options)


def _merge_in_memory(config: dict, out: str) -> None:
    from safetensors.torch import load_file, save_file

    from fusion_plugins.core.merging.varm import varm_merge

    def load(model: str) -> dict:
        files = sorted(Path(model).glob("*.safetensors"))
        return {name: tensor.float() for file in files for name, tensor in load_file(file).items()}

    merged = varm_merge(load(config["base_model"]), [load(model["model"]) for model in config["models"]])
    Path(out).mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.bfloat16() for name, tensor in merged.items()}, Path(out) / "model.safetensors")


def _memory(key: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return int(next(line for line in file if line.startswith(key)).split()[1]) / 1024


def _table(rows: list, arguments: argparse.Namespace, parameters: int) -> str:
    first = rows[0][1]
    lines = [
        f"{parameters / 1e6:.0f} M parameters, {arguments.tuned} tuned models and the base in bfloat16, "
        f"`dtype: {arguments.dtype}`, {arguments.threads} thread(s), {platform.machine()}, "
        f"median of {arguments.repeats}; seconds, and MB beyond the imports.",
        "",
        "| merge | wall | processor | of linear | memory | of linear |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in rows:
        lines.append(
            f"| {name} | {run['wall']:.2f} | {run['processor']:.2f} | {run['processor'] / first['processor']:.2f} "
            f"| {run['memory']:.0f} | {run['memory'] / first['memory']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
