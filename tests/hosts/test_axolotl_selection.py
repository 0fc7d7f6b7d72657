"""Who trains on what: brute force, own answers, verified and weighted answers, and which loss takes which pairs."""

import copy
import json
import re
from collections import Counter

import pytest
import selection_reference
import tiny
import yaml
from axolotl_runs import PLUGIN, ROOT, scored
from bench_select import chosen

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.guards import check_config
from fusion_plugins.axolotl.multi_source_dpo import write_texts
from fusion_plugins.axolotl.preference_rows import preference_row, supervised_row
from fusion_plugins.axolotl.selection import choose_best, choose_pairs, choose_triples, weigh
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer
from fusion_plugins.config import validate
from fusion_plugins.core.preferences.candidates import answer_id
from fusion_plugins.errors import ConfigError
from fusion_plugins.inputs import read_texts

DPO = "fusion_plugins.multi_source_dpo"
ANY_GAP = {"min_gap": "none", "max_gap": "none"}


def table(rows):
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


@pytest.mark.parametrize("seed", range(4))
def test_the_counts_of_both_stages_are_those_of_plain_loops(seed):
    rows = selection_reference.responses(2500, seed)
    counts = selection_reference.counts(rows)
    assert chosen(table(rows)) == counts
    assert min(counts["sft"], counts["dpo"], *counts["dropped"].values()) > 0


def own(prompts, name="sft"):
    """The target's own answers, with the highest rewards of all."""
    return [
        row | {"source": name, "response": f"I say {row['index']}", "reward": 99.0 - row["index"]}
        for row in scored(prompts)
        if row["source"] == "near"
    ]


def test_own_answers_are_no_sources():
    rows = table(scored(4) + own(4))
    best, report = choose_best(rows, FusionBlock(sft={}, pairs={"own_source": "sft"}))
    assert report["by_source"] == {"far": 4}
    for rule in ("same_source", "across_sources"):
        pairs, _ = choose_pairs(rows, FusionBlock(pairs={"rule": rule, "own_source": "sft", **ANY_GAP}))
        assert {pair.chosen.source for pair in pairs} == {"far"}
    # Without the name they are those of any source.
    assert choose_best(rows, FusionBlock(sft={}))[1]["by_source"] == {"sft": 4}


def test_own_answers_change_nothing_about_who_trains_what():
    """The first stage has none yet; what it divided must stay so."""
    verdicts = [row | {"reward": None, "correct": row["index"] == 1, "domain": "math"} for row in scored(20)]
    added = [row | {"reward": None, "correct": True, "domain": "math"} for row in own(20)]
    own_rule = {"rule": "own_answers", "own_source": "sft", **ANY_GAP}
    for rows, more, rule in ((scored(20), own(20), "reward"), (verdicts, added, "verdict")):
        common = {"sft": {"rule": rule}, "split": {"verified_dpo_share": 0.5}}
        plain = {"rule": "verdict"} if rule == "verdict" else ANY_GAP
        for pairs in (plain | {"own_source": "sft"}, own_rule):
            block = FusionBlock(pairs=pairs, **common)
            before, after = (choose_best(table(each), block) for each in (rows, rows + more))
            assert [key.prompt_id for key in before[0]] == [key.prompt_id for key in after[0]]
            assert before[1]["split"] == after[1]["split"]
            assert 0 < before[1]["split"]["sft"] < 20


def test_wrpo_takes_own_pairs_of_the_prompts_that_the_first_stage_left():
    rows = table(scored(20) + own(17))
    own_rule = {"rule": "own_answers", "own_source": "sft", **ANY_GAP}
    block = FusionBlock(sft={}, pairs=own_rule, split={"sft_share": 0.25})
    learnt, _ = choose_best(rows, block)
    triples, report = choose_triples(rows, block)
    assert (len(learnt), report["split"]["dpo"]) == (5, 15)
    prompts = {pair.chosen.prompt_id for pair, _ in triples}
    assert prompts.isdisjoint(each.prompt_id for each in learnt)
    assert (
        len(prompts)
        == len(triples)
        == report["triples"]
        == len({f"p{n}" for n in range(17)} - {e.prompt_id for e in learnt})
    )
    assert {(pair.chosen.source, pair.rejected.source, best.source) for pair, best in triples} == {
        ("sft", "sft", "far")
    }
    # After a first stage that divided by other pairs.
    first = FusionBlock(sft={}, pairs=ANY_GAP, split={})
    second = FusionBlock(sft={}, pairs=own_rule, split={"pairs": {"own_source": "sft", **ANY_GAP}})
    learnt, _ = choose_best(table(scored(20)), first)
    triples, report = choose_triples(rows, second)
    assert report["split"] == {"sft": 8, "dpo": 12, "dropped": {}}
    assert {pair.chosen.prompt_id for pair, _ in triples}.isdisjoint(each.prompt_id for each in learnt)


