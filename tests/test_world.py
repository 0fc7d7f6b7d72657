"""The world of the lab and of the demonstration: texts, tokenizers, models, and what a model is measured by."""

import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "lab"))

from fusion_lab import world
from fusion_lab.measure import bits_per_byte
from fusion_lab.models import SPECS, make_model
from fusion_lab.pretrain import encode
from fusion_lab.problems import make_problems
from fusion_lab.texts import CHUNK_BYTES, harvest, split_of
from fusion_lab.texts import _docstrings as docstrings
from fusion_lab.vocabularies import train_tokenizer
from fusion_lab.world import Lab, check_model, read_rows, write_corpus, write_data


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    problems = [f"{problem.question}\n{problem.solution}" for problem in make_problems(300, seed=1)]
    texts = problems + [
        f"Return the {number}th part of a file, or none where it has no such part." for number in range(100)
    ]
    return {name: train_tokenizer(texts, spec) for name, spec in SPECS.items()}


def test_only_docstrings_of_a_source_are_documentation():
    source = 'def f():\n    """Say what f does."""\n    return 1\n\n\nx = """kept"""\n'
    assert docstrings(source) == ["Say what f does."]
    assert docstrings('"""One."""\nclass A:\n    """Two."""\n') == ["One.", "Two."]
    with pytest.raises(SyntaxError):
        docstrings("def f(:")


def test_copies_of_a_file_in_two_packages_stand_in_one_split():
    assert split_of(Path("a/vendor/retry.py")) == split_of(Path("b/retry.py"))
    assert {split_of(Path(f"a/file{i}.py")) for i in range(200)} == {"heldout", "common", "pretrain"}


def test_harvested_texts_are_distinct_short_and_as_many_as_asked_for():
    budgets = {"heldout": 5_000, "pretrain": 20_000}
    texts = harvest(budgets)
    everything = [text for found in texts.values() for text in found]
    assert len(everything) == len(set(everything))
    assert max(len(text.encode()) for text in everything) <= CHUNK_BYTES
    for split, found in texts.items():
        assert sum(len(text.encode()) for text in found) >= budgets[split]


def test_no_text_or_problem_stands_in_two_splits_and_a_corpus_is_drawn_from_the_common_ones(tmp_path):
    lab = Lab("quick", tmp_path)
    write_data(lab)
    seen: set[str] = set()
    for split in world.SEEDS:
        rows = read_rows(lab.data(split))
        contents = {row["text"] if "text" in row else row["messages"][0]["content"] for row in rows}
        assert len(contents) == len(rows)
        assert not contents & seen
        seen |= contents
    drawn = {}
    for seed in (0, 1):
        files = write_corpus(lab, tmp_path / str(seed), "few", seed)
        drawn[seed] = {domain: [row["id"] for row in read_rows(path)] for domain, path in files.items()}
        assert all(len(ids) == lab.amount("few") for ids in drawn[seed].values())
        assert {id for ids in drawn[seed].values() for id in ids} <= {
            row["id"] for row in read_rows(lab.data("common"))
        }
    assert drawn[0] != drawn[1]
    smaller = write_corpus(lab, tmp_path / "smaller", "scarce", 0)
    assert {row["id"] for row in read_rows(smaller["sums"])} <= set(drawn[0]["sums"])


@pytest.mark.parametrize(
    ("name", "chains", "fits"),
    [
        ("numbers", 0.97, True),
        ("digits", 0.8, True),
        ("digits", 0.79, False),
        ("numbers", 0.0, False),
        ("target", 0.11, True),
        ("target", 0.31, False),
        ("docs", 0.0, True),
    ],
)
def test_a_world_without_mastered_sources_or_with_a_mastered_target_is_refused(tmp_path, name, chains, fits):
    if fits:
        check_model(Lab("cpu", tmp_path), name, chains)
    else:
        with pytest.raises(ValueError, match=f"{name}.*solves {chains:.1%}"):
            check_model(Lab("cpu", tmp_path), name, chains)
    check_model(Lab("quick", tmp_path), name, chains)


def test_tokenizers_give_back_every_text_and_differ(tokenizers):
    text = "Mia has 12 apples.\n    return x + 34  # größer ☃\n"
    for name, tokenizer in tokenizers.items():
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text, name
    pieces = {
        name: tokenizer.convert_ids_to_tokens(tokenizer("☃ 12")["input_ids"]) for name, tokenizer in tokenizers.items()
    }
    assert "<0xE2>" in pieces["numbers"]
    assert pieces["digits"][-2:] == ["1", "2"]
    assert pieces["target"][-1] == "Ġ12"


def test_a_rendered_question_is_how_the_rendered_dialogue_begins(tokenizers):
    question, reply = make_problems(1, seed=5)[0].messages()
    for tokenizer in tokenizers.values():
        whole, start = encode(tokenizer, {"messages": [question, reply]})
        assert whole[:start] == tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
        assert whole[0] == tokenizer.bos_token_id
        assert whole[-1] == tokenizer.eos_token_id


def test_the_four_models_have_their_own_architectures_and_take_their_tokenizers(tokenizers):
    models = {name: make_model(name, tokenizers[name], width=32, layers=1) for name in world.MODELS}
    assert len({type(model) for model in models.values()}) == 4
    for name, model in models.items():
        ids = torch.tensor([tokenizers[name]("Mia has 12 apples.")["input_ids"]])
        assert model(ids).logits.shape == (*ids.shape, len(tokenizers[name]))


def test_a_source_sees_mostly_its_own_domain_and_the_target_all_alike():
    assert all(math.isclose(sum(shares.values()), 1) for shares in world.SHARES.values())
    assert world.SHARES["docs"]["docs"] == world.SHARES["numbers"]["sums"] > 0.8
    assert set(world.SHARES["target"].values()) == {1 / len(world.DOMAINS)}


def test_a_model_without_opinion_needs_log2_of_the_vocabulary_per_token(tokenizers):
    tokenizer = tokenizers["target"]
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    text = "Mia has 12 apples."
    reply = "12 + 3 = 15\n#### 15"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    bits = math.log2(len(tokenizer))
    for row, said in (({"text": text}, text), ({"messages": messages}, reply)):
        # One more token than the text has: its end.
        n_tokens = len(tokenizer(said, add_special_tokens=False)["input_ids"]) + 1
        assert bits_per_byte(model, tokenizer, [row]) == pytest.approx(bits * n_tokens / len(said), rel=1e-5)
