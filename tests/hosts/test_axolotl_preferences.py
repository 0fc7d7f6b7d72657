"""The losses that TRL lacks, in real axolotl runs: WRPO, InfiFPO, FusePO and FuseSFT, held against their formulas."""

import copy
import json
import math

import pytest
import tiny
import torch
from axolotl_runs import capture, config, logged, prepare, row_folder, scored, train
from torch.nn.functional import logsigmoid

from fusion_plugins.axolotl.weighted_sft import WeightedCollator, weighted_loss
from fusion_plugins.errors import ConfigError, DataError, MismatchError

BEST = "fusion_plugins.axolotl.best_of_sources"
DPO = "fusion_plugins.multi_source_dpo"
TRAINERS = "fusion_plugins.axolotl.preference_trainers"
ANY_GAP = {"min_gap": "none", "max_gap": "none"}
#: the same rows in the same order in every run, and float32 throughout
STEADY = {"shuffle_merged_datasets": False, "dataset_exact_deduplication": False, "learning_rate": 0.002}


def preference(material, folder, path, **changes):
    settings = {
        "rl": "dpo",
        "rl_beta": 0.5,
        "dpo_loss_type": ["sigmoid"],
        "datasets": [{"path": str(path), "type": DPO}],
    }
    block = changes.pop("fusion", {})
    return config(material, folder, **(STEADY | settings | changes), fusion={"sources": []} | block)


def with_own(prompts=6):
    """Responses of three sources, and of the model "sft", which is the target itself."""
    rows = scored(prompts)
    own = [
        row
        | {
            "source": "sft",
            "response": f"I say {row['prompt_id']}{' um' * row['index']}.",
            "reward": 0.1 - row["index"],
        }
        for row in rows
        if row["source"] == "near"
    ]
    return rows + own


OWN = {"rule": "own_answers", "own_source": "sft"} | ANY_GAP


def logprobs(model, row, *names):
    """Sum of the log-probabilities and number of tokens of each answer, computed answer by answer."""
    found = []
    for name in names:
        prompt, answer = row["prompt_ids"], row[name]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            all_logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        picked = [all_logprobs[place - 1, ids[0, place]] for place in range(len(prompt), ids.shape[1])]
        found.append((float(torch.stack(picked).sum()), len(answer)))
    return found


def loss_of(trainer, rows):
    """The trainer's loss of some rows, as one batch, without a step."""
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


def test_wrpo_is_its_formula_and_its_weight_follows_the_steps(material, run_folder):
    path = row_folder(run_folder / "scored", with_own())
    wrpo = {"trainer_cls": f"{TRAINERS}.WRPOTrainer", "gradient_accumulation_steps": 2, "pad_to_multiple_of": 8}
    settings = preference(
        material, run_folder, path, fusion={"pairs": OWN, "wrpo": {"alpha": 0.8}}, max_steps=4, num_epochs=3, **wrpo
    )
    trainer = train(settings, run_folder)
    assert logged(trainer, "alpha") == pytest.approx([0.8 * step / 4 for step in range(4)])
    rows = list(trainer.train_dataset)
    assert {*rows[0]} == {"prompt_ids", "chosen_ids", "rejected_ids", "source_ids"}
    tokenizer = trainer.processing_class
    texts = {tuple(tokenizer.decode(row[f"{name}_ids"]) for name in ("chosen", "rejected", "source")) for row in rows}
    assert texts == {(f"I say p{n}.</s>", f"I say p{n} um um.</s>", f"far says {n}, more.</s>") for n in range(6)}
    # The reference is the model before training, which TRL keeps.
    names = ("source_ids", "chosen_ids", "rejected_ids")
    model, reference = trainer.model.eval(), trainer.ref_model
    expected = []
    for row in rows[:3]:
        pairs = zip(logprobs(model, row, *names), logprobs(reference, row, *names), strict=True)
        source, own, rejected = (0.5 * (now[0] - then[0]) for now, then in pairs)
        expected.append(math.log1p(math.exp(-(0.8 * source + 0.2 * own - rejected))))
    # An evaluation uses the final weight.
    assert loss_of(trainer, rows[:3]) == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert logged(trainer)[-1] < logged(trainer)[0]


