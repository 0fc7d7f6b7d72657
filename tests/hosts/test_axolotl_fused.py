"""Stock axolotl on fused targets: real stores, real training, in this process."""

import json

import axolotl_runs as runs
import numpy as np
import pytest
import tiny
import torch
from axolotl_runs import CHATS, FUSED, config, logged, prepare, train

from fusion_plugins.core.fusion.types import Record, TopK
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.store import StoreWriter, open_store

IN_ORDER = {"curriculum_sampling": True, "shuffle_merged_datasets": False}


def test_a_run_trains_on_both_terms_and_reports_on_the_sources(material, run_folder):
    trainer = train(config(material, run_folder, **IN_ORDER), run_folder)
    terms = [logged(trainer, name) for name in ("loss", "lm_loss", "fusion_loss", "fusion_coverage", "lm_weight")]
    for loss, lm, fusion, coverage, weight in zip(*terms, strict=True):
        assert weight == 0.5
        assert loss == pytest.approx(0.5 * lm + 0.5 * fusion * coverage, rel=1e-3)
        assert 0.4 < coverage <= 1
    report = json.loads((run_folder / "model" / "fusion_report.json").read_text())[str(material.texts)]
    assert report["texts"] == 24 == sum(report["chosen"].values())
    assert report["fused_positions"] <= report["positions"]
    assert report["shares"]["target"]["coverage"] > 0.95 > report["shares"]["digits"]["coverage"] > 0.5
    assert trainer._losses_in_head is True


def test_fusion_changes_loss_and_gradient(material, run_folder):
    plain = train(config(material, run_folder, max_steps=1, fusion={"lm_loss_weight": 1.0}, **IN_ORDER), run_folder)
    fused = train(config(material, run_folder, max_steps=1, **IN_ORDER), run_folder)
    assert logged(plain, "lm_loss") == logged(fused, "lm_loss")
    assert logged(plain) == pytest.approx(logged(plain, "lm_loss"), rel=1e-4)
    assert logged(plain) != logged(fused)
    assert logged(plain, "grad_norm") != logged(fused, "grad_norm")


def test_losses_in_the_head_equal_those_from_the_logits(material, run_folder, monkeypatch):
    from fusion_plugins.axolotl.trainer import FusionTrainer

    inside = train(config(material, run_folder, **IN_ORDER), run_folder)
    monkeypatch.setattr(FusionTrainer, "_head_is_last", lambda *_: False)
    outside = train(config(material, run_folder, **IN_ORDER), run_folder)
    assert (inside._losses_in_head, outside._losses_in_head) == (True, False)
    assert logged(inside) == pytest.approx(logged(outside), rel=1e-5)
    assert logged(inside, "grad_norm") == pytest.approx(logged(outside, "grad_norm"), rel=1e-4)