def test_only_verified_answers_are_learnt_where_that_is_asked_for():
    rows = scored(6)
    for row in rows:
        number = int(row["prompt_id"][1:])
        row["correct"] = None if number < 3 else row["index"] == 2
    best, report = choose_best(table(rows), FusionBlock(sft={"only_verified": True}))
    assert {each.prompt_id for each in best} == {"p3", "p4", "p5"}
    assert all(each.correct for each in best)
    assert report["dropped_prompts"] == {"none_verified": 3}
    assert len(choose_best(table(rows), FusionBlock(sft={}))[0]) == 6


def test_verdicts_that_a_program_can_forge_count_only_where_they_may(capsys):
    rows = [row | {"domain": "code", "correct": row["index"] == 0} for row in scored(6)]
    for row in rows:
        trust = "inside" if row["prompt_id"] in ("p0", "p1") else "outside"
        scores = {"reward": {"reward": 1.0}, "code": {"correct": row["correct"], "trust": trust}}
        row["scores"] = json.dumps(scores) if row["source"] == "far" else scores
    sure = {"p2", "p3", "p4", "p5"}
    for settings in ({"sft": {}}, {"pairs": ANY_GAP}):
        choose = choose_best if "sft" in settings else choose_pairs
        every, found = (
            choose(table(rows), FusionBlock(**settings)),
            choose(table(rows), FusionBlock(min_trust="outside", **settings)),
        )
        prompts = [{getattr(each, "chosen", each).prompt_id for each in chosen} for chosen, _ in (every, found)]
        assert prompts == [sure | {"p0", "p1"}, sure]
        assert found[1]["dropped_prompts"] == {"no_verdict": 2}
        assert "fusion.min_trust: 18 of 54 responses have a verdict that does not count" in " ".join(
            capsys.readouterr().err.split()
        )
    # A verdict on an answer in words is no program's.
    for row in rows:
        row["scores"] = {"math": {"correct": row["correct"]}}
    assert len(choose_best(table(rows), FusionBlock(sft={}, min_trust="outside"))[0]) == 6


def test_every_source_is_learnt_and_counted_where_all_are_asked_for():
    rows = scored(5) + own(5)
    block = FusionBlock(sft={"per_prompt": "all"}, pairs={"own_source": "sft", **ANY_GAP}, split={"sft_share": 0.4})
    answers, report = choose_best(table(rows), block)
    assert report["by_source"] == {"also": 2, "far": 2, "near": 2}
    assert Counter(each.prompt_id for each in answers) == dict.fromkeys({each.prompt_id for each in answers}, 3)
    assert {each.index for each in answers} == {0}


def test_the_answers_of_the_pairs_are_texts_for_fusion_capture(tmp_path):
    pairs, _ = choose_pairs(table(scored(3)), FusionBlock(pairs={"per_prompt": "all", **ANY_GAP}))
    write_texts(tmp_path / "new" / "pairs.jsonl", [*pairs, pairs[0]])
    texts = read_texts(tmp_path / "new" / "pairs.jsonl")
    assert len(texts) == 18
    assert {text.id for text in texts} == {answer_id(each) for pair in pairs for each in (pair.chosen, pair.rejected)}


# Which loss takes which pairs: the table of the page on preference losses

PAIR_SETS = {
    "same source": {"rule": "same_source"},
    "across sources": {"rule": "across_sources"},
    "verdict": {"rule": "verdict"},
    "own answers": {"rule": "own_answers", "own_source": "sft"},
}
FURTHER = {"InfiFPO": {"reference": {"rule": "mean", "clip": False, "sources": [{"name": "a", "store": "stores/a"}]}}}


