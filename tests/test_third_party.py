"""The example plugin, built, installed into a folder of its own and used by the stock command line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "third_party"

USE = """
import numpy as np
from fusion_plugins.core.fusion.fuse import fuse
from fusion_plugins.core.fusion.types import SparseDistributions
from fusion_plugins.core.preferences.candidates import Candidate
from fusion_plugins.core.preferences.pairs import build_pairs
from fusion_plugins.plugins import lookup

def source(ids, probs):
    probs = np.array(probs, np.float32)
    return SparseDistributions(np.array(ids, np.int32), np.log(probs), 1 - probs.sum(-1))

sources = [source([[1, 2], [3, 4]], [[0.9, 0.05], [0.3, 0.2]]), source([[5, 6], [7, 8]], [[0.5, 0.4], [0.35, 0.1]])]
fused = fuse(sources, [1.0, 2.0], rule=lookup("fusion_rules", "most_confident"), floor=0.34)
assert fused.ids.tolist() == [[1, 2], [7, 8]], fused
assert fuse(sources, [1.0, 2.0], rule=lookup("fusion_rules", "most_confident"), floor=0.5).ids.tolist()[1] == [-1, -1]

# Stores that differ in top_k: `fuse` pads the sources to one K.
narrow, wide = source([[1], [3]], [[0.4], [0.6]]), source([[5, 6, 9], [7, 8, 9]], [[0.5, 0.3, 0.1], [0.4, 0.1, 0.1]])
fused = fuse([narrow, wide], [1.0, 2.0], rule=lookup("fusion_rules", "most_confident"))
assert fused.ids.tolist() == [[5, 6, 9], [3, -1, -1]], fused
assert np.allclose(np.exp(fused.logprobs), [[0.5, 0.3, 0.1], [0.6, 0, 0]])
assert np.allclose(fused.leftover, [0.1, 0.4])

answers = [Candidate("p", "a", i, "?", text, reward) for i, (text, reward) in enumerate(
    [("short", 0.10), ("a very much longer answer", 0.18), ("sharp", 0.14)])]
(pair,) = build_pairs(answers, lookup("pair_rules", "equal_length"))
assert (pair.chosen.response, pair.rejected.response) == ("sharp", "short")
(loose,) = build_pairs(answers, lookup("pair_rules", "equal_length"), options={"tolerance": 1.0})
assert loose.chosen.response == "a very much longer answer"
print("used")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Install the example as a user would, but into a folder that vanishes."""
    folder = tmp_path_factory.mktemp("third_party")
    source = shutil.copytree(EXAMPLE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run = subprocess.run([*command, "--target", str(folder / "site"), str(source)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (folder / "site" / "fusion_example.py").exists()
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder / "site"), str(ROOT)]), "COLUMNS": "200"}


def run(environment, *arguments):
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd="/")


def fusion(environment, *arguments):
    return run(environment, "-c", "import sys; from fusion_plugins.cli import main; sys.exit(main())", *arguments)


def test_installed_example_is_listed(environment):
    listed = fusion(environment, "plugins")
    assert listed.returncode == 0, listed.stderr
    for name in ("most_confident", "equal_length", "contains_reference"):
        assert any(name in line and "fusion_example" in line for line in listed.stdout.splitlines()), listed.stdout
    assert "same_source" in listed.stdout


def test_without_the_example_its_names_are_unknown(environment):
    left_out = run(
        environment | {"FUSION_PLUGINS_LOAD": ""},
        "-c",
        "from fusion_plugins.plugins import get_registry; print('equal_length' in get_registry('pair_rules'))",
    )
    assert left_out.stdout.strip() == "False", left_out.stderr


def test_installed_rules_do_their_work(environment):
    used = run(environment, "-c", USE)
    assert used.stdout.strip() == "used", used.stderr


def test_installed_scorer_scores_a_folder_from_a_settings_file(environment, tmp_path):
    from fusion_plugins.store import RowManifest, RowWriter, open_rows

    columns = dict.fromkeys(("prompt_id", "source", "prompt", "response", "domain", "reference"), "string")
    columns |= {"index": "int64"}
    manifest = RowManifest(stage="responses", columns=columns, key=("prompt_id", "source", "index"))
    with RowWriter(tmp_path / "responses", manifest) as writer:
        for index, response in enumerate(["It is PARIS.", "Lyon", "Paris, of course"]):
            writer.write(
                {"prompt_id": "p", "source": "a", "index": index, "prompt": "Capital?", "response": response,
                 "domain": "trivia", "reference": "Paris"}
            )  # fmt: skip
    settings = tmp_path / "score.yml"
    settings.write_text(
        f"responses: {tmp_path}/responses\nout: {tmp_path}/scored\n"
        "scorers:\n  contains_reference: {ignore_case: false}\n"
    )
    scored = fusion(environment, "score", "-c", str(settings))
    assert scored.returncode == 0, scored.stderr
    assert "33.3% of 3" in scored.stdout
    assert [row["correct"] for row in open_rows(tmp_path / "scored")] == [False, False, True]