def test_a_model_that_caps_its_logits_is_trained_on_what_it_says(material, run_folder):
    """Gemma-2 bends its logits behind the output layer; what the layer puts out is not what the model says."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = tiny.sentencepiece_bpe()
    torch.manual_seed(5)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            final_logit_softcapping=2.0,
            attn_implementation="eager",
        )
    )
    model.save_pretrained(run_folder / "gemma")
    tokenizer.save_pretrained(run_folder / "gemma")
    changes = {"base_model": str(run_folder / "gemma"), "attn_implementation": "eager", "max_steps": 1}
    trainer = train(config(material, run_folder, **changes, **IN_ORDER), run_folder)
    assert trainer._losses_in_head is True
    assert trainer._change.cap == 2.0
    rows = [trainer.train_dataset[index] for index in range(2)]
    with torch.no_grad():
        own = [model.eval()(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1) for row in rows]
    labels = [torch.tensor(row["labels"][1:]) for row in rows]
    sums = sum(torch.nn.functional.nll_loss(*pair, reduction="sum") for pair in zip(own, labels, strict=True))
    positions = sum(int((one != -100).sum()) for one in labels)
    assert logged(trainer, "lm_loss")[0] == pytest.approx(sums.item() / positions, rel=1e-4)


def test_accumulated_micro_batches_equal_one_batch(material, run_folder):
    whole = train(config(material, run_folder, micro_batch_size=4, **IN_ORDER), run_folder)
    parts = train(
        config(material, run_folder, micro_batch_size=1, gradient_accumulation_steps=4, **IN_ORDER), run_folder
    )
    assert logged(parts) == pytest.approx(logged(whole), rel=1e-5)
    assert logged(parts, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-4)


def test_packed_documents_do_not_see_each_other(material, run_folder):
    """The same documents, one sequence per document and all in one sequence: the same loss and gradient."""
    apart = train(config(material, run_folder, micro_batch_size=4, max_steps=1, **IN_ORDER), run_folder)
    settings = config(
        material,
        run_folder,
        sample_packing=True,
        sample_packing_sequentially=True,
        sequence_len=512,
        micro_batch_size=1,
        max_steps=1,
        datasets=[{"path": str(first_rows(material, run_folder, 4)), "type": FUSED}],
        **IN_ORDER,
    )
    packed = train(settings, run_folder)
    assert logged(packed) == pytest.approx(logged(apart), rel=1e-5)
    assert logged(packed, "fusion_coverage") == logged(apart, "fusion_coverage")
    assert logged(packed, "grad_norm") == pytest.approx(logged(apart, "grad_norm"), rel=1e-4)


def first_rows(material, folder, count):
    lines = material.texts.read_text().splitlines(keepends=True)[:count]
    path = folder / "first.jsonl"
    path.write_text("".join(lines))
    return path


def test_checkpointing_and_evaluation_leave_the_losses_as_they_are(material, run_folder):
    plain = train(config(material, run_folder, val_set_size=8, evals_per_epoch=None, **IN_ORDER), run_folder)
    settings = config(
        material, run_folder, val_set_size=8, eval_steps=1, gradient_checkpointing=True, eval_batch_size=3, **IN_ORDER
    )
    other = train(settings, run_folder)
    assert logged(other) == pytest.approx(logged(plain), rel=1e-5)
    evaluated = [logged(other, name) for name in ("eval_loss", "eval_lm_loss", "eval_fusion_loss")]
    assert all(len(values) >= 3 for values in evaluated)
    assert all(np.isfinite(values).all() for values in evaluated)
    assert evaluated[0][-1] < evaluated[0][0]


def test_adapters_train_on_fused_targets(material, run_folder):
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}
    # axolotl's kernels for the GPU would stay patched into the model class for the tests after this one.
    lora |= {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
    trainer = train(config(material, run_folder, **lora), run_folder)
    assert trainer._losses_in_head is True
    assert len(logged(trainer, "fusion_loss")) == 3
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(material, run_folder):
    common = IN_ORDER | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    common |= {"fusion": {"lm_loss_schedule": "rise"}}
    whole = train(config(material, run_folder, **common), run_folder)
    weights = tiny.tensors_of(run_folder / "model")
    resumed = train(
        config(material, run_folder, resume_from_checkpoint=str(run_folder / "model" / "checkpoint-2"), **common),
        run_folder,
    )
    assert logged(resumed) == logged(whole)
    assert logged(whole, "lm_weight") == pytest.approx([0.5, 0.625, 0.75, 0.875])
    for name, tensor in tiny.tensors_of(run_folder / "model").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


def test_every_fused_row_describes_the_next_token(material, run_folder):
    """A source that is certain of its own next token makes targets that are certain of the target's next token."""
    ids = certain_store(material, run_folder / "certain")
    sources = [{"name": "certain", "store": str(run_folder / "certain")}]
    _, rows = prepare(config(material, run_folder, fusion={"sources": sources}, **IN_ORDER), run_folder)
    assert len(rows) == len(ids)
    found = 0
    for row in rows:
        tokens = np.array(row["input_ids"])
        fused = np.array(row["fused_ids"]).reshape(len(tokens), -1)
        probabilities = np.exp(np.array(row["fused_logprobs"]).reshape(fused.shape))
        used = np.flatnonzero(fused[:, 0] >= 0)
        np.testing.assert_array_equal(fused[used, 0], tokens[used + 1])
        np.testing.assert_allclose(probabilities[used, 0], 1, atol=1e-5)
        assert row["labels"][0] == -100
        assert row["labels"][1:] == row["input_ids"][1:]
        found += len(used)
    assert found > 0.6 * sum(len(row["input_ids"]) for row in rows)


def certain_store(material, out):
    """The store of `digits` with every row replaced by probability 1 on the source's own next token."""
    store = open_store(material.folder / "texts-digits")
    with StoreWriter(out, store.manifest.model_copy(update={"shards": [], "complete": False}), store.table) as writer:
        for record in store:
            following = np.append(record.text.input_ids[1:], -1)
            ids = np.full_like(record.topk.ids, -1)
            ids[:, 0] = np.where(record.topk.ids[:, 0] >= 0, following, -1)
            certain = np.where(ids >= 0, 0.0, -np.inf).astype(np.float32)
            gold = np.append(np.zeros(len(following) - 1), np.nan).astype(np.float32)
            writer.write(
                Record(
                    id=record.id,
                    text=record.text,
                    topk=TopK(ids, certain, gold),
                    tail=np.where(ids[:, 0] >= 0, 0, 1).astype(np.float32),
                    ce_per_token=0.0,
                    ce_per_byte=0.0,
                )
            )
        writer.finish()
    return store.ids()


