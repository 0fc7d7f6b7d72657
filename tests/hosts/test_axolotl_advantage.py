"""The loss of advantages in stock axolotl: chunks in the rows, the same training however it is cut, and its report."""

import json

import axolotl_runs as runs
import numpy as np
import pytest
import tiny
import torch
from axolotl_runs import config, logged, prepare, train
from transformers import AutoModelForCausalLM

from fusion_plugins.axolotl.collator import FusionCollator, take_chunks
from fusion_plugins.axolotl.target_tokenizer import EncodedText
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import DataError
from fusion_plugins.store import RowManifest, RowWriter, open_store

IN_ORDER = {"curriculum_sampling": True, "shuffle_merged_datasets": False}
LOSS = {"loss": "advantage", "lm_loss_weight": 0.0, "top_k": None, "rule": "fixed_weights"}
COLUMNS = {
    **{"prompt_id": "string", "source": "string", "index": "int64", "prompt": "json", "response": "string"},
    **{"finish_reason": "string", "n_tokens": "int64", "system": "string", "token_ids": "int32s"},
    **{"token_logprobs": "float32s", "tokenizer": "string", "model": "string", "domain": "string"},
}


@pytest.fixture(scope="module")
def answers(material, tmp_path_factory):
    """A folder of the target's own answers, one of which was cut, and the stores of a source and of the target."""
    folder, tokenizer = tmp_path_factory.mktemp("answers"), tiny.sentencepiece_bpe()
    fingerprint = TokenTable.from_tokenizer(tokenizer, check=False).fingerprint
    manifest = RowManifest(stage="responses", columns=COLUMNS, key=("prompt_id", "source", "index"))
    with RowWriter(folder / "responses", manifest) as rows:
        for number, (question, answer) in enumerate(runs.CHATS):
            ids = tokenizer(answer["content"], add_special_tokens=False)["input_ids"]
            finished = number != 3
            # Two answers without the sampler's log-probabilities.
            known = number not in (1, 2)
            ids = [*ids, tokenizer.eos_token_id] if finished else ids[:-2]
            rows.write(
                {
                    "prompt_id": f"p{number}",
                    "source": "own",
                    "index": 0,
                    "prompt": [question],
                    "response": tokenizer.decode(ids, skip_special_tokens=True),
                    "finish_reason": "stop" if finished else "length",
                    "n_tokens": len(ids),
                    "system": None,
                    "token_ids": ids,
                    "token_logprobs": [-4.0 - 0.1 * (place % 7) for place in range(len(ids))] if known else None,
                    "tokenizer": fingerprint,
                    "model": str(material.target),
                    "domain": "maths" if number % 2 else "code",
                }
            )
        rows.finish()
    runs.capture(folder / "responses", material.folder / "digits", folder / "store-digits")
    runs.capture(folder / "responses", material.target, folder / "store-target")
    return folder


def own(answers, *names, **changes):
    """Settings of a run on the answers."""
    sources = [{"name": name, "store": str(answers / f"store-{name}"), "is_target": name == "target"} for name in names]
    fusion = {"sources": sources} | LOSS | changes.pop("fusion", {})
    datasets = [{"path": str(answers / "responses"), "type": runs.FUSED}]
    return {"datasets": datasets, "fusion": fusion} | IN_ORDER | changes


def advantage_of(said, record, row, t):
    """Minus the advantage of the label of a position, times the ratio and the label's log-probability."""
    logprob = said[t, int(row["input_ids"][t + 1])]
    advantage = float(np.clip(float(record.topk.token_logprobs[t]) - float(logprob), -10, 10))
    sampled = float(row["sampled_logprob"][t])
    ratio = 1.0 if np.isnan(sampled) else float(torch.exp(logprob.detach() - sampled))
    return -advantage * min(1.2, ratio) * logprob


