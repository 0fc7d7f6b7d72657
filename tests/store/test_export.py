"""Exports are read by the programs they are made for."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import axolotl_runs
import numpy as np
import pytest
from store_samples import columns_of, manifest, record, table

from fusion_plugins.errors import ConfigError, StoreError
from fusion_plugins.store import RowManifest, RowWriter, StoreWriter, open_store
from fusion_plugins.store.export import export, kd_columns


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with StoreWriter(tmp_path / "store", manifest(), table()) as writer:
        for number in range(5):
            writer.write(record(number))
        writer.finish()
    return tmp_path / "store"


def test_hugging_face_datasets_reads_the_export(store: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    assert export(store, tmp_path / "out") == 5
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 5
    for row, item in zip(rows, open_store(store), strict=True):
        assert row["id"] == item.id
        assert row["spans"] == item.text.spans.tolist()
        for name in ("input_ids", "ends", "exact", "topk_ids"):
            assert row[name] == columns_of(item)[name].tolist()
        for name in ("topk_logprobs", "token_logprobs", "tail"):
            np.testing.assert_array_equal(np.array(row[name], np.float32), columns_of(item)[name])


def test_kd_rows_are_renormalised_masked_and_labelled(store: Path) -> None:
    """Of record 2, row 1 is blank and row 2 half full: the token after row 1 is no label, empty entries are masked."""
    item = open_store(store)["text-0002"]
    row = kd_columns(item)
    held = item.topk.ids >= 0
    assert row["target_mask"].tolist() == held.astype(int).tolist()
    sums = np.where(held, np.exp(row["target_logprobs"].astype(np.float64)), 0).sum(axis=1)
    np.testing.assert_allclose(sums[held.any(axis=1)], 1, rtol=1e-6)
    assert np.isfinite(row["target_logprobs"]).all()
    assert (row["target_token_ids"] >= 0).all()
    assert row["labels"][:4].tolist() == [-100, item.text.input_ids[1], -100, item.text.input_ids[3]]


def test_kd_rows_at_another_temperature_are_the_powers_of_the_probabilities(store: Path) -> None:
    item = open_store(store)["text-0002"]
    p = np.exp(item.topk.logprobs[0].astype(np.float64)) ** 0.5
    np.testing.assert_allclose(np.exp(kd_columns(item, 0.5)["target_logprobs"][0]), p / p.sum(), rtol=1e-5)


def test_wrong_requests_are_refused(store: Path, tmp_path: Path) -> None:
    for wanted, message in [
        ({"format": "other"}, "expected one of datasets, axolotl-kd, got 'other'"),
        ({"temperature": 2.0}, "1.0 for any format but axolotl-kd, got 2.0 for datasets"),
        ({"format": "axolotl-kd", "temperature": 0.0}, "expected a positive number"),
    ]:
        with pytest.raises(ConfigError, match=message):
            export(store, tmp_path / "out", **wanted)  # type: ignore[arg-type]
    export(store, tmp_path / "out")
    with pytest.raises(ConfigError, match="expected an empty or new folder, got .*out"):
        export(store, tmp_path / "out")


def test_an_export_that_is_killed_leaves_nothing_that_looks_whole(store: Path, tmp_path: Path) -> None:
    """The process kills itself where the second of three files is about to be written."""
    script = """
import os, sys
from fusion_plugins.store import export as module
module.FILE_VALUES = 1
real, made = module.write_atomic, []
def write(path, data):
    made.append(path)
    os.kill(os.getpid(), 9) if len(made) == 2 else real(path, data)
module.write_atomic = write
module.export(*sys.argv[1:])
"""
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", script, str(store), str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(out.rglob("*.parquet")) == []
    assert export(store, out) == 5
    assert [path.name for path in out.iterdir()] == ["data-00000.parquet"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


def test_what_is_no_store_or_no_folder_is_named(store: Path, tmp_path: Path) -> None:
    RowWriter(tmp_path / "rows", RowManifest(stage="responses", columns={"a": "string"}, key=("a",))).close()
    with pytest.raises(
        StoreError, match="expected the manifest of a store of log-probabilities, got a folder of responses"
    ):
        export(tmp_path / "rows", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="expected a folder, or a name for a new one: .*file"):
        export(store, tmp_path / "file")


@pytest.mark.slow
def test_axolotl_distils_from_the_export(material: axolotl_runs.Material, run_folder: Path) -> None:
    """Distilled into itself, the loss is known: KL(p / m || p) = -log m for a row whose top k hold the mass m."""
    store = material.folder / "texts-target"
    export(store, run_folder / "kd", format="axolotl-kd")
    settings = axolotl_runs.config(
        material,
        run_folder,
        plugins=["axolotl.integrations.kd.KDPlugin"],
        fusion=None,
        datasets=[{"path": str(run_folder / "kd"), "type": None}],
        kd_trainer=True,
        kd_alpha=1.0,
        kd_ce_alpha=0.0,
        kd_temperature=1.0,
        micro_batch_size=len(open_store(store)),
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    # In a process of its own: axolotl mixes the settings of a plugin into its arguments once per process.
    path = axolotl_runs.write_config(settings, run_folder)
    done = axolotl_runs.command("train", str(path), "--launcher", "python", cwd=run_folder)
    assert done.returncode == 0, done.stdout[-4000:]
    (state,) = run_folder.glob("model/checkpoint-1/trainer_state.json")
    losses = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    masses = np.concatenate([1 - item.tail[item.topk.ids[:, 0] >= 0] for item in open_store(store)])
    assert masses.max() < 0.9
    assert losses == [pytest.approx(-np.log(masses).mean(), abs=2e-3)]
