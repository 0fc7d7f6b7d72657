"""Smoke tests of an installed wheel, run by the environment's own Python: one line of JSON, check -> what came of it.

    ENVIRONMENT/bin/python tools/install_smoke.py FOLDER CHECK...

``FOLDER`` is empty and gets tiny models and what is made of them. `tools/install_matrix.py` calls this. It imports only
what the wheel brings, until a check needs more.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", AXOLOTL_DO_NOT_TRACK="1", DO_NOT_TRACK="1")
BIN = Path(sys.executable).parent
TEXTS = ["The fox eats a plum.", "7 + 5 = 12", "The crow sings in the barn."]
MERGE = "merge_method: varm\nbase_model: ./base\nmodels: [{model: ./one}, {model: ./two}]\ndtype: float32\n"


def main() -> None:
    """Run the checks that are named."""
    folder, *names = sys.argv[1:]
    os.chdir(folder)
    outcomes = {}
    for name in names:
        try:
            CHECKS[name]()
            outcomes[name] = "passes"
        except Exception as error:  # whatever it is, the table says it
            outcomes[name] = f"fails: {type(error).__name__}: {error}"
    print(json.dumps(outcomes))


def check_imports() -> None:
    """Every public package that needs no host is there, from the wheel, and mergekit's hook waits."""
    import fusion_plugins

    assert "site-packages" in fusion_plugins.__file__, fusion_plugins.__file__
    for name in ("cli", "core", "inputs", "store", "hub", "chain.run", "scoring", "sources"):
        __import__(f"fusion_plugins.{name}")
    assert any(type(finder).__module__ == "fusion_plugins.mergekit._autoload" for finder in sys.meta_path)
    assert not {"torch", "transformers", "mergekit", "axolotl"} & set(sys.modules)


def check_commands() -> None:
    """`fusion` starts and lists commands, registered names and recipes."""
    from importlib.metadata import version

    assert _fusion("--version") == version("fusion-plugins")
    assert "top_k" in _fusion("keys", "capture")
    assert "fusion_rules" in _fusion("plugins")
    assert "fusellm_llama2.yml" in _fusion("recipes")


def check_missing() -> None:
    """A command whose packages are not there names the extra that brings them."""
    Path("texts.jsonl").write_text('{"text": "x"}\n')
    command = [BIN / "fusion", "capture", "--model", "none", "--texts", "texts.jsonl", "--out", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done
    assert "pip install" in done.stderr, done.stderr


def check_capture() -> None:
    """A model of some thousand parameters is captured into a store that verifies."""
    _capture("transformers")


def check_vllm() -> None:
    """The same with vLLM."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_NUM_OF_RESERVED_CPU="0", VLLM_NO_USAGE_STATS="1")
    _capture("vllm")


def check_merge() -> None:
    """Stock `mergekit-yaml` knows VaRM."""
    for seed, name in enumerate(("base", "one", "two")):
        _model(name, seed)
    Path("merge.yml").write_text(MERGE)
    _run("mergekit-yaml", "merge.yml", "merged")
    assert Path("merged/model.safetensors").is_file()
    assert Path("merged/fusion_merge.json").is_file()  # it is our method's own record


def check_axolotl() -> None:
    """Stock axolotl loads the plugin by its name and takes a recipe with its own schema; `axolotl fusion` is there."""
    import yaml
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    from fusion_plugins.recipes import recipe_files

    config = yaml.safe_load(recipe_files()["axolotl_configs/fusellm_llama2.yml"].read_text(encoding="utf-8"))
    config |= {"bf16": False, "tf32": False, "deepspeed": None, "attn_implementation": "sdpa"}
    config["optimizer"] = "adamw_torch"
    cfg = DictDefault(config)
    prepare_plugins(cfg)
    machine = {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 1, "compute_capability": None}
    checked = validate_config(cfg, capabilities=machine, env_capabilities={"torch_version": "2.13.0"})
    assert checked.fusion["sources"]
    assert "capture" in _run("axolotl", "fusion", "--help")


def _capture(backend: str) -> None:
    _model("source", 1)
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = ["--texts", "texts.jsonl", "--out", f"store-{backend}", "--top-k", "4", "--backend", backend]
    if backend == "vllm":
        options += ["--set", "options.engine={enforce_eager: true, gpu_memory_utilization: 0.05, max_num_seqs: 16}"]
    _fusion("capture", "--model", "source", *options)
    _fusion("store", "verify", f"store-{backend}")
    assert json.loads(_fusion("store", "info", f"store-{backend}", "--json"))["rows"] == len(TEXTS)


def _model(name: str, seed: int) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if Path(name).is_dir():
        return
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(wrapped), max_position_embeddings=128, **sizes)
    LlamaForCausalLM(config).save_pretrained(name)
    wrapped.save_pretrained(name)


def _fusion(*words: str) -> str:
    return _run("fusion", *words)


def _run(program: str, *words: str) -> str:
    environment = {**os.environ, "COLUMNS": "200", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    command = [str(BIN / program), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = " ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise RuntimeError(f"{program} {words[0]}: status {done.returncode}: {last}")
    return done.stdout.strip()


CHECKS: dict[str, Callable[[], None]] = {
    "imports": check_imports,
    "commands": check_commands,
    "missing": check_missing,
    "capture": check_capture,
    "merge": check_merge,
    "axolotl": check_axolotl,
    "vllm": check_vllm,
}

if __name__ == "__main__":
    main()