def test_wrpo_trains_an_adapter_against_the_model_without_it(material, run_folder):
    path = row_folder(run_folder / "scored", with_own())
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "learning_rate": 0.01}
    settings = preference(
        material,
        run_folder,
        path,
        fusion={"pairs": OWN, "wrpo": {"alpha": 0.5, "schedule": "constant"}},
        trainer_cls=f"{TRAINERS}.WRPOTrainer",
        **lora,
    )
    trainer = train(settings, run_folder)
    assert logged(trainer, "alpha") == [0.5] * 3
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert logged(trainer)[-1] < math.log(2) - 0.005
    row = trainer.train_dataset[0]
    model, names = trainer.model.eval(), ("source_ids", "chosen_ids", "rejected_ids")
    now = logprobs(model, row, *names)
    with model.disable_adapter():
        then = logprobs(model, row, *names)
    source, own, rejected = (0.5 * (a[0] - b[0]) for a, b in zip(now, then, strict=True))
    expected = math.log1p(math.exp(-(0.5 * source + 0.5 * own - rejected)))
    assert loss_of(trainer, [row]) == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def answers(material, tmp_path_factory):
    """A folder of scored responses, and what two models say about them."""
    folder = tmp_path_factory.mktemp("infifpo")
    path = row_folder(folder / "scored", scored(6))
    for name in ("target", "digits"):
        capture(path, material.folder / name, folder / name, top_k=2)
    return folder


def reference(answers, *names, **changes):
    sources = [{"name": name, "store": str(answers / name), "is_target": name == "target"} for name in names]
    return {"pairs": {"rule": "across_sources"} | ANY_GAP, "reference": {"sources": sources} | changes}


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm"])
def test_with_the_target_as_the_only_source_infifpo_is_dpo(material, answers, run_folder, loss):
    """Step by step, as exactly as float32 adds up log-probabilities in batches of another size."""
    beta = {"sigmoid": 0.5, "sigmoid_norm": 5.0}[loss]
    common = {"dpo_loss_type": [loss], "val_set_size": 0.34, "eval_steps": 3, "rl_beta": beta}
    pairs = {"pairs": {"rule": "across_sources"} | ANY_GAP}
    plain = train(
        preference(material, run_folder / "dpo", answers / "scored", fusion=pairs, **common), run_folder / "dpo"
    )
    settings = preference(
        material,
        run_folder / "infifpo",
        answers / "scored",
        fusion=reference(answers, "target"),
        trainer_cls=f"{TRAINERS}.InfiFPOTrainer",
        **common,
    )
    fused = train(settings, run_folder / "infifpo")
    assert fused.ref_model is None
    for name in ("loss", "eval_loss"):
        assert logged(fused, name) == pytest.approx(logged(plain, name), abs=1e-5), name
    margins = [[margin / beta for margin in logged(run, "rewards/margins")] for run in (fused, plain)]
    assert margins[0] == pytest.approx(margins[1], abs=5e-5)
    assert logged(plain)[-1] < logged(plain)[0] - 0.05
    weights = zip(fused.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.allclose(one, other, atol=2e-5) for one, other in weights)


def test_infifpo_takes_what_sources_with_another_tokenizer_say(material, answers, run_folder, monkeypatch):
    from axolotl import train as host

    from fusion_plugins.core.fusion.answers import answer_logprob
    from fusion_plugins.store import open_store

    def refuse(*args, **kwargs):
        raise AssertionError("a reference model is loaded")

    monkeypatch.setattr(host, "setup_reference_model", refuse)
    settings = preference(
        material,
        run_folder,
        answers / "scored",
        fusion=reference(answers, "digits", "target", rule="mean"),
        trainer_cls=f"{TRAINERS}.InfiFPOTrainer",
        dpo_loss_type=["sigmoid_norm"],
    )
    trainer = train(settings, run_folder)
    assert len(logged(trainer)) == 3
    report = json.loads((run_folder / "model" / "fusion_pairs.json").read_text())
    assert (report["pairs"], report["missing_from_stores"]) == (6, [])
    rows = {trainer.processing_class.decode(row["chosen_ids"]): row for row in trainer.train_dataset}
    from fusion_plugins.core.text.content_id import content_id

    stores = [open_store(answers / name) for name in ("digits", "target")]
    for n in range(6):
        row = rows[f"far says {n}, more.</s>"]
        for side, text, clip in (
            ("chosen", f"far says {n}, more.", max),
            ("rejected", f"far says {n}, no no more.", min),
        ):
            chat = [{"role": "user", "content": f"Say {n}!"}, {"role": "assistant", "content": text}]
            totals = [answer_logprob(store[content_id(chat)], store.table) for store in stores]
            mean = clip(total / tokens for total, tokens in totals)
            assert row[f"ref_{side}_logps"] == pytest.approx(mean * len(row[f"{side}_ids"]), abs=1e-6)


