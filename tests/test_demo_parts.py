"""The parts of the demonstration: problems, texts, tokenizers, measures, stages. The whole of it is ``make demo``."""

import json
import math
import random
import re
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))

from fusion_demo import plan, results, stages
from fusion_demo.data import read_rows, write_data
from fusion_demo.evaluate import bits_per_byte
from fusion_demo.models import MODELS, make_model
from fusion_demo.pretrain import encode, shares_of
from fusion_demo.problems import make_problem, make_problems
from fusion_demo.settings import DOMAINS, FULL, QUICK, SOURCES, Settings
from fusion_demo.texts import CHUNK_BYTES, harvest, prose_and_code, split_of
from fusion_demo.vocabularies import TOKENIZERS, train_tokenizer

SUM = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
TINY = Settings(pretrain_bytes=20_000, common_bytes=4_000, heldout_bytes=3_000, heldout_problems=5, prompts=6)


def _texts() -> list[str]:
    problems = make_problems(300, seed=1)
    code = [f"def f{i}(x):\n    return x + {i}\n" for i in range(100)]
    return [f"{problem.question}\n{problem.solution}" for problem in problems] + code


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    return {name: train_tokenizer(_texts(), spec) for name, spec in TOKENIZERS.items()}


def test_every_sum_of_a_solution_holds_and_the_last_one_is_the_gold_answer():
    for problem in make_problems(500, seed=3):
        sums = SUM.findall(problem.solution)
        assert len(sums) == problem.steps
        for left, sign, right, result in sums:
            value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}[sign]
            assert value(int(left), int(right)) == int(result)
            if sign == "/":
                assert int(left) % int(right) == 0
        assert problem.gold == sums[-1][3]
        assert problem.solution.endswith(f"\n#### {problem.gold}")
        assert all(left[0] == before[3] for before, left in zip(sums, sums[1:], strict=False))


def test_every_number_of_a_question_is_used_in_its_solution():
    for problem in make_problems(200, seed=4):
        used = [number for left, _, right, _ in SUM.findall(problem.solution) for number in (left, right)]
        assert set(re.findall(r"\d+", problem.question)) <= set(used)


def test_problems_repeat_with_the_seed_and_avoid_what_is_taken():
    first = make_problems(50, seed=7)
    assert first == make_problems(50, seed=7)
    other = make_problems(50, seed=7, taken=[problem.question for problem in first])
    assert not {problem.question for problem in first} & {problem.question for problem in other}
    assert make_problem(random.Random(1)) != make_problem(random.Random(2))


def test_docstrings_become_prose_and_leave_the_code():
    source = 'def f():\n    """Say what f does."""\n    return 1\n\n\nx = """kept"""\n'
    prose, code = prose_and_code(source)
    assert prose == ["Say what f does."]
    assert code == 'def f():\n    return 1\n\n\nx = """kept"""'


def test_copies_of_a_file_in_two_packages_stand_in_one_split():
    assert split_of(Path("a/vendor/retry.py")) == split_of(Path("b/retry.py"))
    assert {split_of(Path(f"a/file{i}.py")) for i in range(200)} == {"heldout", "common", "pretrain"}


def test_harvested_texts_are_distinct_short_and_as_many_as_asked_for():
    texts = harvest({"heldout": 5_000, "pretrain": 20_000})
    everything = [text for found in texts.values() for text in found]
    assert len(everything) == len(set(everything))
    assert max(len(text.encode()) for text in everything) <= CHUNK_BYTES
    for (split, _), found in texts.items():
        size = sum(len(text.encode()) for text in found)
        assert size >= {"heldout": 5_000, "pretrain": 20_000}[split]


