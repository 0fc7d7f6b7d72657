"""FuseChat from sources to a merge: two tuned models, merged and reported on; a third is added later."""

import json

import axolotl_runs as runs
import merging
import pytest
import tiny
import torch

from fusion_plugins.core.merging.varm import varm_merge
from fusion_plugins.mergekit.check import check_merge
from fusion_plugins.mergekit.report import render_merge_report

SOURCES = {"digits": tiny.digit_splitting, "bytes": tiny.byte_level, "words": lambda: tiny.byte_level(390)}


def fused_target(material, source, folder, monkeypatch):
    """Fuse one source into a copy of the target with axolotl, and return the copy."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    model = tiny.llama_checkpoint(folder / "source", seed=len(source), tokenizer=SOURCES[source]())
    store = runs.capture(material.texts, model, folder / "store")
    own = next(entry for entry in material.sources() if entry["is_target"])
    entries = [{"name": source, "store": str(store), "is_target": False}, own]
    runs.train(runs.config(material, folder, fusion={"sources": entries}, save_only_model=True), folder)
    return folder / "model"


@pytest.mark.slow
def test_two_models_are_fused_and_merged_and_a_third_is_added_without_training_the_first_two_again(
    material, run_folder, monkeypatch
):
    models = {"base": material.target}
    for source in ("digits", "bytes"):
        models[source] = fused_target(material, source, run_folder / source, monkeypatch)
    files = {name: sorted(path.glob("*.safetensors"))[0] for name, path in models.items()}
    untouched = {name: file.read_bytes() for name, file in files.items()}

    def merged_of(*names):
        config = merging.config_of(models, *names, dtype="float32")
        out = merging.run_merge(run_folder / "merges", config, name="_".join(names))
        assert check_merge(run_folder / "merges" / f"{'_'.join(names)}.yml", out=run_folder).ok
        tuned = [tiny.tensors_of(models[name]) for name in names]
        expected = varm_merge(tiny.tensors_of(models["base"]), tuned)
        for name, tensor in tiny.tensors_of(out).items():
            assert torch.equal(tensor, expected[name]), name
        record = json.loads((out / "fusion_merge.json").read_text())
        assert [share > 0 for share in record["mean_weights"].values()] == [True] * len(names)
        page = render_merge_report(out)
        assert all(str(models[name]) in page for name in names)
        return out

    merged_of("digits", "bytes")
    models["words"] = fused_target(material, "words", run_folder / "words", monkeypatch)
    final = merged_of("digits", "bytes", "words")
    assert {name: file.read_bytes() for name, file in files.items()} == untouched

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    inputs = tokenizer("The quick brown fox", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
