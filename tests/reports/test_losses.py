"""Losses of example texts: those of the models before and after a training."""

import json
import math

import pytest
import tiny
import torch
from report_runs import RECORD

from fusion_plugins.reports.losses import Losses, losses_of, token_losses

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
TEXTS = [[1, 5, 9, 30, 7], [2, 3], [4]]
EXAMPLES = [{"ids": ids} for ids in TEXTS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    return {name: tiny.llama_checkpoint(folder / name, seed=seed) for seed, name in enumerate(("base", "tuned"))}


def plain(model, ids):
    """-log p of each token after those before it, one prefix at a time."""
    with torch.no_grad():
        logits = [model(torch.tensor([ids[:place]])).logits[0, -1] for place in range(1, len(ids))]
    return [-float(row.double().log_softmax(-1)[token]) for row, token in zip(logits, ids[1:], strict=True)]


def test_losses_are_those_of_one_prefix_after_the_other(folders):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["base"]).eval()
    for ids, found in zip(TEXTS, token_losses(str(folders["base"]), TEXTS), strict=True):
        assert math.isnan(found[0])
        assert found[1:] == pytest.approx(plain(model, ids), rel=1e-4)


def test_before_is_the_base_model_and_after_the_trained_one(folders):
    found = losses_of(RECORD | {"base_model": str(folders["base"])}, folders["tuned"], EXAMPLES, wanted=None)
    assert isinstance(found, Losses)
    for losses, name in ((found.before, "base"), (found.after, "tuned")):
        assert json.dumps(losses) == json.dumps(token_losses(str(folders[name]), TEXTS))


def test_an_adapter_is_put_on_the_base_model(folders, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(folders["base"])
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, settings).eval()
    adapted.save_pretrained(tmp_path)
    record = RECORD | {"base_model": str(folders["base"]), "adapter": "lora"}
    found = losses_of(record, tmp_path, EXAMPLES, wanted=None)
    assert isinstance(found, Losses), found
    assert found.after[0][1:] == pytest.approx(plain(adapted, TEXTS[0]), rel=1e-4)
    assert found.after[0][1:] != pytest.approx(found.before[0][1:], rel=1e-3)


def test_a_token_that_the_model_lacks_is_said(folders):
    record = RECORD | {"base_model": str(folders["base"])}
    said = losses_of(record, folders["tuned"], [{"ids": [1, 100_000]}], wanted=None)
    assert "the texts have token 100000, added for the training" in said