def reverse_kl_of(said, record, row, t):
    """Sum over the whole vocabulary of pi (log pi - log p), at a position."""
    source = torch.empty(said.shape[1], dtype=torch.float64)
    source[torch.tensor(record.topk.ids[t].astype(np.int64))] = torch.tensor(record.topk.logprobs[t]).double()
    return (said[t].exp() * (said[t] - source.log_softmax(-1))).sum()


def reference(material, rows, store, loss):
    """Gradient of the sum of the loss over rows of one source with the target's tokenizer, by the textbook."""
    model = AutoModelForCausalLM.from_pretrained(material.target).double()
    records = {record.text.input_ids.tobytes(): record for record in store}
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = np.asarray(row["input_ids"], np.int32)
        said = model(torch.tensor(ids[None], dtype=torch.long)).logits[0].log_softmax(-1)
        supervised = np.flatnonzero(np.asarray(row["labels"])[1:] != -100)
        total = total + sum(loss(said, records[ids.tobytes()], row, int(t)) for t in supervised)
    return torch.autograd.grad(total, model.parameters())


@pytest.fixture(scope="module")
def kin(answers):
    """The whole distributions of another model with the target's tokenizer over the same answers."""
    model = tiny.llama_checkpoint(answers / "kin", seed=4, moved=0.5, tokenizer=tiny.sentencepiece_bpe())
    return open_store(runs.capture(answers / "responses", model, answers / "store-kin", top_k="all"))


def stepped(material, answers, run_folder, rate, **fusion):
    """Train one plain step on four answers; return the trainer, all rows, and what each weight moved by, over -rate."""
    plain = {"optimizer": "sgd", "learning_rate": rate, "max_grad_norm": 1e9}
    settings = own(answers, "kin", max_steps=1, micro_batch_size=4, fusion=fusion, **plain)
    settings = config(material, run_folder, **settings)
    trainer = train(settings, run_folder)
    before = AutoModelForCausalLM.from_pretrained(material.target).state_dict()
    moved = [(before[name] - one.detach()) / rate for name, one in trainer.model.named_parameters()]
    return trainer, list(prepare(settings, run_folder)[1]), moved


def require_textbook(moved, rows, gradient):
    """The step is along the gradient of the mean over the labels, sign and size."""
    tokens = sum(label != -100 for row in rows for label in row["labels"][1:])
    expected, found = (torch.cat([one.double().flatten() for one in each]) for each in (gradient, moved))
    expected = expected / tokens
    assert (found - expected).norm() < 5e-3 * expected.norm()
    assert expected.norm() > 0.05


def test_with_one_tokenizer_the_reverse_kl_of_own_answers_is_that_of_the_textbook(material, answers, kin, run_folder):
    fusion = {"loss": "reverse_kl", "rule": "min_ce"}
    _, rows, moved = stepped(material, answers, run_folder, 0.01, **fusion)
    require_textbook(moved, rows[:4], reference(material, rows[:4], kin, reverse_kl_of))


def test_own_answers_with_one_tokenizer_are_trained_on_by_the_textbook(material, answers, kin, run_folder):
    trainer, rows, moved = stepped(material, answers, run_folder, 0.01)
    for row in rows:
        place, trained = np.asarray(row["chunk_place"]), np.append(np.asarray(row["labels"])[1:] != -100, False)
        assert (place == trained).all()
    # The cut answer has no end of turn.
    ended = [tiny.sentencepiece_bpe().eos_token_id in row["labels"] for row in rows]
    assert ended.count(False) == 1
    known = [bool(np.isfinite(row["sampled_logprob"]).any()) for row in rows]
    assert known.count(False) == 2
    require_textbook(moved, rows[:4], reference(material, rows[:4], kin, advantage_of))
    figures = trainer.state.log_history[0]
    assert figures["fusion_coverage"] == 1
    assert figures["tokens_per_chunk"] == figures["one_token_chunks"] == 1
    assert figures["share_kin"] == 1
    assert "fused_entropy" not in figures
    assert "top1_agreement" not in figures
    report = json.loads((run_folder / "model" / "fusion_report.json").read_text())[str(answers / "responses")]
    assert report["chunks"]["shares"]["tokens_per_chunk"] == 1
    assert report["chunks"]["shares"]["bytes_without_common_end"] == 0
    assert 0.5 < report["chunks"]["shares"]["sampled"] < 1
    assert report["taught"] == {domain: {"kin": sum(counts.values())} for domain, counts in report["taught"].items()}


