"""Prepared datasets: made anew when anything that changes them changes, with a report that belongs to them."""

import json
import shutil

import pytest
from axolotl_runs import FUSED, config, forget_plugins, prepare, row_folder, scored, train, write_config, write_rows
from filelock import FileLock

import fusion_plugins

BEST = "fusion_plugins.axolotl.best_of_sources"
DPO = "fusion_plugins.multi_source_dpo"


@pytest.fixture
def own(material, run_folder):
    """Settings of a run whose every file belongs to the test, which may change it."""
    shutil.copytree(material.target, run_folder / "base")
    shutil.copytree(material.folder / "texts-digits", run_folder / "store")
    shutil.copytree(material.folder / "texts-target", run_folder / "other-store")
    (run_folder / "data").mkdir()
    lines = material.texts.read_text().splitlines(keepends=True)[:6]
    (run_folder / "data" / "a.jsonl").write_text("".join(lines))
    (run_folder / "template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return config(
        material,
        run_folder,
        base_model=str(run_folder / "base"),
        datasets=[{"path": "json", "data_files": str(run_folder / "data" / "*.jsonl"), "type": FUSED}],
        fusion={"sources": [{"name": "digits", "store": str(run_folder / "store")}]},
        chat_template="jinja",
        chat_template_jinja=str(run_folder / "template.jinja"),
    )


def hashes(settings, folder, *keys):
    """axolotl's hashes of the prepared datasets of a run."""
    from axolotl.cli.config import load_cfg
    from axolotl.utils.data.shared import generate_dataset_hash_from_config

    forget_plugins()
    cfg = load_cfg(str(write_config(settings, folder)))
    return [generate_dataset_hash_from_config(cfg, cfg[key], "tokenizer") for key in keys or ("datasets",)]


def append(path, text):
    path.write_text(path.read_text() + text)


def swap_stores(folder):
    shutil.rmtree(folder / "store")
    (folder / "other-store").rename(folder / "store")


def add_token(folder):
    path = folder / "base" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": {"x": "<unk>"}}))


CHANGED = {
    "content of the template's file": lambda folder: append(folder / "template.jinja", " "),
    "content of a data file": lambda folder: append(folder / "data" / "a.jsonl", "\n"),
    "another data file": lambda folder: (folder / "data" / "b.jsonl").write_text(""),
    "content of a store": swap_stores,
    "tokenizer_config.json": add_token,
    "a template beside the tokenizer": lambda folder: (folder / "base" / "chat_template.jinja").write_text("x"),
    "a vocabulary file": lambda folder: (folder / "base" / "tokenizer.model").write_bytes(b"\0"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_another_content_of_a_file_is_another_dataset(own, run_folder, change):
    before = hashes(own, run_folder)
    assert hashes(own, run_folder) == before
    CHANGED[change](run_folder)
    assert hashes(own, run_folder) != before


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": ["<new>"]},
        {"special_tokens": {"pad_token": "</s>"}},
        {"added_tokens_overrides": {3: "<other>"}},
        {"tokenizer_use_fast": True},
        {"tokenizer_legacy": True},
        {"seed": 8},
        {"shuffle_merged_datasets": False},
        {"excess_length_strategy": "raise"},
        {"min_sample_len": 5},
        {"chat_template": "chatml"},
        {"chat_template_kwargs": {"thinking": False}},
        {"fusion": {"rule": "avg_ce"}},
        {"fusion": {"top_k": "none"}},
        {"fusion": {"projection": {"max_distance": 1}}},
    ],
    ids=lambda change: json.dumps(change),
)
def test_another_setting_of_the_rows_is_another_dataset(own, run_folder, change):
    fusion = own["fusion"] | change.get("fusion", {})
    assert hashes(own | change | {"fusion": fusion}, run_folder) != hashes(own, run_folder)


def test_another_target_with_the_same_tokenizer_is_another_dataset(own, run_folder):
    """Its name tells which answers are its own, and those are read in another way."""
    shutil.copytree(run_folder / "base", run_folder / "other")
    own = own | {"tokenizer_config": str(run_folder / "base")}
    assert hashes(own | {"base_model": str(run_folder / "other")}, run_folder) != hashes(own, run_folder)