def test_a_reference_of_other_answers_or_of_another_model_is_refused(material, answers, run_folder):
    infifpo = {"trainer_cls": f"{TRAINERS}.InfiFPOTrainer"}
    other = row_folder(run_folder / "scored", scored(7))
    block = reference(answers, "digits", rule="mean", clip=False)
    with pytest.raises(
        MismatchError, match=r"1 of 7 pairs are not in every store.*prompt 'p6'.*has no record of the ch"
    ):
        prepare(preference(material, run_folder, other, fusion=block, **infifpo), run_folder)
    block["on_missing_text"] = "skip"
    _, rows = prepare(preference(material, run_folder, other, fusion=block, **infifpo), run_folder)
    assert len(rows) == 6
    report = json.loads((run_folder / "model" / "fusion_pairs.json").read_text())
    assert [each["row"][:11] for each in report["missing_from_stores"]] == ["prompt 'p6'"]
    block = reference(answers, "digits", "target")
    stranger = material.folder / "digits"
    with pytest.raises(MismatchError, match=r"is marked as the target's own .*digits|marked as the target model's own"):
        prepare(
            preference(material, run_folder, answers / "scored", fusion=block, base_model=str(stranger), **infifpo),
            run_folder,
        )


def test_fusepo_weighs_one_pair_of_every_source(material, run_folder):
    rows = [row | {"reward": row["reward"] + {"near": 0, "also": 1, "far": 2}[row["source"]]} for row in scored(4)]
    path = row_folder(run_folder / "scored", rows)
    pairs = {"per_prompt": "all", "weighted": True, "weight_temperature": 2.0} | ANY_GAP
    settings = preference(
        material,
        run_folder,
        path,
        fusion={"pairs": pairs},
        trainer_cls=f"{TRAINERS}.FusePOTrainer",
        dpo_loss_type=["sigmoid_norm", "sigmoid"],
        dpo_loss_weights=[0.75, 0.25],
    )
    trainer = train(settings, run_folder)
    rows = list(trainer.train_dataset)
    rewards = {"near": 0.5, "also": 1.501, "far": 2.502}
    total = sum(math.exp(reward / 2) for reward in rewards.values())
    share = {name: math.exp(reward / 2) / total for name, reward in rewards.items()}
    decode = trainer.processing_class.decode
    assert len(rows) == 12
    for row in rows:
        assert row["weight"] == pytest.approx(3 * share[decode(row["chosen_ids"]).split()[0]])
    assert sum(row["weight"] for row in rows) == pytest.approx(12)
    names, expected = ("chosen_ids", "rejected_ids"), []
    for row in rows[:4]:
        pairs = zip(logprobs(trainer.model.eval(), row, *names), logprobs(trainer.ref_model, row, *names), strict=True)
        (chosen, long), (rejected, short) = ((now[0] - then[0], now[1]) for now, then in pairs)
        per_token, whole = (torch.tensor(0.5 * each) for each in (chosen / long - rejected / short, chosen - rejected))
        expected.append(row["weight"] * float(-0.75 * logsigmoid(per_token) - 0.25 * logsigmoid(whole)))
    assert loss_of(trainer, rows[:4]) == pytest.approx(sum(expected) / 4, abs=1e-5)
    assert logged(trainer, "rewards/margins")[-1] > 0