def test_a_language_model_weight_of_1_is_plain_sft_on_the_answers(material, answers, run_folder):
    ours = train(config(material, run_folder, **own(answers, "digits", fusion={"lm_loss_weight": 1.0})), run_folder)
    _, rows = prepare(
        config(material, run_folder, **own(answers, "digits", fusion={"lm_loss_weight": 1.0})), run_folder
    )
    kept = [{key: row[key] for key in ("input_ids", "attention_mask", "labels")} for row in rows]
    tokenized = runs.write_rows(run_folder / "tokenized.jsonl", [{k: list(v) for k, v in row.items()} for row in kept])
    plain = {"plugins": None, "fusion": None, "datasets": [{"path": str(tokenized), "ds_type": "json"}]}
    theirs = train(config(material, run_folder / "plain", **IN_ORDER, **plain), run_folder / "plain")
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-4)
    assert logged(ours, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=1e-3)


def test_the_same_training_however_rows_are_prepared_packed_and_accumulated(material, answers, run_folder):
    def run(name, **changes):
        settings = own(answers, "digits", "target", max_steps=1, **changes)
        return train(config(material, run_folder / name, **settings), run_folder / name)

    whole = run("whole", micro_batch_size=4)
    expected = logged(whole, "grad_norm")
    assert 0 < whole.state.log_history[0]["one_token_chunks"] < 1
    assert whole.state.log_history[0]["tokens_per_chunk"] > 1
    others = [
        run("small", micro_batch_size=4, fusion={"loss_chunk": 3}),
        run("parts", micro_batch_size=1, gradient_accumulation_steps=4),
        run("stores", micro_batch_size=4, fusion={"prepared": "stores"}),
    ]
    for trainer in others:
        assert logged(trainer, "grad_norm") == pytest.approx(expected, rel=1e-3)
        assert logged(trainer, "fusion_loss") == pytest.approx(logged(whole, "fusion_loss"), rel=1e-3)


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ([5, 6, 2], [None, -0.1, -0.2, -0.3, None]),
        ([5, 6, 3], [None, -0.1, -0.2, None, None]),  # the template ends the turn with another token
        ([5, 6], [None, -0.1, -0.2, None, None]),
        ([5, 7, 2], None),
        ([9], [None, None, None, None, None]),
        ([], None),
    ],
)
def test_the_samplers_log_probabilities_belong_to_the_tokens_that_were_drawn(drawn, expected):
    """Tokens: two of the prompt, 5 and 6 of the answer, 2 that ends its turn. Position t is about token t + 1."""
    ids = np.array([1, 4, 5, 6, 2], np.int32)
    labels = np.array([-100, -100, 5, 6, 2], np.int32)
    text = EncodedText(TokenizedText(ids, ids, np.empty((0, 2), np.int32), ids > 0), labels)
    found = text.with_sampled(drawn, [-0.1, -0.2, -0.3][: len(drawn)]).sampled
    if expected is None:
        assert found is None
    else:
        assert [None if np.isnan(one) else round(float(one), 6) for one in found] == expected


def test_rows_that_were_prepared_for_another_loss_are_refused_with_the_cure():
    chunks = {"input_ids": [1, 2], "chunk_place": [1, 0], "chunk_logprob": [-1.0, 0.0], "labels": [-100, 2]}
    collate = FusionCollator(tiny.sentencepiece_bpe(), inner=lambda *_, **__: None)
    with pytest.raises(DataError, match="expected a row with chunks, got the columns"):
        collate.width(chunks)
    with pytest.raises(DataError, match="expected a batch with chunks, got one with .*fused_ids"):
        take_chunks({"fused_ids": 0})