def test_no_text_or_problem_stands_in_two_splits(tmp_path):
    counts = write_data(tmp_path, TINY)
    assert counts["heldout_problems"] == 5
    assert counts["prompts"] == 6
    assert counts["common"] == counts["texts"] + counts["chats"]
    seen: set[str] = set()
    for split in ("pretrain", "common", "heldout", "heldout_problems", "prompts"):
        rows = read_rows(tmp_path / f"{split}.jsonl")
        contents = {row["text"] if "text" in row else row["messages"][0]["content"] for row in rows}
        assert len(contents) == len(rows)
        assert not contents & seen
        seen |= contents
    assert {row["domain"] for row in rows} == {"math"}
    assert all(row["reference"].isdigit() and len(row["messages"]) == 1 for row in rows)


def test_tokenizers_give_back_every_text_and_differ(tokenizers):
    text = "Mia has 12 apples.\n    return x + 34  # größer ☃\n"
    for name, tokenizer in tokenizers.items():
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text, name
    pieces = {
        name: tokenizer.convert_ids_to_tokens(tokenizer("☃ 12")["input_ids"]) for name, tokenizer in tokenizers.items()
    }
    assert "<0xE2>" in pieces["code"]
    assert pieces["maths"][-2:] == ["1", "2"]
    assert pieces["target"][-1] == "Ġ12"