def test_chats_are_supervised_on_answers_and_their_end_of_turn(material, run_folder):
    settings = config(
        material,
        run_folder,
        datasets=[{"path": str(material.chats), "type": FUSED}],
        fusion={"sources": material.sources("chats", "digits")},
        **IN_ORDER,
    )
    _, rows = prepare(settings, run_folder)
    tokenizer = tiny.sentencepiece_bpe()
    for row, chat in zip(rows, CHATS, strict=True):
        supervised = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(supervised) == chat[-1]["content"] + "</s>"
        fused = np.array(row["fused_ids"]).reshape(len(row["labels"]), -1)[:, 0] >= 0
        labels = np.append(row["labels"][1:], -100)
        assert (labels[fused] != -100).mean() > 0.9
    train(settings, run_folder)


def test_the_same_tokenizer_is_not_mapped(material, run_folder):
    _, rows = prepare(
        config(material, run_folder, fusion={"sources": material.sources("texts", "target"), "top_k": 16}, **IN_ORDER),
        run_folder,
    )
    store = open_store(material.folder / "texts-target")
    record, row = store["t0"], rows[0]
    assert row["input_ids"] == record.text.input_ids.tolist()
    fused = np.array(row["fused_ids"]).reshape(len(row["labels"]), -1)
    for position in range(3, 12):
        # The next token may have been outside the source's top k: its probability is known all the same.
        assert set(fused[position]) <= {*record.topk.ids[position], row["input_ids"][position + 1]}


@pytest.mark.parametrize("vocabulary", ["min_edit", "exact", "statistics", "one_to_many"])
def test_every_way_of_mapping_runs(material, run_folder, vocabulary):
    projection = {"vocabulary_map": vocabulary, "fallback": "next_label"}
    _, rows = prepare(config(material, run_folder, fusion={"projection": projection}), run_folder)
    assert all(np.array(row["fused_ids"]).max() >= 0 for row in rows)


def test_a_prepared_data_set_is_used_again_only_while_nothing_changed(material, run_folder):
    texts = first_rows(material, run_folder, 6)
    data = [{"path": str(texts), "type": FUSED}]

    def prepared(**changes):
        prepare(config(material, run_folder, datasets=[dict(entry) for entry in data], **changes), run_folder)
        return {path.name for path in (run_folder / "prepared").iterdir() if path.is_dir()}

    first = prepared()
    assert len(first) == 1
    assert prepared(fusion={"lm_loss_weight": 0.7, "loss": "kl"}) == first, "the loss is no part of the rows"
    assert len(prepared(fusion={"rule": "avg_ce"})) == 2
    assert len(prepared(fusion={"projection": {"fallback": "next_label"}})) == 3
    assert len(prepared(fusion={"sources": material.sources("texts", "target")})) == 4
    texts.write_text(texts.read_text().rstrip().rsplit("\n", 1)[0] + "\n")
    assert len(prepared()) == 5, "rewritten texts"


def test_missing_texts_can_be_dropped(material, run_folder):
    """Also one that only the second of two stores lacks. The report names each, and a store that lacks it."""
    rows = [json.loads(line) for line in material.texts.read_text().splitlines()[:5]]
    path = runs.write_rows(run_folder / "more.jsonl", [*rows[:3], {"id": "new", "text": "Not captured."}, *rows[3:]])
    part = runs.write_rows(run_folder / "part.jsonl", rows[1:])
    sources = material.sources("texts", "target")
    sources.append({"name": "part", "store": str(runs.capture(part, material.folder / "digits", run_folder / "part"))})
    block = {"on_missing_text": "skip", "sources": sources}
    settings = config(material, run_folder, datasets=[{"path": str(path), "type": FUSED}], fusion=block)
    _, found = prepare(settings, run_folder)
    assert len(found) == 4
    report = json.loads((run_folder / "model" / "fusion_report.json").read_text())[str(path)]
    assert report["missing_from_stores"] == [
        {"row": f"{path}: row 1, id 't0'", "reason": f"missing in the store {run_folder / 'part'}"},
        {"row": f"{path}: row 4, id 'new'", "reason": f"missing in the store {sources[0]['store']}"},
    ]


def test_the_table_of_the_target_is_that_of_its_store(material):
    table = TokenTable.from_tokenizer(tiny.sentencepiece_bpe())
    assert table.fingerprint == open_store(material.folder / "texts-target").manifest.tokenizer_fingerprint