def test_packed_answers_are_trained_on_as_apart_and_so_are_adapters(material, answers, run_folder):
    first = {"where": {"prompt_id": ["p0", "p1", "p2", "p3"]}}
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}
    # axolotl's kernels for the GPU would stay patched into the model class for the tests after this one.
    lora |= {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
    settings = own(answers, "digits", max_steps=1, fusion=first, micro_batch_size=4, **lora)
    apart = train(config(material, run_folder / "apart", **settings), run_folder / "apart")
    packing = {"sample_packing": True, "sample_packing_sequentially": True, "sequence_len": 512, "micro_batch_size": 1}
    packed = train(config(material, run_folder / "packed", **settings | packing), run_folder / "packed")
    assert packed._losses_in_head is True
    for name in ("loss", "fusion_loss", "grad_norm", "tokens_per_chunk"):
        assert logged(packed, name) == pytest.approx(logged(apart, name), rel=1e-3)
    assert logged(packed, "grad_norm")[0] > 0


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        ({"rule": "min_ce"}, "shares the target's mistakes"),
        ({"rule": "token_min_ce"}, "shares the target's mistakes"),
        ({"alignment": {"method": "dtw"}}, "remove fusion.alignment"),
        ({"top_k": 4}, "fusion.top_k would do nothing"),
        ({"projection": {"vocabulary_map": "exact"}, "temperature": 2.0}, "fusion.projection, fusion.temperature"),
        ({"loss_options": {"beta": 0.5}}, "advantage takes clip, ratio_clip, got 'beta'"),
        ({"loss_options": {"clip": 0}}, "clip: expected a number of nats above 0"),
        ({"loss_options": {"clip": "much"}}, "advantage cannot take"),
        ({"loss_options": {"ratio_clip": -1}}, "ratio_clip: expected a number above 0"),
        ({"loss": "jsd", "rule": "min_ce", "loss_options": {"beta": 2}}, "beta: expected a number from 0 to 1"),
        ({"loss": "ce", "rule": "min_ce", "loss_options": {"beta": 1}}, "ce takes no options, got 'beta'"),
    ],
)
def test_what_does_not_belong_together_is_refused(material, answers, run_folder, fusion, message):
    from axolotl.cli.config import load_cfg

    settings = config(material, run_folder, **own(answers, "digits", "target", fusion=fusion))
    runs.forget_plugins()
    with pytest.raises(Exception, match=message):
        load_cfg(str(runs.write_config(settings, run_folder)))


#: each process has half of a batch
HALVES = {
    "micro_batch_size": 1,
    "max_memory": {"cpu": "8GiB"},
    "plugins": [runs.PLUGIN, "averaging_plugin.AveragingPlugin"],
}
#: each process has half of every weight; on a CPU both get the same rows
ZERO3 = {"deepspeed": str(runs.ROOT / "axolotl_configs" / "deepspeed" / "zero3.json"), "gradient_checkpointing": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "environment"),
    [
        pytest.param(HALVES, {"ACCELERATE_USE_CPU": "true"}, id="half a batch each"),
        pytest.param(ZERO3, {}, id="half of every weight each (ZeRO-3)"),
    ],
)
def test_two_processes_train_on_advantages_as_one(more, environment, material, answers, run_folder):
    settings = config(material, run_folder, **own(answers, "digits", "target", max_steps=2))
    entries, _ = runs.two_processes(settings | more, run_folder, **environment)
    single = train(settings, run_folder)
    figures = ("lm_loss", "fusion_coverage", "tokens_per_chunk", "one_token_chunks", "sampled_known", "fusion_loss")
    for name in (*figures, "loss", "grad_norm"):
        found = [float(entry[name]) for entry in entries]
        assert found == pytest.approx(logged(single, name), rel=2e-3), (name, entries)
    assert logged(single, "grad_norm")[0] > 0