def test_another_version_is_another_dataset_and_what_only_trains_is_not(own, run_folder, monkeypatch):
    before = hashes(own, run_folder)
    training = {"learning_rate": 0.5, "output_dir": str(run_folder / "elsewhere"), "micro_batch_size": 1}
    losses = {"loss": "kl", "lm_loss_weight": 0.2, "lm_loss_schedule": "rise", "temperature": 2}
    assert hashes(own | training | {"fusion": own["fusion"] | losses}, run_folder) == before
    monkeypatch.setattr(fusion_plugins, "__version__", "0.0.1")
    assert hashes(own, run_folder) != before


def test_the_code_of_a_registered_rule_is_part_of_the_dataset(own, run_folder, monkeypatch):
    import sys

    from fusion_plugins import plugins

    code = run_folder / "their_rules.py"
    code.write_text("def mine(*args):\n    return 1\n")
    monkeypatch.syspath_prepend(str(run_folder))
    import their_rules

    known = plugins._shared_registry("fusion_rules")
    monkeypatch.setitem(known, "mine", their_rules.mine)
    settings = own | {"fusion": own["fusion"] | {"rule": "mine"}}
    before = hashes(settings, run_folder)
    append(code, "# another rule\n")
    assert hashes(settings, run_folder) != before
    del sys.modules["their_rules"]


@pytest.mark.parametrize("rl", [None, "dpo", "ipo", "simpo", "orpo"])
def test_every_kind_of_run_keeps_the_hash_for_training_and_test_datasets(material, run_folder, rl):
    path = write_rows(run_folder / "scored.jsonl", scored(3))
    kind = DPO if rl else BEST
    both = {key: [{"path": str(path), "type": kind}] for key in ("datasets", "test_datasets")}
    fusion = {"sources": [], "pairs": {}, "sft": {}}
    settings = config(material, run_folder, fusion=fusion, rl=rl, **both) | {"val_set_size": 0}
    settings |= {"simpo_gamma": 0.5} if rl == "simpo" else {}
    before = hashes(settings, run_folder, "datasets", "test_datasets")
    assert before[0] != before[1], "rows for training and rows for evaluation are prepared apart"
    append(path, "\n")
    after = hashes(settings, run_folder, "datasets", "test_datasets")
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_a_changed_template_changes_the_rows(material, run_folder):
    template = run_folder / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}")
    path = row_folder(run_folder / "scored", scored(3))
    settings = config(
        material,
        run_folder,
        datasets=[{"path": str(path), "type": BEST}],
        fusion={"sources": [], "sft": {}},
        chat_template="jinja",
        chat_template_jinja=str(template),
    )
    _, before = prepare(settings, run_folder)
    before = before.to_dict()
    template.write_text(template.read_text().replace(": ", "> "))
    _, after = prepare(settings, run_folder)
    assert after.to_dict() != before


def test_a_report_belongs_to_its_dataset_and_reaches_every_run_that_uses_it(material, run_folder):
    both = {key: [{"path": str(material.texts), "type": FUSED}] for key in ("datasets", "test_datasets")}
    settings = config(material, run_folder, **both) | {"val_set_size": 0}
    prepare(settings, run_folder)
    reports = json.loads((run_folder / "model" / "fusion_report.json").read_text())
    assert list(reports) == [str(material.texts), f"{material.texts} (test_datasets)"]
    assert [report["texts"] for report in reports.values()] == [24, 24]
    train(settings | {"output_dir": str(run_folder / "other"), "max_steps": 1}, run_folder)
    assert json.loads((run_folder / "other" / "fusion_report.json").read_text()) == reports
    # Another run of another dataset does not take over what its folder held.
    few = write_rows(
        run_folder / "few.jsonl", [json.loads(line) for line in material.texts.read_text().splitlines()[:4]]
    )
    alone = config(material, run_folder, datasets=[{"path": str(few), "type": FUSED}])
    prepare(alone, run_folder)
    reports = json.loads((run_folder / "model" / "fusion_report.json").read_text())
    assert {name: report["texts"] for name, report in reports.items()} == {str(few): 4}


