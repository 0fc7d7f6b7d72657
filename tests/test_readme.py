"""Every command in the README runs, as it stands there.

The workspace has tiny models in folders that are called like the published ones (``meta-llama/Llama-2-7b-hf``), so that
the commands and the recipes need no change. ``make`` and ``pip`` lines are what continuous integration runs; every
``axolotl train`` line names a recipe that ``test_axolotl_recipes`` runs for real on the CPU.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TEXTS = ["def add(a, b):\n    return a + b\n", "Ann has 12 apples and 3 pears.", "Plain prose, and a naïve café."]
SOURCES = {
    "openlm-research/open_llama_7b_v2": tiny.sentencepiece_bpe,
    "mosaicml/mpt-7b": tiny.digit_splitting,
    "meta-llama/Llama-2-7b-hf": tiny.byte_level,
}


def commands():
    """All command lines of the README's shell blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def _runs_here(command):
    return command.startswith(("fusion ", "mergekit-yaml ", "python "))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    for name in ("axolotl_configs", "mergekit_configs", "examples/fusechat3", "examples/tutorial"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "data").mkdir()
    _write_lines(folder / "data" / "corpus.jsonl", [{"text": text} for text in TEXTS])
    for seed, (name, tokenizer) in enumerate(SOURCES.items()):
        tiny.llama_checkpoint(folder / name, seed=seed, tokenizer=tokenizer())
    _make_merge_inputs(folder)
    _make_fusechat3(folder)
    return folder


def _write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _make_merge_inputs(folder):
    """The models of the merge, named as folders: for its card mergekit asks the hub about names without ``./``."""
    path = folder / "mergekit_configs" / "varm.yml"
    config = yaml.safe_load(path.read_text())
    base = tiny.llama_checkpoint(folder / config["base_model"], seed=7)
    for seed, entry in enumerate(config["models"]):
        tiny.llama_checkpoint(folder / entry["model"], seed=seed, base=base, moved=1e-3)
    for entry in (*config["models"], config):
        key = "base_model" if entry is config else "model"
        entry[key] = f"./{entry[key]}"
    path.write_text(yaml.safe_dump(config))


def _make_fusechat3(folder):
    """One prompt per domain, tiny models under the published names, and the backend that is installed here."""
    _write_lines(
        folder / "data" / "fusechat3_prompts.jsonl",
        [
            {"id": "m", "messages": [_user("What is 2 + 3?")], "domain": "math", "reference": "5"},
            {"id": "i", "messages": [_user("Say hello.")], "domain": "instruction"},
        ],
    )
    config = yaml.safe_load((folder / "examples" / "fusechat3" / "score.yml").read_text())
    tiny.reward_checkpoint(folder / config["scorers"]["reward"]["model"])
    path = folder / "examples" / "fusechat3" / "sample.yml"
    config = yaml.safe_load(path.read_text())
    for seed, source in enumerate(config["sources"]):
        tiny.llama_checkpoint(folder / source["model"], seed=seed)
        source |= {"backend": "transformers", "max_tokens": 8, "n": 2}
    path.write_text(yaml.safe_dump(config))


def _user(content):
    return {"role": "user", "content": content}


def _run(command, folder):
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_readme_shows_commands_of_every_tool():
    tools = {command.split()[0] for command in commands()}
    assert tools == {"make", "pip", "python", "fusion", "axolotl", "mergekit-yaml"}


def test_every_make_target_exists():
    targets = {line.partition(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if ":" in line}
    assert {command.split()[1] for command in commands() if command.startswith("make ")} <= targets


def test_every_extra_that_pip_is_told_to_install_exists():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in commands():
        if command.startswith("pip "):
            assert set(re.search(r"\[(.*?)\]", command)[1].split(",")) <= set(extras)


def test_every_training_that_the_readme_shows_is_a_recipe():
    shown = [command.split()[-1] for command in commands() if command.startswith("axolotl ")]
    assert len(shown) >= 5
    assert all((ROOT / path).is_file() and path.startswith("axolotl_configs/") for path in shown)


@pytest.mark.slow
def test_every_command_of_fusion_mergekit_and_python_runs_in_the_order_of_the_readme(workspace):
    shown = [command for command in commands() if _runs_here(command)]
    assert len(shown) >= 10
    for command in shown:
        done = _run(command, workspace)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert (workspace / "merged" / "model.safetensors").exists()
    assert (workspace / "merged" / "fusion_report.html").exists()
    assert (workspace / "doctor" / "doctor.json").exists()
