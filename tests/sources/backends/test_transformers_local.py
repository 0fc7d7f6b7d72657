"""The transformers backend: draws, forward passes and ties; all other backends are compared with it."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import source_checks
import tiny
import torch
from safetensors.torch import load_file
from source_checks import capture_config as config
from transformers import AutoModelForCausalLM

from fusion_plugins.errors import FusionError, SourceError
from fusion_plugins.sources.backends.base import Response, SampleRequest, Sampling, SourceSettings, open_source
from fusion_plugins.sources.backends.transformers_local import topk_of_logits
from fusion_plugins.sources.capture import capture_texts


def source(model, **options) -> object:
    return open_source(SourceSettings(model=str(model), options=options), "sample")


def test_temperature_zero_is_the_models_own_greedy_answer(model):
    tokenizer, network = tiny.byte_level(), AutoModelForCausalLM.from_pretrained(model)
    texts = ["The quick", "def add(left"]
    sampling = Sampling(temperature=0, max_tokens=10, template="plain")
    requests = [SampleRequest(text, sampling, seed) for seed, text in enumerate(texts)]
    for (_, index), response in source(model).sample([requests]):
        ids = tokenizer(texts[index], return_tensors="pt")["input_ids"]
        expected = network.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
        assert response.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert response.n_prompt_tokens == ids.shape[1]


@pytest.mark.parametrize(
    "limits", [{}, {"top_k": 5}, {"top_k": -1}, {"top_p": 0.3}, {"min_p": 0.4}, {"temperature": 0.5}]
)
def test_draws_follow_the_models_distribution(model, limits):
    tokenizer = tiny.byte_level()
    text = "The quick brown"
    sampling = Sampling(**({"temperature": 1.0, "max_tokens": 1, "template": "plain"} | limits))
    requests = [SampleRequest(text, sampling, seed) for seed in range(2000)]
    counts = Counter(response.text for _, response in source(model, batch_prompts=500).sample([requests]))
    ids = np.array(tokenizer(text)["input_ids"])
    probs = np.exp(source_checks.reference_logprobs(model, ids)[-1])
    probs = probs ** (1 / sampling.temperature)
    order = np.argsort(-probs)
    probs = probs / probs.sum()
    kept = sampling.top_k if sampling.top_k > 0 else int((probs >= sampling.min_p * probs.max()).sum())
    if sampling.top_p < 1:
        kept = int((np.cumsum(probs[order]) < sampling.top_p).sum()) + 1
    allowed = order[:kept]
    expected = Counter()
    for token in allowed:
        expected[tokenizer.decode([token], skip_special_tokens=True)] += probs[token] / probs[allowed].sum()
    assert set(counts) <= set(expected)
    for answer, share in expected.items():
        deviation = (share * (1 - share) / 2000) ** 0.5
        assert abs(counts[answer] / 2000 - share) < 4.5 * deviation + 1e-9


def test_padding_does_not_let_a_repetition_penalty_see_tokens_that_are_not_there(model):
    sampling = Sampling(temperature=0, max_tokens=12, template="plain", repetition_penalty=1.8)
    texts = ["The quick brown fox jumps over the lazy dog. The dog sleeps", "return", "12 + 30 ="]
    requests = [SampleRequest(text, sampling, 0) for text in texts]
    alone = {i: r.text for i, r in source(model, batch_prompts=1).sample([requests])}
    together = {i: r.text for i, r in source(model, batch_prompts=3).sample([requests])}
    assert alone == together


def test_a_stop_string_ends_a_response_and_is_cut_off(model):
    free = Sampling(temperature=0, max_tokens=12, template="plain")
    [(_, whole)] = source(model).sample([[SampleRequest("The quick", free, 0)]])
    stop = whole.text[3:5]
    [(_, cut)] = source(model).sample([[SampleRequest("The quick", free.model_copy(update={"stop": (stop,)}), 0)]])
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_a_prompt_is_rendered_as_a_chat_with_the_system_prompt_unless_told_otherwise(model):
    asked = "What is 1 + 30?"
    chat = tiny.byte_level().apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": asked}],
        tokenize=False,
        add_generation_prompt=True,
    )
    base = Sampling(temperature=0, max_tokens=8)
    requests = [
        SampleRequest(asked, base.model_copy(update={"system": "Be brief."}), 0),
        SampleRequest(chat, base.model_copy(update={"template": "plain"}), 0),
    ]
    first, second = (response for _, response in sorted(source(model).sample([requests])))
    assert first == second


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused_and_the_others_are_answered(model):
    sampling = Sampling(max_tokens=252, template="plain")
    requests = [SampleRequest(text, sampling, 0) for text in ("The", "The quick brown fox")]
    results = dict(source(model).sample([requests]))
    assert isinstance(results[0, 0], Response)
    assert "exceed the model's 256 tokens; lower max_tokens" in results[0, 1].reason


def test_what_the_checkpoint_says_about_sampling_does_not_act(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "opinionated")
    file = folder / "generation_config.json"
    values = json.loads(file.read_text()) | {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0}
    file.write_text(json.dumps(values))
    request = SampleRequest("The quick", Sampling(temperature=0, max_tokens=12, template="plain"), 0)
    assert list(source(folder).sample([[request]])) == list(source(model).sample([[request]]))


def test_ties_go_to_the_lowest_id_also_at_the_cut():
    torch.manual_seed(0)
    logits = torch.randn(200, 90).round(decimals=1).to(torch.bfloat16)
    ids, logprobs, gold = topk_of_logits(logits, torch.zeros(200, dtype=torch.long), 10, 80)
    expected = torch.log_softmax(logits.float(), dim=-1)[:, :80].sort(dim=-1, descending=True, stable=True)
    assert (expected.values[:, 9] == expected.values[:, 10]).sum() > 20
    assert torch.equal(ids.long(), expected.indices[:, :10])
    assert torch.equal(logprobs, expected.values[:, :10])
    assert torch.equal(gold, torch.log_softmax(logits.float(), dim=-1)[:, 0])


def test_weights_that_are_no_safetensors_are_refused(model, texts, tmp_path):
    folder = shutil.copytree(model, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="weights must be safetensors"):
        capture_texts(config(folder, texts, tmp_path / "store"))


def test_code_that_comes_with_a_model_does_not_run_unless_it_is_allowed(model, texts, tmp_path):
    folder = shutil.copytree(model, tmp_path / "remote")
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "own_kind", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(FusionError, match="trust_remote_code"):
        capture_texts(config(folder, texts, tmp_path / "store"))
    assert not (tmp_path / "ran").exists()
