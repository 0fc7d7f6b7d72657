"""Supervised training on the best responses and preference training on pairs, from scored responses."""

import json

import pytest
import tiny
from axolotl_runs import config, logged, prepare, row_folder, scored, train, write_rows

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.selection import candidates_of, choose_best
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer
from fusion_plugins.errors import ConfigError, DataError, PluginError

BEST = "fusion_plugins.axolotl.best_of_sources"
DPO = "fusion_plugins.multi_source_dpo"


def preference(material, folder, path, **changes):
    dpo = {"rl": "dpo", "rl_beta": 10.0, "dpo_loss_type": ["sigmoid_norm"], "logging_steps": 1}
    return config(material, folder, datasets=[{"path": str(path), "type": DPO}], **(dpo | changes))


def only_pairs(**pairs):
    return {"sources": [], "pairs": pairs}


def test_pairs_train_with_the_length_normalised_loss(material, run_folder):
    path = row_folder(run_folder / "scored", scored())
    trainer = train(preference(material, run_folder, path, fusion=only_pairs()), run_folder)
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


def test_a_tokenizer_without_template_takes_plain_prompts(run_folder, material):
    import copy

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
    # The second one reached the limit before its first word.
    rows[0] |= {"finish_reason": "length"}
    rows[1] |= {"finish_reason": "length", "response": None}
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    _, report = choose_best(columns, FusionBlock(sft={}))
    assert report["dropped_responses"] == {"truncated": 2}
    _, report = choose_best(columns, FusionBlock(sft={}, keep_truncated=True))
    assert report["dropped_responses"] == {"empty_response": 1}


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
    with pytest.raises(ConfigError, match="needs `rl: dpo`"):
        prepare(preference(material, run_folder, path, fusion=only_pairs(), rl=None), run_folder)