def test_one_file_under_several_entries_has_a_report_for_each(material, run_folder):
    data = [{"path": str(material.texts), "type": FUSED, "split": split} for split in ("train[:5]", "train[5:]")]
    prepare(config(material, run_folder, datasets=data), run_folder)
    reports = json.loads((run_folder / "model" / "fusion_report.json").read_text())
    assert {name.rpartition("/")[2]: report["texts"] for name, report in reports.items()} == {
        "texts.jsonl (train[:5])": 5,
        "texts.jsonl (train[5:])": 19,
    }


def test_reports_of_responses_and_pairs_reach_other_runs_too(material, run_folder):
    path = row_folder(run_folder / "scored", scored())
    fusion = {"sources": [], "pairs": {}, "sft": {}}
    sft = config(material, run_folder, datasets=[{"path": str(path), "type": BEST}], fusion=fusion, max_steps=1)
    prepare(sft, run_folder)
    train(sft | {"output_dir": str(run_folder / "sft")}, run_folder)
    assert json.loads((run_folder / "sft" / "fusion_sft.json").read_text())["by_source"] == {"far": 10}
    both = {key: [{"path": str(path), "type": DPO, "split": "train"}] for key in ("datasets", "test_datasets")}
    dpo = config(material, run_folder, fusion=fusion, max_steps=1, rl="dpo", **both) | {"val_set_size": 0}
    prepare(dpo, run_folder)
    train(dpo | {"output_dir": str(run_folder / "dpo")}, run_folder)
    reports = json.loads((run_folder / "dpo" / "fusion_pairs.json").read_text())
    assert [report["pairs"] for report in reports.values()] == [10, 10]


def cut_rows(folder):
    rows = next(folder.glob("data-*.arrow"))
    rows.write_bytes(rows.read_bytes()[:-40])


LEFT = {
    "rows without a description": lambda folder: [
        (folder / name).unlink() for name in ("state.json", "dataset_info.json")
    ],
    "an unfinished description": lambda folder: (folder / "dataset_info.json").write_text('{"features": '),
    "an empty state": lambda folder: (folder / "state.json").write_text(""),
    "unfinished rows": cut_rows,
    "no rows": lambda folder: next(folder.glob("data-*.arrow")).unlink(),
}


def test_what_a_stopped_run_left_is_prepared_again(material, run_folder, caplog):
    few = write_rows(
        run_folder / "few.jsonl", [json.loads(line) for line in material.texts.read_text().splitlines()[:4]]
    )
    settings = config(material, run_folder, datasets=[{"path": str(few), "type": FUSED}])
    _, rows = prepare(settings, run_folder)
    whole = rows.to_dict()
    (folder,) = [path for path in (run_folder / "prepared").iterdir() if path.is_dir()]
    # A killed run also leaves these of axolotl's.
    (run_folder / "prepared" / "datasets_ready.flag").touch()
    (run_folder / "prepared" / "process_counter.txt").write_text("1")
    for left, leave in LEFT.items():
        leave(folder)
        assert prepare(settings, run_folder)[1].to_dict() == whole, left
    assert caplog.text.count("left by a run that was stopped; it is removed") == len(LEFT)


def test_nothing_else_is_removed(material, run_folder):
    from fusion_plugins.axolotl.prepared import remove_leftovers

    cfg = {"dataset_prepared_path": str(run_folder / "prepared")}
    remove_leftovers(cfg)
    half = run_folder / "prepared" / ("0" * 32)
    half.mkdir(parents=True)
    (half / "state.json").write_text("{")
    notes = run_folder / "prepared" / ("1" * 32)
    shutil.copytree(half, notes)
    (notes / "notes.txt").write_text("mine")
    shutil.copytree(half, run_folder / "prepared" / "named by a person")
    with FileLock(str(run_folder / "prepared" / "datasets_prep.lock")):
        remove_leftovers(cfg)
        assert half.exists(), "another run is writing it"
    remove_leftovers(cfg)
    assert not half.exists()
    assert (notes / "state.json").exists()
    assert (run_folder / "prepared" / "named by a person" / "state.json").exists()