def test_a_rendered_question_is_how_the_rendered_dialogue_begins(tokenizers):
    problem = make_problem(random.Random(5))
    question, reply = {"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.solution}
    for tokenizer in tokenizers.values():
        whole = encode(tokenizer, {"messages": [question, reply]})
        head = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
        assert whole[: len(head)] == head
        assert whole[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id in whole[len(head) :]


def test_the_four_models_have_their_own_architectures_and_take_their_tokenizers(tokenizers):
    models = {name: make_model(name, tokenizers[name]) for name in MODELS}
    assert len({type(model) for model in models.values()}) == 4
    for name, model in models.items():
        ids = torch.tensor([tokenizers[name]("Mia has 12 apples.")["input_ids"]])
        assert model(ids).logits.shape == (*ids.shape, len(tokenizers[name]))


def test_a_source_sees_mostly_its_own_domain_and_the_target_all_alike():
    for name in (*SOURCES, "target"):
        assert math.isclose(sum(shares_of(name, FULL).values()), 1)
    assert shares_of("maths", FULL)["maths"] == FULL.source_share
    assert set(shares_of("target", FULL).values()) == {1 / len(DOMAINS)}


def test_a_model_without_opinion_needs_log2_of_the_vocabulary_per_token(tokenizers):
    tokenizer = tokenizers["target"]
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    text = "Mia has 12 apples."
    reply = "12 + 3 = 15\n#### 15"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    rows = [{"domain": "prose", "text": text}, {"domain": "maths", "messages": messages}]
    found = bits_per_byte(model, tokenizer, rows)
    bits = math.log2(len(tokenizer))
    # One more token than the text has: its end.
    n_text = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
    n_reply = len(tokenizer(reply, add_special_tokens=False)["input_ids"]) + 1
    assert found["prose"] == pytest.approx(bits * n_text / len(text), rel=1e-5)
    assert found["maths"] == pytest.approx(bits * n_reply / len(reply), rel=1e-5)
    assert found["mean"] == pytest.approx((found["prose"] + found["maths"]) / 2)


def _stage(name: str, *needs: str, program: str = "", **facts: object) -> stages.Stage:
    program = program or f"open('{name}', 'w').write('made'); open('order', 'a').write('{name} ')"
    return stages.Stage(name, name, (sys.executable, "-c", program), (name,), needs, facts=facts)


def _run(tmp_path: Path, *plan_: stages.Stage) -> str:
    order = tmp_path / "order"
    order.unlink(missing_ok=True)
    console = Console(file=StringIO())
    stages.run_stages(plan_, tmp_path, tmp_path / "logs", jobs=2, console=console)
    return order.read_text() if order.exists() else ""


def test_stages_run_after_what_they_need_and_only_what_changed_runs_again(tmp_path):
    assert _run(tmp_path, _stage("a"), _stage("b", "a"), _stage("c", "b")) == "a b c "
    assert _run(tmp_path, _stage("a"), _stage("b", "a"), _stage("c", "b")) == ""
    assert _run(tmp_path, _stage("a"), _stage("b", "a", size=2), _stage("c", "b")) == "b c "
    (tmp_path / "a").unlink()
    assert _run(tmp_path, _stage("a"), _stage("b", "a", size=2), _stage("c", "b")) == "a "


def test_a_change_of_the_code_that_a_stage_names_runs_it_again(tmp_path):
    code = tmp_path / "code.py"
    code.write_text("x = 1\n")
    stage = stages.Stage("a", "a", ("true",), (), code=(code,))
    before = stages.keys_of([stage])
    code.write_text("x = 2\n")
    assert stages.keys_of([stage]) != before


def test_a_stage_that_fails_ends_the_run_with_its_last_lines_and_its_log(tmp_path):
    broken = _stage("a", program="raise SystemExit('no such model')")
    with pytest.raises(stages.StageFailed, match=r"stage a ended with status 1; .*a\.log:\nno such model"):
        _run(tmp_path, broken, _stage("b", "a"))
    assert not (tmp_path / "b").exists()


def test_a_stage_without_its_output_is_not_finished(tmp_path):
    with pytest.raises(stages.StageFailed, match="made no a; see"):
        _run(tmp_path, _stage("a", program="pass"))


def test_the_plan_names_every_stage_before_it_is_needed():
    seen: set[str] = set()
    outputs: list[str] = []
    for stage in plan.make_plan("full"):
        assert set(stage.needs) <= seen, stage.name
        assert stage.name not in seen
        seen.add(stage.name)
        outputs += stage.outputs
        assert all(path.exists() for path in stage.code)
    assert len(outputs) == len(set(outputs))
    assert {f"scores/{name}.json" for name in plan.EVALUATED} <= set(outputs)


def test_both_sizes_have_keys_of_their_own():
    full, quick = (stages.keys_of(plan.make_plan(size)) for size in ("full", "quick"))
    assert all(full[name] != quick[name] for name in full)


def test_overlays_replace_lists_and_join_mappings(tmp_path):
    plan.write_configs(tmp_path, QUICK)
    paper = json.loads(json.dumps(plan._configs(QUICK)["fusellm_paper"]))
    assert paper["fusion"]["lm_loss_weight"] == 0.9
    assert [source["name"] for source in paper["fusion"]["sources"]] == ["code", "maths", "prose", "target"]
    pair = plan._configs(QUICK)["pair_code"]
    assert [source["name"] for source in pair["fusion"]["sources"]] == ["code", "target"]
    merged = plan._configs(QUICK)["merged"]
    assert merged["merge_method"] == "varm"
    assert merged["base_model"] == "./models/target"
    assert {path.stem for path in (tmp_path / "configs").iterdir()} == set(plan._configs(QUICK))


def test_results_hold_the_measured_numbers_and_nothing_else(tmp_path):
    (tmp_path / "scores").mkdir()
    for i, name in enumerate(plan.EVALUATED):
        bits = {"code": 2.0 + i / 100, "prose": 3.0, "maths": 1.0, "mean": 2.0 + i / 300}
        scores = {"bits_per_byte": bits, "accuracy": i / 20, "problems": 20}
        (tmp_path / "scores" / f"{name}.json").write_text(json.dumps(scores))
    console = Console(file=StringIO(), width=140)
    results.write_results(tmp_path, tmp_path, "quick", {"data": stages.Spent(1.5, 1.0)}, 2.0, console)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["models"]["fusellm"]["bits_per_byte"]["code"] == pytest.approx(2.06)
    assert written["settings"]["seed"] == QUICK.seed
    assert "| 2.060 | 3.000 | 1.000 | 2.020 | 30.0% |" in (tmp_path / "results.md").read_text()
    assert "2.060" in console.file.getvalue()
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