def losses_of_the_page():
    page = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w -]+) \| (`rl: .*?) \| (.*?) \| .* \|$", page, re.MULTILINE)
    suits = ""
    for name, settings, pairs in rows:
        suits = suits if pairs.startswith("the same") else pairs
        given = {}
        for part in re.findall("`(.*?)`", settings):
            given |= yaml.safe_load(part)
        yield name, given, suits


LOSSES = list(losses_of_the_page())


def test_the_page_has_all_losses():
    names = ["DPO", "length-normalised DPO", "IPO", "SimPO", "ORPO", "WRPO", "InfiFPO", "FusePO"]
    assert [name for name, _, _ in LOSSES] == names


@pytest.mark.parametrize(("name", "settings", "suits"), LOSSES, ids=[name for name, _, _ in LOSSES])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pairs", PAIR_SETS)
def test_a_loss_takes_the_pairs_that_the_page_says(name, settings, suits, pairs, weighted):
    asked = {"weighted": True, "per_prompt": "all"} if weighted else {}
    block = {"pairs": PAIR_SETS[pairs] | asked, **FURTHER.get(name, {})}
    cfg = {"plugins": [PLUGIN], "datasets": [{"path": "scored", "type": DPO}], "fusion": block} | settings
    fits = pairs in suits and weighted == (name == "FusePO")
    if fits:
        check_config(copy.deepcopy(cfg))
    else:
        with pytest.raises(ConfigError, match=r"pairs of the target itself|fusion.pairs.weighted|weighted compares"):
            check_config(cfg)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "per_prompt: 1 leaves one"),
        ({"per_prompt": 1, "rule": "verdict"}, "per_prompt: 1 leaves one"),
        ({"per_prompt": "all", "rule": "across_sources"}, "the rule across_sources makes one"),
        ({"per_prompt": 3, "rule": "own_answers", "own_source": "sft"}, "the rule own_answers makes one"),
    ],
)
def test_weights_of_one_pair_per_prompt_are_refused(settings, why):
    with pytest.raises(ConfigError, match=f"weighted compares the pairs of one prompt, and {why}.*per_prompt: all"):
        validate(FusionBlock, {"pairs": {"weighted": True, **settings}}, where="fusion")
    for pairs in ({"per_prompt": 2, **ANY_GAP}, {"per_prompt": "all", "rule": "verdict"}):
        FusionBlock(pairs=pairs | {"weighted": True})


def test_answers_that_leave_nothing_to_weigh_are_told(capsys):
    def told(rows, **sft):
        answers, report = choose_best(table(rows), FusionBlock(sft={"per_prompt": "all", **sft}))
        weights = weigh(answers, 1.0, "fusion.sft.per_prompt: all", report)
        assert sum(weights) == pytest.approx(len(answers))
        said = " ".join(capsys.readouterr().err.split())
        assert all(warning in said for warning in report["warnings"])
        return report["prompts_with_several"], [each for each in report["warnings"] if "per_prompt: all" in each]

    rows = scored(4)
    assert told(rows) == (4, [])
    count, (warning,) = told([row for row in rows if row["source"] == "far"])
    assert count == 0
    assert "not one of 4 prompts has two to weigh" in warning
    judged = [row | {"reward": None, "correct": row["index"] == 0} for row in rows]
    count, (warning,) = told(judged, rule="verdict")
    assert count == 4
    assert "not one answer has a reward" in warning


# Special tokens that an answer names


@pytest.mark.parametrize("name", ["sentencepiece_bpe", "byte_level", "mistral_v1"])
@pytest.mark.parametrize(
    "text",
    ["use {eos} to end", "{eos} b", "x {eos}{eos} y {bos} z", "{bos} q", "a{eos}", "{bos}", "end {eos}\n b", "{unk} a"],
)
def test_special_tokens_in_an_answer_have_the_same_labels_in_every_kind_of_training(name, text):
    tokenizer = getattr(tiny, name)()
    tokens = {"eos": tokenizer.eos_token, "bos": tokenizer.bos_token or "<s>", "unk": tokenizer.unk_token or "<unk>"}
    text = text.format(**tokens)
    target = TargetTokenizer.of(tokenizer, {})
    answer = target.answer("Hi?", text)
    learnt = [label for label in supervised_row(answer)["labels"] if label != -100]
    assert preference_row(answer, target.answer("Hi?", "other"))["chosen_ids"] == learnt
    fused = target.encode([{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": text}])
    assert [label for label in fused.labels.tolist() if label != -100] == learnt
    assert fused.tokens.input_ids.tolist()[: len(answer.input_ids)] == answer.input_ids


def test_the_first_stage_asks_only_the_pairs_that_divide_the_prompts():
    """Its own, which it does not train on, may have limits of another reward model or need rewards that nobody gave."""
    rewarded = [row | {"scores": {"reward": {"reward": 1.0, "model": "Skywork"}}} for row in scored(20)]
    judged = [row | {"reward": None, "correct": bool(row["index"])} for row in scored(20)]
    for rows, sft, pairs in ((rewarded, {}, ANY_GAP), (judged, {"rule": "verdict"}, {"rule": "verdict"})):
        alone = FusionBlock(sft=sft, split={"pairs": pairs, "verified_dpo_share": 0.5})
        with_pairs = FusionBlock(sft=sft, pairs=pairs, split={"verified_dpo_share": 0.5})
        assert choose_best(table(rows), alone) == choose_best(table(rows), with_pairs)
        with pytest.raises(ConfigError, match="ArmoRM|expected rewards"):
            choose_best(table(rows), FusionBlock(sft=sft, split={}))


def answers_of(skills, prompts=60, samples=3):
    """Scored answers to sums: of each source, the share ``skill`` of the prompts is right."""
    return [
        {
            "prompt_id": f"p{prompt}",
            "source": source,
            "index": index,
            "prompt": f"Sum {prompt}?",
            "response": f"It is {answer}, {index}",
            "correct": answer == gold,
            "domain": "math",
            "scores": {"math": {"correct": answer == gold, "answer": answer, "gold": gold}},
        }
        for prompt in range(prompts)
        for source, skill in skills.items()
        for index in range(samples)
        for gold in [str(prompt * 7 % 11)]
        for answer in [skill if isinstance(skill, str) else gold if (prompt % 10 + index) / 10 < skill else "no"]
    ]


VERDICTS = {"sft": {"rule": "verdict"}, "pairs": {"rule": "verdict", "own_source": "own"}}


@pytest.mark.parametrize("choose", [choose_best, choose_pairs])
def test_answers_of_sources_that_are_worse_than_the_target_or_lucky_are_warned_of(choose, capsys):
    rows = table(answers_of({"weak": 0.2, "constant": "7", "strong": 0.8, "own": 0.5}))
    _, report = choose(rows, FusionBlock(**VERDICTS))
    told = capsys.readouterr().err
    if choose is choose_best:
        assert len(report["warnings"]) == 1  # of the constant answers; the strong source solves the others
    chosen = "weak" if choose is choose_pairs else "constant"
    sources = table(answers_of({chosen: 0.2 if chosen == "weak" else "7", "own": 0.5}))
    _, report = choose(sources, FusionBlock(**VERDICTS))
    (warning,) = report["warnings"]
    assert re.search(rf"math: \d+ of the answers .* are those of {chosen}, which is right in .* worse than", warning)
    assert f"fusion.leave_out_sources: [{chosen}]" in warning
    assert warning in capsys.readouterr().err
    assert "no answers of the target" not in told


def test_a_better_source_gives_no_warning_and_no_own_answers_give_a_note(capsys):
    _, report = choose_best(table(answers_of({"strong": 0.8, "own": 0.5})), FusionBlock(**VERDICTS))
    assert report["warnings"] == []
    assert capsys.readouterr().err == ""
    _, report = choose_best(table(answers_of({"strong": 0.8, "constant": "7"})), FusionBlock(sft={"rule": "verdict"}))
    (warning,) = report["warnings"]
    assert re.search("constant, which is right in .*, and in .* where its answers are dealt .* is luck", warning)
    assert "math: there are no answers of the target itself" in capsys.readouterr().err


def test_sources_can_be_left_out_by_name():
    rows = table(answers_of({"weak": 0.9, "strong": 0.8}))
    _, report = choose_best(rows, FusionBlock(sft={"rule": "verdict"}, leave_out_sources=["weak"]))
    assert report["by_source"] == {"strong": 48}
    with pytest.raises(ConfigError, match=r"expected sources of the responses \(strong, weak\), got wek"):
        choose_best(rows, FusionBlock(sft={}, leave_out_sources=["wek"]))
    with pytest.raises(ConfigError, match="at least one source to stay, got all of strong, weak"):
        choose_best(rows, FusionBlock(sft={}, leave_out_sources=["weak", "strong"]))
