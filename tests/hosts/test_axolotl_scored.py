"""Supervised training on the best responses and preference training on pairs, from scored responses."""

import copy
import json
from pathlib import Path

import pytest
import tiny
import trl
from axolotl_runs import config, logged, prepare, row_folder, scored, train, write_rows

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.scored_rows import candidates_of
from fusion_plugins.axolotl.selection import choose_best, choose_pairs
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer
from fusion_plugins.errors import ConfigError, DataError, PluginError

BEST = "fusion_plugins.axolotl.best_of_sources"
DPO = "fusion_plugins.multi_source_dpo"


def preference(material, folder, path, **changes):
    dpo = {"rl": "dpo", "rl_beta": 10.0, "dpo_loss_type": ["sigmoid_norm"], "logging_steps": 1}
    return config(material, folder, datasets=[{"path": str(path), "type": DPO}], **(dpo | changes))


def only_pairs(**pairs):
    return {"sources": [], "pairs": pairs}


def supervised_part(row):
    """The ids before the answer and those of the answer."""
    first = next(place for place, label in enumerate(row["labels"]) if label != -100)
    return row["input_ids"][:first], row["input_ids"][first:]


def test_pairs_train_with_the_length_normalised_loss(material, run_folder):
    path = row_folder(run_folder / "scored", scored())
    settings = preference(material, run_folder, path, fusion=only_pairs(), pad_to_multiple_of=8)
    trainer = train(settings, run_folder)
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = tiny.sentencepiece_bpe()
    texts = [
        tokenizer.decode(ids[mask == 1]) for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert all(text.startswith("also says") and text.endswith("more.</s>") for text in texts)
    whole = [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    # One BOS, as SFT has it: these are the very ids that the other dataset type makes of the same conversations.
    target = TargetTokenizer.of(tokenizer, {})
    answers = {(n, no): f"also says {n}, {no}more." for n in range(10) for no in ("", "no no ")}
    supervised = [target.answer(f"Say {n}!", text).input_ids for (n, _), text in answers.items()]
    assert len(whole) == 4
    assert all(ids in supervised and ids.count(1) == 1 for ids in whole)
    assert batch["input_ids"].shape[1] % 8 == 0
    losses = logged(trainer)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]
    report = json.loads((run_folder / "model" / "fusion_pairs.json").read_text())
    assert (report["prompts"], report["kept"], report["pairs"]) == (10, 10, 10)
    assert report["lengths"]["instruction/also/chosen"]["count"] == 10


@pytest.mark.parametrize("form", ["folder", "jsonl", "parquet"])
def test_a_pair_is_what_the_template_writes_around_two_responses_of_one_source(material, run_folder, form):
    rows = scored(4)
    if form == "folder":
        path = row_folder(run_folder / "scored", rows)
    elif form == "jsonl":
        path = write_rows(run_folder / "scored.jsonl", rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = run_folder / "scored.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    _, pairs = prepare(preference(material, run_folder, path, fusion=only_pairs()), run_folder)
    found = {row["prompt"]: (row["chosen"], row["rejected"]) for row in pairs}
    # Of the sources with a gap of at most 0.1, "also" has the higher best reward; "far" is out.
    assert found == {
        f"<s>[INST] Say {n}! [/INST]": (f" also says {n}, more.</s>", f" also says {n}, no no more.</s>")
        for n in range(4)
    }


def test_all_responses_to_a_prompt_are_seen_together(material, run_folder):
    """Rows in an order that any cut into parts would tear apart."""
    rows = sorted(scored(12), key=lambda row: (row["index"], row["source"], row["prompt_id"]))
    path = write_rows(run_folder / "scored.jsonl", rows)
    settings = preference(material, run_folder, path, fusion=only_pairs())
    cfg, pairs = prepare(settings, run_folder)
    assert len(pairs) == 12
    assert cfg.dataset_num_proc == settings["dataset_num_proc"]


def test_the_best_response_of_any_source_is_learnt(material, run_folder):
    path = row_folder(run_folder / "scored", scored())
    settings = config(
        material, run_folder, datasets=[{"path": str(path), "type": BEST}], fusion={"sources": [], "sft": {}}
    )
    _, rows = prepare(settings, run_folder)
    tokenizer = tiny.sentencepiece_bpe()
    learnt = {tokenizer.decode([label for label in row["labels"] if label != -100]) for row in rows}
    assert learnt == {f"far says {n}, more.</s>" for n in range(10)}
    trainer = train(settings, run_folder)
    assert type(trainer).__name__ == "AxolotlTrainer"
    report = json.loads((run_folder / "model" / "fusion_sft.json").read_text())
    assert report["by_source"] == {"far": 10}


def test_the_two_stages_share_no_prompt(material, run_folder):
    path = row_folder(run_folder / "scored", scored(20))
    fusion = {"sources": [], "pairs": {}, "sft": {}, "split": {"sft_share": 0.4}}
    sft = config(material, run_folder, datasets=[{"path": str(path), "type": BEST}], fusion=fusion)
    _, answers = prepare(sft, run_folder)
    _, pairs = prepare(preference(material, run_folder, path, fusion=fusion), run_folder)
    assert (len(answers), len(pairs)) == (8, 12)
    tokenizer = tiny.sentencepiece_bpe()
    prompts = {tokenizer.decode(row["input_ids"]).partition("[/INST]")[0].partition("[INST]")[2] for row in answers}
    assert prompts.isdisjoint({row["prompt"].partition("[INST]")[2].partition("[/INST]")[0] for row in pairs})


@pytest.mark.slow
@pytest.mark.parametrize(("rl", "setting"), [("ipo", "rl_beta"), ("simpo", "simpo_gamma"), ("orpo", "orpo_alpha")])
def test_every_kind_of_preference_training_takes_the_ids_as_they_are(material, run_folder, rl, setting):
    """Beside rows of another dataset type, which the trainer tokenizes as ever."""
    ours = {"path": str(row_folder(run_folder / "scored", scored(4))), "type": DPO}
    stock = {f"{name}_format": f"{{{name}}}" for name in ("prompt", "chosen", "rejected")}
    stock |= {f"field_{name}": name for name in ("prompt", "chosen", "rejected")}
    rows = [{"prompt": "Say", "chosen": "yes", "rejected": "no"}]
    others = {"path": str(write_rows(run_folder / "stock.jsonl", rows)), "type": stock}
    datasets = [ours] if rl == "orpo" else [ours, others]
    changes = {"rl": rl, setting: 0.5, "datasets": datasets, "fusion": only_pairs()}
    trainer = train(config(material, run_folder, **changes), run_folder)
    assert trainer.state.global_step == 3
    rows = trainer.train_dataset
    if rl == "ipo":
        found = [(row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"]) for row in rows]
    else:
        prompts = [row["chosen_labels"].count(-100) for row in rows]
        found = [(row["chosen_input_ids"], row["chosen_input_ids"][:n]) for row, n in zip(rows, prompts, strict=True)]
    target = TargetTokenizer.of(tiny.sentencepiece_bpe(), {})
    for n in range(4):
        answer = target.answer(f"Say {n}!", f"also says {n}, more.")
        assert (answer.input_ids, answer.prompt_ids) in found
    assert len(found) == 3 + len(datasets)


def refusing(tokenizer):
    """A tokenizer whose template refuses the prompts that end in a question mark."""
    changed = copy.deepcopy(tokenizer)
    refusal = "{% if messages[0]['content'][-1] == '?' %}{{ raise_exception('no questions') }}{% endif %}"
    changed.chat_template = refusal + changed.chat_template
    return changed


def test_an_answer_that_the_template_refuses_is_named_and_fatal_or_left_out(material, run_folder):
    rows = scored(4)
    for row in rows:
        row["prompt"] = row["prompt"].replace("Say 2!", "Say 2?")
    rows.append(rows[0] | {"response": None, "index": 7, "source": "broken"})
    path = write_rows(run_folder / "scored.jsonl", rows)
    model = tiny.llama_checkpoint(run_folder / "refusing", tokenizer=refusing(tiny.sentencepiece_bpe()))
    fusion = {"sources": [], "pairs": {}, "sft": {}}
    sft = config(
        material, run_folder, base_model=str(model), datasets=[{"path": str(path), "type": BEST}], fusion=fusion
    )
    dpo = preference(material, run_folder, path, base_model=str(model), fusion=fusion)
    with pytest.raises(DataError, match=r"1 of 37 rows cannot be used. row 36: .*\(prompt 'p0', source 'broken'\)"):
        prepare(sft, run_folder)
    write_rows(path, rows[:-1])
    with pytest.raises(
        DataError, match="1 of 4 rows cannot be used. prompt 'p2', source 'far', sample 0: the chat tem"
    ):
        prepare(sft, run_folder)
    with pytest.raises(
        DataError, match="prompt 'p2', source 'also', sample 0 before source 'also', sample 2: the chat"
    ):
        prepare(dpo, run_folder)
    write_rows(path, rows)
    for settings, file, other in ((sft, "fusion_sft.json", "far"), (dpo, "fusion_pairs.json", "also")):
        settings["fusion"] = settings["fusion"] | {"on_unusable": "skip"}
        _, kept = prepare(settings, run_folder)
        assert len(kept) == 3
        report = json.loads((run_folder / "model" / file).read_text())
        names = [row["row"] for row in report["unusable"]]
        assert names[0] == "row 36"
        assert names[1].startswith(f"prompt 'p2', source '{other}', sample 0")
        assert "no questions" in report["unusable"][1]["reason"]


def test_pairs_that_are_too_long_are_named_and_treated_as_axolotl_is_told(material, run_folder):
    rows = scored(3)
    for row in rows:
        if row["prompt_id"] == "p1":
            row["response"] += " and so on" * 40
    path = row_folder(run_folder / "scored", rows)
    settings = preference(material, run_folder, path, fusion=only_pairs())
    _, kept = prepare(settings, run_folder)
    assert len(kept) == 2
    report = json.loads((run_folder / "model" / "fusion_pairs.json").read_text())
    assert [name[:12] for name in report["longer_than_sequence_len"]] == ["prompt 'p1',"]
    _, cut = prepare(settings | {"excess_length_strategy": "truncate"}, run_folder)
    assert sorted(len(row["prompt_ids"] + row["chosen_ids"]) == 128 for row in cut) == [False, False, True]
    with pytest.raises(
        DataError, match="1 of 3 pairs are longer than sequence_len .128 tokens., the first for prompt 'p1'"
    ):
        prepare(settings | {"excess_length_strategy": "raise"}, run_folder)


def test_reasoning_and_tool_calls_train_both_stages(material, run_folder):
    """Answers of Qwen3's kind: an SFT run and a DPO run have the same ids for them."""
    tokenizer = copy.deepcopy(tiny.byte_level())
    tokenizer.chat_template = (Path(trl.__file__).with_name("chat_templates") / "qwen3.jinja").read_text()
    model = tiny.llama_checkpoint(run_folder / "thinking", tokenizer=tokenizer)
    calls = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}]
    answers = [{"response": f"<think>\nhm\n</think>\n\nIt is {n}"} for n in (5, 6)]
    answers += [{"response": None, "tool_calls": calls}, {"response": "No idea."}]
    common = {"prompt_id": "p", "source": "s", "prompt": "2 + 3?", "tool_calls": None}
    common["tools"] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    table = {"p": answers[:2], "q": answers[2:], "r": [answers[1], answers[3]]}
    rows = [
        common | {"prompt_id": prompt} | answer | {"index": i, "correct": 1 - i}
        for prompt, pair in table.items()
        for i, answer in enumerate(pair)
    ]
    path = write_rows(run_folder / "scored.jsonl", rows)
    fusion = {"sources": [], "pairs": {"rule": "verdict"}, "sft": {"rule": "verdict"}}
    changes = {"base_model": str(model), "fusion": fusion, "special_tokens": None, "sequence_len": 2048}
    _, supervised = prepare(
        config(material, run_folder, datasets=[{"path": str(path), "type": BEST}], **changes), run_folder
    )
    _, pairs = prepare(preference(material, run_folder, path, **changes), run_folder)
    found = [supervised_part(row) for row in supervised]
    assert sorted(found) == sorted((row["prompt_ids"], row["chosen_ids"]) for row in pairs)
    assert {tokenizer.decode(answer) for _, answer in found} == {
        "<think>\nhm\n</think>\n\nIt is 5<|im_end|>",
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>',
        "<think>\nhm\n</think>\n\nIt is 6<|im_end|>",
    }
    assert all('{"type": "function", "function": {"name": "add"' in tokenizer.decode(prompt) for prompt, _ in found)


def test_a_tokenizer_without_template_takes_plain_prompts(run_folder, material):
    tokenizer = copy.deepcopy(tiny.sentencepiece_bpe())
    tokenizer.chat_template = None
    target = TargetTokenizer.of(tokenizer, {})
    answer = target.answer("1 + 1 =", " 2")
    assert (answer.prompt, answer.text) == ("1 + 1 =", " 2")
    assert tokenizer.convert_ids_to_tokens(answer.input_ids) == ["<s>", "▁1", "▁+", "▁1", "▁=", "▁2", "</s>"]
    assert tokenizer.decode(answer.answer_ids).strip() == "2</s>"
    with pytest.raises(DataError, match="no chat template"):
        target.answer([{"role": "user", "content": "?"}], "2")


def test_chatml_ends_a_turn_with_its_own_token():
    target = TargetTokenizer.of(tiny.byte_level(), {})
    answer = target.answer("Hi?", "Hello.")
    assert answer.prompt == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert answer.text == target.tokenizer.decode(answer.answer_ids) == "Hello.<|im_end|>"
    text = target.encode([{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}])
    assert target.tokenizer.decode([label for label in text.labels if label != -100]) == "Hello.<|im_end|>"


def test_truncated_responses_are_left_out_and_counted():
    rows = scored(1)
    # The second one was interrupted before its first word.
    rows[0] |= {"finish_reason": "length"}
    rows[1] |= {"finish_reason": "abort", "response": None}
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    _, report = choose_best(columns, FusionBlock(sft={}))
    assert report["dropped_responses"] == {"truncated": 2}
    _, report = choose_best(columns, FusionBlock(sft={}, keep_truncated=True))
    assert report["dropped_responses"] == {"empty_response": 1}


def test_rules_that_need_rewards_are_refused_where_there_are_only_verdicts():
    rows = [row | {"reward": None, "correct": float(row["index"] == 1)} for row in scored(4)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    by_verdict = {"sft": {"rule": "verdict"}, "pairs": {"rule": "verdict"}}
    for change, key in (({"sft": {}}, "fusion.sft.rule reward"), ({"pairs": {}}, "fusion.pairs.rule same_source")):
        block = FusionBlock(**by_verdict | change | {"split": {}})
        for choose in (choose_best, choose_pairs):
            with pytest.raises(ConfigError, match=rf"expected rewards for {key}, got .*`rule: verdict` under both"):
                choose(columns, block)
    block = FusionBlock(**by_verdict, split={})
    assert len(choose_pairs(columns, block)[0]) == 4
    # Without a split, the rule of the other stage plays no part.
    assert len(choose_best(columns, FusionBlock(sft={"rule": "verdict"}))[0]) == 4


def test_limits_are_in_both_reports_where_they_decided():
    rows = scored(4)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    block = FusionBlock(sft={}, pairs={}, split={})
    assert choose_best(columns, block)[1]["limits"] == choose_pairs(columns, block)[1]["limits"] == (0.01, 0.1)
    assert "limits" not in choose_best(columns, FusionBlock(sft={}))[1]
    unlimited = FusionBlock(sft={}, pairs={"min_gap": "none", "max_gap": "none"}, split={})
    assert "limits" not in choose_pairs(columns, unlimited)[1]


def test_prompts_that_look_like_json_stay_text():
    rows = {"prompt_id": ["a", "b"], "source": ["s"] * 2, "response": ["r"] * 2, "prompt": ['"quoted"', "[1, 2] sum?"]}
    assert [candidate.prompt for candidate in candidates_of(rows)[0]] == ['"quoted"', "[1, 2] sum?"]
    rows["prompt"] = ['"quoted"', '[{"role": "user", "content": "?"}]']
    assert [candidate.prompt for candidate in candidates_of(rows)[0]] == ["quoted", [{"role": "user", "content": "?"}]]


def test_wrong_rows_are_counted_from_the_start_of_the_table():
    columns = {
        "prompt_id": ["a", "a"],
        "source": ["s", "s"],
        "prompt": ["p", "p"],
        "response": [None, None],
        "finish_reason": ["length", "stop"],
    }
    candidates, unusable = candidates_of(columns)
    assert len(candidates) == 1
    assert [(row.row, row.reason[:46]) for row in unusable] == [
        ("row 1", "scored response in row 1 (prompt 'a', source '")
    ]


@pytest.mark.parametrize("form", ["jsonl", "folder"])
def test_prompts_may_be_chats(material, run_folder, form):
    rows = scored(4)
    for row in rows:
        # Messages need not have the same keys; a folder may mix texts and chats.
        name = {"name": "Ann"} if row["prompt_id"] == "p0" else {}
        if form == "jsonl" or row["prompt_id"] in ("p0", "p1"):
            row["prompt"] = [{"role": "user", "content": row["prompt"]} | name]
    path = (write_rows if form == "jsonl" else row_folder)(run_folder / f"scored.{form}", rows)
    fusion = {"sources": [], "pairs": {}, "sft": {}}
    sft = config(material, run_folder, datasets=[{"path": str(path), "type": BEST}], fusion=fusion)
    _, answers = prepare(sft, run_folder)
    tokenizer = tiny.sentencepiece_bpe()
    assert {tokenizer.decode(row["input_ids"]) for row in answers} == {
        f"<s> [INST] Say {n}! [/INST] far says {n}, more.</s>" for n in range(4)
    }
    _, pairs = prepare(preference(material, run_folder, path, fusion=fusion), run_folder)
    assert {row["prompt"] for row in pairs} == {f"<s>[INST] Say {n}! [/INST]" for n in range(4)}


def test_unusable_tables_are_refused(material, run_folder):
    with pytest.raises(DataError, match="expected a value for response, got none.*keys prompt_id, source, prompt"):
        choose_best({"prompt_id": ["a"], "source": ["s"], "prompt": ["p"]}, FusionBlock(sft={}))
    path = row_folder(run_folder / "scored", scored())
    with pytest.raises(DataError, match=r"expected preference pairs.*got none.*gap"):
        prepare(preference(material, run_folder, path, fusion=only_pairs(min_gap=50, max_gap=60)), run_folder)
    unscored = write_rows(run_folder / "unscored.jsonl", [row | {"reward": None} for row in scored(2)])
    sft = {"sources": [], "sft": {}}
    best = config(material, run_folder, datasets=[{"path": str(unscored), "type": BEST}], fusion=sft)
    with pytest.raises(DataError, match=r'expected best answers.*got none.*"no_reward": 2'):
        prepare(best, run_folder)
    best["fusion"]["sft"] = {"rule": "longest"}
    with pytest.raises(ConfigError, match="fusion.sft.rule: expected one of reward, verdict"):
        prepare(best, run_folder)
    with pytest.raises(PluginError, match="needs the plugin"):
        prepare(preference(material, run_folder, path, plugins=None, fusion=None), run_folder)
    with pytest.raises(ConfigError, match="minimum <= maximum"):
        prepare(preference(material, run_folder, path, fusion=only_pairs(min_gap=2)), run_folder)
    for rl in (None, "kto", "grpo"):
        with pytest.raises(ConfigError, match=r"needs `rl: dpo` \(or ipo, simpo, orpo\)"):
            prepare(preference(material, run_folder, path, fusion=only_pairs(), rl=rl), run_folder)
    with pytest.raises(ConfigError, match="rl: simpo needs simpo_gamma"):
        prepare(preference(material, run_folder, path, fusion=only_pairs(), rl="simpo"), run_folder)
    with pytest.raises(ConfigError, match="trainer_cls: trl.DPOTrainer would tokenize the pairs"):
        prepare(preference(material, run_folder, path, fusion=only_pairs(), trainer_cls="trl.DPOTrainer"), run_folder)
