"""The reward scorer on reward models built from scratch and loaded by transformers as any other."""

import copy
import itertools
import json
import random
import sys

import pytest
import tiny
import torch
from transformers import LlamaForSequenceClassification

from fusion_plugins.core.preferences.candidates import Candidate
from fusion_plugins.core.preferences.gaps import GapWindow
from fusion_plugins.core.preferences.pairs import build_pairs
from fusion_plugins.errors import ConfigError, MismatchError, ScoringError
from fusion_plugins.scoring import SCORERS
from fusion_plugins.scoring.reward import RewardScorer
from fusion_plugins.scoring.score import ScoreConfig, score_responses
from fusion_plugins.store import RowManifest, RowWriter, open_rows

REMOTE_CODE = """
import torch
from dataclasses import dataclass
from transformers import LlamaForSequenceClassification
from transformers.utils import ModelOutput


@dataclass
class GatedOutput(ModelOutput):
    logits: torch.Tensor = None
    score: torch.Tensor = None


class GatedRewardModel(LlamaForSequenceClassification):
    def forward(self, **inputs):
        logits = super().forward(**inputs).logits
        return GatedOutput(logits=logits, score=logits.mean(-1))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.reward_checkpoint(tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture(scope="module")
def scorer(model):
    return RewardScorer(model=model, batch_size=4)


def rows(count=13):
    draw = random.Random(0)
    return [
        {"prompt": f"Question {n}?", "response": " ".join(draw.choices(tiny.TEXTS[3].split(), k=draw.randint(1, 40)))}
        for n in range(count)
    ]


def by_hand(model, row):
    """The raw head output for one unpadded row, computed with transformers alone."""
    tokenizer = tiny.byte_level()
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt")["input_ids"]
    loaded = LlamaForSequenceClassification.from_pretrained(model)
    with torch.inference_mode():
        hidden = loaded.model(ids).last_hidden_state[0, -1]
        return float(loaded.score(hidden))


def test_rewards_are_the_raw_output_of_the_head(model, scorer):
    found = scorer.score(rows())
    assert [score.reward for score in found] == pytest.approx([by_hand(model, row) for row in rows()], abs=1e-5)
    # A sigmoid would keep them between 0 and 1.
    assert min(score.reward for score in found) < 0
    assert len({score.reward for score in found}) == len(found)


def test_rewards_do_not_depend_on_order_or_batch(model, scorer):
    given = rows()
    expected = [score.reward for score in scorer.score(given)]
    order = random.Random(1).sample(range(len(given)), len(given))
    shuffled = scorer.score([given[place] for place in order])
    assert [score.reward for score in shuffled] == pytest.approx([expected[place] for place in order], abs=1e-5)
    alone = [scorer.score([row])[0].reward for row in given]
    assert alone == pytest.approx(expected, abs=1e-5)
    large = RewardScorer(model=model, batch_size=64).score(given)
    assert [score.reward for score in large] == pytest.approx(expected, abs=1e-5)


def test_a_model_without_padding_token_is_asked_one_by_one(tmp_path, scorer):
    bare = RewardScorer(model=tiny.reward_checkpoint(tmp_path / "bare", pad=False), batch_size=8)
    expected = [score.reward for score in scorer.score(rows(5))]
    assert [score.reward for score in bare.score(rows(5))] == pytest.approx(expected, abs=1e-5)


def test_prompts_may_be_chats(scorer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    with_system, without = scorer.score([{"prompt": chat, "response": "Hi."}, {"prompt": "Hi?", "response": "Hi."}])
    assert with_system.reward != without.reward


def test_empty_keys_of_messages_do_not_reach_the_template(scorer):
    chat = [{"role": "user", "content": "Hi?"}]
    padded = [{"role": "user", "content": "Hi?", "name": None, "tool_calls": None}]
    first, second = scorer.score([{"prompt": prompt, "response": "Hi."} for prompt in (chat, padded)])
    assert first.reward == second.reward
    assert list(padded[0]) == ["role", "content", "name", "tool_calls"]


def test_what_is_too_long_has_no_reward_and_a_reason(model):
    limited = RewardScorer(model=model, max_length=60)
    short, long = limited.score([{"prompt": "Hi?", "response": "Hi."}, {"prompt": "Hi?", "response": "Hi. " * 80}])
    assert short.reward is not None
    assert long.reward is None
    assert long.reason == "longer than 60 tokens"


def test_a_token_that_the_model_has_no_row_for_gives_no_reward_and_a_reason(tmp_path):
    tokenizer = copy.deepcopy(tiny.byte_level())
    tokenizer.add_tokens(["<tool>"])
    folder = tiny.reward_checkpoint(tmp_path / "narrow", tokenizer=tokenizer, vocab_size=420, pad_token_id=0)
    wide, plain = RewardScorer(model=folder).score([{"prompt": "Hi?", "response": text} for text in ("<tool>", "Hi.")])
    assert wide.reward is None
    assert "token id 420 ('<tool>') has no row in the model" in wide.reason
    assert plain.reward is not None


def test_what_a_reward_depends_on_is_in_the_facts(model, scorer, tmp_path):
    assert scorer.facts["model"] == model
    assert scorer.facts["dtype"] == "float32"
    other = RewardScorer(model=tiny.reward_checkpoint(tmp_path / "other", intermediate_size=64))
    assert other.facts["checkpoint"] != scorer.facts["checkpoint"]
    same = RewardScorer(model=tiny.reward_checkpoint(tmp_path / "same"))
    assert same.facts["checkpoint"] == scorer.facts["checkpoint"]


def sizes(folder):
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_a_retrained_reward_model_of_the_same_size_is_another_one(tmp_path, responses):
    folder = tmp_path / "model"
    tiny.reward_checkpoint(folder)
    settings = {"responses": responses, "out": str(tmp_path / "scored"), "scorers": {"reward": {"model": str(folder)}}}
    score_responses(ScoreConfig(**settings))
    before, names = RewardScorer(model=str(folder)).facts["checkpoint"], sizes(folder)
    loaded = LlamaForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        loaded.score.weight[0, 0] += 1e-3  # one number of the head
    loaded.save_pretrained(folder)
    assert sizes(folder) == names
    assert RewardScorer(model=str(folder)).facts["checkpoint"] != before
    with pytest.raises(MismatchError, match="checkpoint"):
        score_responses(ScoreConfig(**settings))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "modeling_gated.py"])
def test_a_changed_template_or_code_beside_the_weights_is_another_reward_model(tmp_path, name):
    folder = tmp_path / "model"
    tiny.reward_checkpoint(folder)
    (folder / "modeling_gated.py").write_text("x = 1\n")
    before = RewardScorer(model=str(folder)).facts["checkpoint"]
    path = folder / name
    path.write_text((path.read_text() if path.exists() else "{{ messages }}") + "\n")
    assert RewardScorer(model=str(folder)).facts["checkpoint"] != before


# Heads that are not there


def test_a_head_that_is_not_in_the_checkpoint_is_refused(tmp_path):
    folder = tiny.llama_checkpoint(tmp_path / "language_model")
    with pytest.raises(ScoringError, match="score.weight is not in the checkpoint.*random"):
        RewardScorer(model=str(folder))


def test_a_head_of_zeros_is_refused(tmp_path):
    folder = tiny.reward_checkpoint(tmp_path / "zeros")
    loaded = LlamaForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        loaded.score.weight.zero_()
    loaded.save_pretrained(folder)
    with pytest.raises(ScoringError, match="different finite rewards.*0.0 and 0.0"):
        RewardScorer(model=folder)


def test_a_head_with_nan_is_refused(tmp_path):
    folder = tiny.reward_checkpoint(tmp_path / "nan")
    loaded = LlamaForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        loaded.score.weight.fill_(float("nan"))
    loaded.save_pretrained(folder)
    with pytest.raises(ScoringError, match="finite rewards.*None and None"):
        RewardScorer(model=folder)


def test_a_head_with_several_outputs_needs_a_label(tmp_path):
    folder = tiny.reward_checkpoint(tmp_path / "labels", labels=3)
    with pytest.raises(ConfigError, match="3 outputs.*say with `label`"):
        RewardScorer(model=folder)
    with pytest.raises(ConfigError, match="label is 7"):
        RewardScorer(model=folder, label=7)
    rewards = [RewardScorer(model=folder, label=label).score(rows(1))[0].reward for label in range(3)]
    assert len(set(rewards)) == 3


def test_a_model_with_its_own_code_gives_its_own_score(tmp_path):
    folder = tmp_path / "gated"
    tiny.reward_checkpoint(folder, labels=3)
    (folder / "modeling_gated.py").write_text(REMOTE_CODE)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_gated.GatedRewardModel"}
    (folder / "config.json").write_text(json.dumps(config))
    gated = RewardScorer(model=str(folder), trust_remote_code=True).score(rows(2))
    labels = [
        RewardScorer(model=tiny.reward_checkpoint(tmp_path / "plain", labels=3), label=n).score(rows(2))
        for n in range(3)
    ]
    expected = [sum(column[place].reward for column in labels) / 3 for place in range(2)]
    assert [score.reward for score in gated] == pytest.approx(expected, abs=1e-5)


# Wrong settings


def test_a_tokenizer_without_chat_template_needs_the_plain_one(tmp_path):
    tokenizer = tiny.unigram()
    folder = tiny.reward_checkpoint(tmp_path / "bare", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="no chat template; set `template: plain`"):
        RewardScorer(model=folder)
    plain = RewardScorer(model=folder, template="plain")
    (score,) = plain.score(rows(1))
    assert score.reward is not None
    # A chat is its texts, with an empty line between them.
    chat = [{"role": "system", "content": "Brief.", "name": None}, {"role": "user", "content": "Hi?"}]
    of_chat, of_text = plain.score([{"prompt": prompt, "response": "Hi."} for prompt in (chat, "Brief.\n\nHi?")])
    assert of_chat.reward == pytest.approx(of_text.reward, abs=1e-5)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system prompts') if messages[0].role == 'system' }}",
        "{% if messages[0].role == 'system' %}{{ messages[0].content + 1 }}{% endif %}",
        "{% if messages[0].role == 'system' %}{{ messages[9].content.x }}{% endif %}",
        "{% if messages[0].role == 'system' %}{{ 1 // 0 }}{% endif %}",
    ],
)
def test_a_row_that_the_template_refuses_has_no_reward_and_the_others_have_theirs(model, template):
    scorer = RewardScorer(model=model)
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    scorer._tokenizer.chat_template = plain
    refused = {"prompt": [{"role": "system", "content": "s"}], "response": "r"}
    others = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    expected = scorer.score(others)
    scorer._tokenizer.chat_template = template + plain
    first, found, last = scorer.score([others[0], refused, others[1]])
    assert found.reward is None
    assert found.reason.startswith("the chat template refuses it: ")
    assert [first, last] == expected
    scorer._tokenizer.chat_template = "{{ raise_exception('nothing at all') }}"
    assert {score.reason for score in scorer.score(others)} == {"the chat template refuses it: nothing at all"}
    with pytest.raises(ScoringError, match="got None and None .the chat template refuses it: nothing at all."):
        scorer._check_head()


def test_tokens_that_the_model_lacks_and_texts_without_tokens_cost_one_row(model):
    scorer = RewardScorer(model=model)
    scorer._rows = 5
    row = {"prompt": "a", "response": "b"}
    assert "has no row in the model" in scorer.score([row])[0].reason
    scorer._tokenizer.chat_template = "{{ '' }}"
    assert scorer.score([row])[0].reason == "no token is left of prompt and response"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ConfigError, "model: missing; expected folder or hub name"),
        ({"model": "m", "dtype": "int8"}, ConfigError, "dtype"),
        ({"model": "m", "sigmoid": True}, ConfigError, "sigmoid: unknown key"),
        ({"model": "./nowhere"}, ScoringError, "'./nowhere' cannot be loaded"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        RewardScorer(**options)


# The whole step


def test_rewards_and_verdicts_meet_in_one_folder_and_make_pairs(model, tmp_path):
    columns = dict.fromkeys(("prompt_id", "source", "prompt", "response", "domain", "reference"), "string")
    manifest = RowManifest(
        stage="responses", columns={**columns, "index": "int64"}, key=("prompt_id", "source", "index")
    )
    with RowWriter(tmp_path / "responses", manifest) as writer:
        for prompt, source, index in itertools.product(range(6), "ab", range(4)):
            answer = prompt + index % 2
            text = {"prompt_id": f"p{prompt}", "source": source, "prompt": f"What is {prompt} + 0?", "domain": "math"}
            writer.write(
                text | {"index": index, "reference": str(prompt), "response": f"{source} says {index}: {answer}"}
            )
    scorers = {"math": {"workers": 1, "timeout": 60}, "reward": {"model": model, "domains": ["math"]}}
    score_responses(ScoreConfig(responses=str(tmp_path / "responses"), out=str(tmp_path / "scored"), scorers=scorers))
    scored = list(open_rows(tmp_path / "scored"))
    assert [row["correct"] for row in scored] == [row["index"] % 2 == 0 for row in scored]
    assert all(isinstance(row["reward"], float) for row in scored)
    assert scored[0]["scores"]["math"]["answer"] == "0"
    names = ("prompt_id", "source", "index", "prompt", "response", "reward", "correct", "domain")
    candidates = [Candidate(**{name: row[name] for name in names}) for row in scored]
    pairs = build_pairs(candidates, window=GapWindow(None, None))
    assert len(pairs) == 6
    assert all(pair.chosen.correct and not pair.rejected.correct for pair in pairs)


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "fusion_plugins.scoring.reward")
    with pytest.raises(
        ConfigError, match=r"needs the package transformers, which is not installed: pip install .*\[transformers\]"
    ):
        SCORERS["reward"](model="any")