def test_fusesft_weighs_the_best_answer_of_every_source(material, run_folder):
    rows = [row | {"reward": row["reward"] + {"near": 0, "also": 1, "far": 2}[row["source"]]} for row in scored(4)]
    path = row_folder(run_folder / "scored", rows)
    settings = config(
        material,
        run_folder,
        datasets=[{"path": str(path), "type": BEST}],
        fusion={"sources": [], "sft": {"per_prompt": "all", "weight_temperature": 0.5}},
        gradient_accumulation_steps=3,
        learning_rate=1e-12,
        max_steps=1,
        **{key: value for key, value in STEADY.items() if key != "learning_rate"},
    )
    trainer = train(settings, run_folder)
    assert type(trainer).__name__ == "WeightedTrainer"
    total = sum(math.exp(reward / 0.5) for reward in (0.5, 1.501, 2.502))
    share = {name: math.exp(reward / 0.5) / total for name, reward in (("near", 0.5), ("also", 1.501), ("far", 2.502))}
    rows = list(trainer.train_dataset)
    assert len(rows) == 12
    tokenizer = trainer.processing_class
    for row in rows:
        answer = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert row["weight"] == pytest.approx(3 * share[answer.split()[0]])
    # The loss of a batch is the formula over its rows.
    seen = next(iter(trainer.get_train_dataloader()))
    loss, tokens = 0.0, 0
    weights = seen["token_weights"].view(torch.float32)
    with torch.no_grad():
        for ids, labels, weight in zip(seen["input_ids"], seen["labels"], weights, strict=True):
            found = trainer.model.eval()(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            for place in range(1, len(ids)):
                if labels[place] != -100:
                    loss -= float(weight[place]) * float(found[place - 1, labels[place]])
                    tokens += 1
        got = float(trainer.compute_loss(trainer.model, dict(seen), num_items_in_batch=torch.tensor(tokens)))
    assert got == pytest.approx(loss / tokens, abs=1e-5)
    report = json.loads((run_folder / "model" / "fusion_sft.json").read_text())
    assert report["by_source"] == {"also": 4, "far": 4, "near": 4}


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_keep_their_weights_when_they_are_padded_or_packed(side):
    from axolotl.utils.collators import DataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq

    tokenizer = copy.deepcopy(tiny.sentencepiece_bpe())
    tokenizer.padding_side, tokenizer.pad_token = side, "<unk>"
    rows = [
        {"input_ids": [5] * size, "attention_mask": [1] * size, "labels": [5] * size, "position_ids": [*range(size)]}
        | ({} if weight is None else {"weight": weight})
        for size, weight in ((2, 0.5), (3, 1.75), (1, None))
    ]
    padded = WeightedCollator(tokenizer, inner=DataCollatorForSeq2Seq)(rows)
    weights = padded["token_weights"].view(torch.float32)
    own = padded["labels"] != -100
    assert [row[mask].tolist() for row, mask in zip(weights, own, strict=True)] == [[0.5] * 2, [1.75] * 3, [1.0]]
    packed = WeightedCollator(tokenizer, inner=V2BatchSamplerDataCollatorForSeq2Seq)([rows[:2], rows[2:]])
    weights, own = packed["token_weights"].view(torch.float32), packed["labels"] != -100
    assert [row[mask].tolist() for row, mask in zip(weights, own, strict=True)] == [[0.5] * 2 + [1.75] * 3, [1.0]]
    assert "weight" not in packed


def test_the_weighted_loss_is_its_formula_and_its_gradient():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[-100, 3, 1, -100], [2, -100, 0, 4]])
    weights = torch.rand(2, 4, generator=draw, dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    terms = [
        -float(weights[b, t]) * float(logprobs[b, t - 1, labels[b, t]])
        for b in range(2)
        for t in range(1, 4)
        if labels[b, t] != -100
    ]
    assert float(weighted_loss(logits, labels, weights)) == pytest.approx(sum(terms) / 4, abs=1e-9)
    assert float(weighted_loss(logits, labels, weights, 10)) == pytest.approx(sum(terms) / 10, abs=1e-9)
    assert torch.autograd.gradcheck(lambda given: weighted_loss(given, labels, weights), (logits,))


def test_what_does_not_belong_together_is_refused(material, run_folder):
    path = row_folder(run_folder / "scored", scored(3))

    def refused(message, error=ConfigError, **changes):
        with pytest.raises(error, match=message):
            prepare(preference(material, run_folder, path, **changes), run_folder)

    wrpo, infifpo, fusepo = (f"{TRAINERS}.{name}Trainer" for name in ("WRPO", "InfiFPO", "FusePO"))
    refused(
        "needs pairs of the target itself, fusion.pairs.rule: own_answers; got same_source",
        trainer_cls=wrpo,
        fusion={"pairs": {}},
    )
    refused("own_answers needs own_source", fusion={"pairs": {"rule": "own_answers"}})
    refused("expected responses of the source 'sft', got those of also, far, near", DataError, fusion={"pairs": OWN})
    refused("fusion.wrpo is for .*WRPOTrainer` alone", fusion={"pairs": {}, "wrpo": {}})
    refused("needs fusion.reference, the stores", trainer_cls=infifpo, fusion={"pairs": {}})
    refused("fusion.pairs.weighted is for .*FusePOTrainer", fusion={"pairs": {"weighted": True}})
    refused("needs fusion.pairs.weighted: true", trainer_cls=fusepo, fusion={"pairs": {}})
    weighted = {"pairs": {"weighted": True, "per_prompt": "all"}}
    refused(
        "expected one of hinge, ipo, sigmoid, sigmoid_norm with .*, got 'robust'",
        trainer_cls=fusepo,
        fusion=weighted,
        dpo_loss_type=["robust"],
    )
    refused(
        "expected one of sigmoid with .*, got 'ipo'", trainer_cls=wrpo, fusion={"pairs": OWN}, dpo_loss_type=["ipo"]
    )
    refused(
        "precompute_ref_log_probs cannot be", trainer_cls=wrpo, fusion={"pairs": OWN}, precompute_ref_log_probs=True
    )
    refused("needs `rl: dpo`, got 'ipo'", trainer_cls=wrpo, fusion={"pairs": OWN}, rl="ipo", dpo_loss_type=None)
    store = {"sources": [{"name": "a", "store": "nowhere"}]}
    refused("needs the target's own store", trainer_cls=infifpo, fusion={"pairs": {}, "reference": store})
    store |= {"clip": False, "rule": "mean"}
    refused("source 'a': .*nowhere", trainer_cls=infifpo, fusion={"pairs": {}, "reference": store})
