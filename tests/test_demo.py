"""The demonstration: its chain, its tables, and its quick form, which is killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "lab"))
sys.path.append(str(Path(__file__).parents[1] / "examples" / "demo"))

from fusion_demo.chain import MODELS, Size, write_chain
from fusion_demo.results import COMPARED, NAMES, write_results

from fusion_plugins.chain.run import plan_chain
from fusion_plugins.chain.settings import load_chain

ROOT = Path(__file__).parents[1]


@pytest.fixture
def chain(tmp_path):
    return load_chain(write_chain(tmp_path / "cpu", Size("cpu", 3, None)))


def config(chain, name):
    return yaml.safe_load((chain.folder / "configs" / f"{name}.yml").read_text())


def test_everything_that_a_step_reads_is_there_or_made_by_another_and_every_model_is_measured(chain):
    plan = plan_chain(chain)  # raises where a step reads what nothing makes
    assert len(plan) == len(chain.steps) == 11 + 3 * 11
    assert "$" not in chain.path.read_text()
    for seed in range(3):
        reads = chain.steps[f"measure-{seed}"].reads
        assert {f"models/{name}-{seed}" for name in MODELS} <= set(reads)
        assert f"scores/{seed}.json" in chain.steps["results"].reads
        assert chain.steps["results"].reads.count("scores/world.json") == 1
    order = [planned.step.name for planned in plan]
    assert order[0] == "data"
    assert order[-1] == "results"


def test_a_step_reads_all_that_its_configuration_names(chain):
    for step in chain.steps.values():
        if step.words[0] not in ("axolotl", "mergekit-yaml"):
            continue
        values = yaml.safe_load((chain.folder / step.words[-3 if step.words[0] == "axolotl" else 1]).read_text())
        named = [values["base_model"], *(model["model"] for model in values.get("models", []))]
        named += [dataset["path"] for dataset in values.get("datasets", [])]
        named += [source["store"] for source in values.get("fusion", {}).get("sources", [])]
        read = [Path(chain.place(path)) for path in step.reads]
        for path in named:
            assert any(Path(chain.place(path)).is_relative_to(each) for each in read), (step.name, path)


def test_runs_of_a_seed_differ_in_what_is_compared_alone(chain):
    clm, fused = config(chain, "clm-1"), config(chain, "fusellm-1")
    own = ("datasets", "plugins", "fusion", "output_dir", "dataset_prepared_path")
    assert {key: clm[key] for key in clm if key not in own} == {key: fused[key] for key in fused if key not in own}
    assert [each["path"] for each in clm["datasets"]] == [each["path"] for each in fused["datasets"]]
    assert clm["seed"] == 1
    pair = config(chain, "pair_docs-1")
    assert [source["name"] for source in pair["fusion"]["sources"]] == ["docs", "target"]
    assert pair["fusion"]["lm_loss_weight"] == fused["fusion"]["lm_loss_weight"] == 0.5
    sft, dpo = config(chain, "sft-2"), config(chain, "dpo-2")
    assert sft["fusion"]["split"] == dpo["fusion"]["split"]
    assert dpo["base_model"] == sft["output_dir"]
    assert config(chain, "sft_all-2")["fusion"]["split"] == {"verified_dpo_share": 0.0}
    merged = config(chain, "merged-0")
    assert (merged["merge_method"], merged["base_model"]) == ("varm", clm["base_model"])


def test_the_same_files_are_written_again_and_another_number_of_seeds_keeps_those_of_a_seed(tmp_path):
    def written(size):
        write_chain(tmp_path / "cpu", size)
        return {path.name: path.read_text() for path in (tmp_path / "cpu").rglob("*.yml")}

    three = written(Size("cpu", 3, None))
    assert written(Size("cpu", 3, None)) == three
    five = written(Size("cpu", 5, None))
    assert {name: five[name] for name in three if name != "fusion.yml"} == {
        name: text for name, text in three.items() if name != "fusion.yml"
    }


def figures(bpb, chains):
    return {
        "bpb_docs": bpb + 1, "bpb_sums": bpb - 1, "bpb": bpb,
        "answers": chains + 0.02, "chains": chains, "luck": 0.05, "constant": 0.074,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """Return a function that makes the results of so many seeds, of figures that are known."""

    def make(seeds: int) -> str:
        (tmp_path / "scores").mkdir()
        (tmp_path / "world" / "data").mkdir(parents=True)
        rows = [{"id": "a", "text": "no problem"}, *({"id": str(number), "gold": "3"} for number in range(500))]
        (tmp_path / "world" / "data" / "heldout.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        world = {"target": figures(1.7, 0.11), "numbers": figures(1.6, 0.974), "digits": figures(1.6, 0.83)}
        world["docs"] = figures(1.1, 0.124)
        (tmp_path / "scores" / "world.json").write_text(json.dumps(world))
        for seed in range(seeds):
            noise = seed / 1000
            found = {name: figures(1.5, 0.2) for name in MODELS}
            found["clm"] = figures(1.55 + noise, 0.1)
            found["fusellm"] = figures(1.53 + 2 * noise, 0.1)
            found["pair_numbers"], found["pair_docs"] = figures(1.58, 0.1), figures(1.50, 0.1)
            found["merged"] = figures(1.52 + noise, 0.1)
            found["sft"], found["dpo"] = figures(1.5, 0.2 + noise), figures(1.5, 0.2 + (-1) ** seed * noise)
            found["sft_all"] = figures(1.5, 0.35 + noise)
            (tmp_path / "scores" / f"{seed}.json").write_text(json.dumps(found))
        records = tmp_path / ".fusion_run" / "fusion"
        records.mkdir(parents=True)
        for name, command, done in (
            ("clm-0", ["axolotl", "train", "configs/clm-0.yml"], True),
            ("clm-1", ["axolotl", "train", "configs/clm-1.yml"], True),
            ("data", ["python", "../step.py", "data"], True),
            ("results", ["python", "../step.py", "results"], False),
        ):
            (records / f"{name}.json").write_text(json.dumps({"command": command, "seconds": 20.4, "done": done}))
        write_results(tmp_path)
        return (tmp_path / "results.md").read_text()

    return make


def row(text, title):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_table_has_chance_luck_and_intervals(results, tmp_path):
    text = results(5)
    assert "Chance: the best constant answer solves 7.4%** of the 500 held-out problems" in text
    # 487 of 500 problems, Wilson's interval
    assert row(text, NAMES["numbers"])[3:] == ["97.4 (95.6 to 98.5)", "99.4 (98.3 to 99.8)", "5.0%"]
    # 1.55, 1.551, ... 1.554: the mean, and t(0.975, 4) times the standard error
    assert row(text, NAMES["clm"])[2] == "1.552 ± 0.002"
    assert row(text, NAMES["sft_all"])[3] == "35.2 ± 0.2"
    models = [line.split(" |")[0].removeprefix("| ") for line in text.partition("\n\n")[0].splitlines()]
    assert models == ["model", "---", *NAMES.values()]
    assert row(text, "`axolotl train`") == ["2", "41"]
    assert "step.py results" not in text
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["seeds"][4]["clm"]["bpb"] == pytest.approx(1.554)
    assert (tmp_path / "results.svg").read_text().startswith("<?xml")


def test_differences_are_paired_judged_and_told_in_words(results):
    text = results(5)
    found = {one.title: row(text, one.title) for one in COMPARED}
    # Paired: the noise of a seed is in both models of it.
    assert found["FuseLLM minus CLM"][2] == "**−0.018 ± 0.002**"
    says = {title: cells[-1] for title, cells in found.items()}
    assert says == {
        "FuseLLM minus CLM": "better",
        "VaRM merge minus the target before": "better",
        "VaRM merge minus the mean of its parents": "better",
        "VaRM merge minus its best parent": "worse",
        "VaRM merge minus one target with all sources": "better",
        "SFT on best answers minus the target before": "better",
        "LN-DPO after it minus SFT": "no difference shown",
        "SFT on all problems minus LN-DPO after half": "better",
    }
    assert found["SFT on best answers minus the target before"][3] == "**+9.2 ± 0.2**"


def test_one_seed_shows_nothing(results):
    text = results(1)
    assert {row(text, one.title)[-1] for one in COMPARED} == {"nothing: one seed"}
    assert row(text, NAMES["clm"])[2] == "1.550 ± ?"


# The quick form, with the real tools


def start(out):
    command = [sys.executable, str(ROOT / "examples" / "demo" / "run.py"), "--out", str(out), "--quick"]
    with (out / "output").open("ab") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)


def records(out):
    paths = (out / "small" / ".fusion_run" / "fusion").glob("*.json")
    return {path.stem: json.loads(path.read_text()) for path in paths}


def wait_until(true, process, out):
    while not true():
        assert process.poll() is None, (out / "output").read_text()[-3000:]
        time.sleep(0.1)


def check_programs(programs, folder):
    """A program that hands its command over behaves as the real one does."""
    script = folder / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "print(os.getcwd(), os.environ['GIVEN'], sys.argv[1:], __name__, 'axolotl' in sys.modules)\n"
        "if sys.argv[1] == 'sleep':\n"
        "    open('pid', 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "sys.exit({'fails': 3, 'says': 'no such thing', 'is killed': None}.get(sys.argv[1], 0))\n"
    )

    def run(*words):
        environment = os.environ | {"GIVEN": "a b"}
        return subprocess.run(
            [programs / "python", script, *words], cwd=folder, env=environment, capture_output=True, text=True
        )

    done = run("is fine", "two words")
    assert done.returncode == 0
    assert done.stdout == f"{folder} a b ['is fine', 'two words'] __main__ True\n"
    assert run("fails").returncode == 3
    done = run("says")
    assert (done.returncode, done.stderr) == (1, "no such thing\n")
    sleeps = subprocess.Popen([programs / "python", script, "sleep"], cwd=folder, env=os.environ | {"GIVEN": ""})
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        time.sleep(0.05)
    pid = int((folder / "pid").read_text())
    sleeps.kill()
    sleeps.wait()
    until = time.monotonic() + 30
    while Path("/proc", str(pid)).exists():
        assert time.monotonic() < until, "the command lives on without its caller"
        time.sleep(0.05)
    refused = subprocess.run(
        [programs / "fusion", "capture", "--top-k", "x"], cwd=folder, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "top_k: Input should be a valid integer" in refused.stderr


@pytest.fixture
def run(tmp_path):
    """Return a function that starts the demonstration; what is at work when the test ends is ended."""
    started = []

    def run_() -> subprocess.Popen:
        started.append(start(tmp_path))
        return started[-1]

    yield run_
    for process in started:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_the_quick_form_goes_on_after_a_kill_and_says_what_came_out(run, tmp_path):
    process = run()
    wait_until(lambda: records(tmp_path).get("fusellm-0", {}).get("pid"), process, tmp_path)
    folder = tmp_path / "programs"
    folder.mkdir()
    check_programs(tmp_path / "small" / "warm" / "bin", folder)
    process.kill()
    process.wait()
    for record in records(tmp_path).values():
        if not record["done"]:  # kill -9 reaches the runner alone; a step that lives on would keep the next run out
            with suppress(ProcessLookupError):
                os.killpg(record["pid"], signal.SIGKILL)
    before = {name: record["started"] for name, record in records(tmp_path).items() if record["done"]}
    assert {"data", "target", "world", "capture-numbers"} <= set(before)
    assert run().wait() == 0, (tmp_path / "output").read_text()[-3000:]
    after = records(tmp_path)
    assert {name: after[name]["started"] for name in before} == before
    assert all(record["done"] for record in after.values())
    text = (tmp_path / "results.md").read_text()
    assert "Chance: the best constant answer" in text
    kept = json.loads((tmp_path / "results.json").read_text())["seeds"][0]
    assert set(kept) >= set(MODELS)
    assert row(text, NAMES["clm"])[2] == f"{kept['clm']['bpb']:.3f} ± ?"
    # With models as small as these, MinCE may choose one source for every text: then a pair is FuseLLM's twin.
    trained = [kept[name]["bpb"] for name in ("target", "clm", "fusellm", "merged", "sft")]
    assert len(set(trained)) == len(trained)
    # The process that ran the commands has ended, so the programs are the real ones.
    alone = subprocess.run([tmp_path / "small" / "warm" / "bin" / "fusion", "--help"], capture_output=True, text=True)
    assert alone.returncode == 0
    assert "capture" in alone.stdout
