"""A real run of rounds, killed at random points: it leaves what an undisturbed run leaves.

`FUSION_KILLS=20 pytest tests/chain/test_rounds_killed.py` kills as often, in a run of two rounds.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import axolotl_runs as runs
import pytest
import tiny
import yaml

from fusion_plugins.store import open_rows, open_store

KILLS = int(os.environ.get("FUSION_KILLS", "3"))
ROUNDS = 1 if KILLS <= 3 else 2
TRAIN = {
    "base_model": "target",
    "plugins": [runs.PLUGIN],
    "datasets": [{"path": "answers", "type": runs.FUSED}],
    "fusion": {"sources": [{"name": "source", "store": "x"}], "loss": "jsd", "lm_loss_weight": 0.0},
    "sequence_len": 96,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 6,
    "save_steps": 2,
    "learning_rate": 0.001,
    "optimizer": "adamw_torch",
    "bf16": False,
    "attn_implementation": "sdpa",
    "dataset_num_proc": 1,
    "output_dir": "x",
}
CONFIG = {
    "target": "target",
    "rounds": ROUNDS,
    "sample": {"prompts": "prompts.jsonl", "n": 2, "max_tokens": 12, "options": {"batch_prompts": 2}},
    "capture": {"top_k": 8, "batch_bytes": 400},
    "sources": [{"name": "source", "model": "source"}],
    "train": {"config": "train.yml", "command": "axolotl train --launcher python"},
}


def _made(folder: Path) -> Path:
    """Write what a run starts from; return the file of the rounds."""
    folder.mkdir()
    tiny.llama_checkpoint(folder / "target", seed=1, tokenizer=tiny.sentencepiece_bpe())
    tiny.llama_checkpoint(folder / "source", seed=2, tokenizer=tiny.byte_level())
    runs.write_rows(folder / "prompts.jsonl", [{"id": f"p{n}", "text": f"How much is {n} plus 4?"} for n in range(10)])
    (folder / "train.yml").write_text(yaml.safe_dump(TRAIN))
    (folder / "rounds.yml").write_text(yaml.safe_dump(CONFIG))
    return folder / "rounds.yml"


def _start(path: Path) -> subprocess.Popen[bytes]:
    program = Path(sys.executable).with_name("fusion")
    environment = os.environ | runs.ENVIRONMENT | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    with (path.parent / "log").open("ab") as log:
        return subprocess.Popen(
            [program, "rounds", "--config", path], stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _kill(path: Path, process: subprocess.Popen[bytes], place: random.Random) -> str:
    """Kill the step that is at work, its runner, or both; return which, by its name."""
    records = [json.loads(file.read_text()) for file in path.parent.glob("rounds/.fusion_run/fusion/*.json")]
    running = [record for record in records if not record["done"] and record["pid"]]
    what = place.choice(["runner", "step", "both"]) if running else "runner"
    if what != "runner":
        for record in running:
            try:
                os.killpg(record["pid"], signal.SIGKILL)
            except ProcessLookupError:
                what = "runner"
    if what != "step" and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    if what == "runner":  # a step that outlives it keeps a second run out
        for record in running:
            while Path(f"/proc/{record['pid']}").exists():
                time.sleep(0.05)
    return what


def _left(folder: Path) -> dict[str, object]:
    """What a run has left: responses, stores and weights of all rounds."""
    left: dict[str, object] = {}
    for place in sorted(folder.glob("rounds/[0-9][0-9]")):
        rows = open_rows(place / "responses")
        left[f"{place.name} responses"] = sorted(json.dumps(row, sort_keys=True, default=str) for row in rows)
        store = open_store(place / "stores" / "source")
        left[f"{place.name} store"] = sorted(
            (record.id, record.text.input_ids.tolist(), record.topk.ids.tolist(), record.topk.logprobs.tolist())
            for record in store
        )
        weights = place / "model" / "model.safetensors"
        left[f"{place.name} weights"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return left


@pytest.mark.slow
def test_rounds_that_are_killed_at_random_points_end_as_undisturbed_ones(tmp_path):
    whole = _made(tmp_path / "whole")
    since = time.monotonic()
    assert _start(whole).wait() == 0, (whole.parent / "log").read_text()[-4000:]
    seconds = time.monotonic() - since
    path, place = _made(tmp_path / "killed"), random.Random(17)
    killed: list[str] = []
    while True:
        process = _start(path)
        try:
            # So late that most runs get somewhere, so early that most are killed.
            status = process.wait(seconds * place.uniform(0.1, 0.7) if len(killed) < KILLS else None)
        except subprocess.TimeoutExpired:
            killed.append(_kill(path, process, place))
            process.wait()
            continue
        if status == 0:
            break
        raise AssertionError((path.parent / "log").read_text()[-4000:])
    (tmp_path / "kills.json").write_text(json.dumps(killed))
    assert killed
    assert len(_left(path.parent)) == 3 * ROUNDS
    assert _left(path.parent) == _left(whole.parent)
