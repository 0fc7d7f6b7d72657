"""One reward model behind every backend; a server that misbehaves; the check with known answers; presets."""

import random

import fake_reward_server
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fusion_plugins.errors import ConfigError, FusionError, MismatchError, ScoringError, SourceError
from fusion_plugins.scoring.known_answers import KNOWN_ANSWERS, judge_order, known_rows
from fusion_plugins.scoring.reward import RewardOptions, RewardScorer
from fusion_plugins.scoring.reward_backends.base import Encoded, RewardSettings
from fusion_plugins.scoring.reward_backends.transformers_local import TransformersRewardModel, batches_by_length
from fusion_plugins.scoring.reward_presets import REWARD_PRESETS
from fusion_plugins.scoring.score import ScoreConfig, score_responses

DEFAULTS = {
    "revision": None,
    "dtype": "float32",
    "device": "cpu",
    "batch_size": 8,
    "batch_tokens": 4096,
    "max_length": None,
    "trust_remote_code": False,
    "label": None,
    "options": {},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.trained_reward_checkpoint(tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture(scope="module")
def local(model):
    return RewardScorer(model=model)


def rows(count=9):
    draw = random.Random(0)
    return [
        {"prompt": f"Question {n}?", "response": " ".join(draw.choices(tiny.TEXTS[3].split(), k=draw.randint(1, 40)))}
        for n in range(count)
    ]


@pytest.fixture
def server(model):
    """A reward server with the numbers of transformers; texts get the special tokens that TEI adds."""
    engine, tokenizer = TransformersRewardModel(RewardSettings(model, **DEFAULTS)), AutoTokenizer.from_pretrained(model)

    def outputs(given):
        ids = given if isinstance(given[0], int) else tokenizer(*given)["input_ids"]
        return engine.rewards([Encoded(list(ids))])

    with fake_reward_server.running(outputs) as made:
        yield made


def remote(model, server, endpoint="classify", **options):
    given = {"base_url": server.url, "endpoint": endpoint, "served_name": "served", "patience": 2.0} | options
    return RewardScorer(model=model, backend="server", options=given)


# The same numbers from every backend


@pytest.mark.parametrize("endpoint", ["classify", "pooling", "predict"])
def test_a_server_gives_the_rewards_of_transformers(model, local, server, endpoint):
    scorer = remote(model, server, endpoint)
    expected = [score.reward for score in local.score(rows())]
    assert [score.reward for score in scorer.score(rows())] == pytest.approx(expected, abs=1e-5)
    path, body = server.requests[-1]
    assert path == f"/{endpoint}"
    # Raw scores are asked for: the default of all three is a sigmoid.
    assert body["raw_scores"] is True if endpoint == "predict" else body["use_activation"] is False
    assert "truncate" not in body or body["truncate"] is False


def test_a_text_for_a_server_that_adds_special_tokens_gets_them_once(tmp_path):
    """The chat template writes <s>, and the server's tokenizer would write another."""
    tokenizer = tiny.sentencepiece_bpe()
    folder = tiny.reward_checkpoint(tmp_path / "model", tokenizer=tokenizer)
    seen = []

    def outputs(texts):
        seen.append(tokenizer(*texts)["input_ids"])
        return [float(len(seen))]

    with fake_reward_server.running(outputs) as made:
        scorer = RewardScorer(
            model=folder, backend="server", options={"base_url": made.url, "endpoint": "predict"}, self_check="skip"
        )
        scorer.score([{"prompt": "Hi?", "response": "Hello."}])
    assert tokenizer.decode(seen[-1]).count("<s>") == 1


@pytest.mark.slow
def test_actors_of_ray_give_the_rewards_of_transformers_and_their_own_errors(model, local, tmp_path):
    pytest.importorskip("ray")
    options = {"backend": "transformers", "actors": 2}
    scorer = RewardScorer(model=model, backend="ray", options=options)
    try:
        expected = [score.reward for score in local.score(rows(21))]
        assert [score.reward for score in scorer.score(rows(21))] == pytest.approx(expected, abs=1e-5)
        assert scorer.facts["engine"] == "ray:transformers"
        assert scorer.facts["checkpoint"] == local.facts["checkpoint"]
    finally:
        scorer.close()
    headless = tiny.llama_checkpoint(tmp_path / "language_model")
    with pytest.raises(ScoringError, match="score.weight is not in the checkpoint"):
        RewardScorer(model=str(headless), backend="ray", options=options | {"actors": 1})


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 9), st.integers(1, 500))
def test_batches_hold_every_row_once_within_their_limits(lengths, most_rows, most_tokens):
    groups = batches_by_length(lengths, most_rows, most_tokens)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    for group in groups:
        width = max(lengths[place] for place in group)
        assert len(group) == 1 or (len(group) <= most_rows and len(group) * width <= most_tokens)


# Servers that misbehave


def test_a_row_that_the_server_refuses_has_a_reason_and_the_others_have_rewards(model, server):
    scorer, good = remote(model, server), server.outputs
    server.outputs = lambda ids: 400 if len(ids) > 150 else good(ids)
    short, long = scorer.score([{"prompt": "Hi?", "response": "Hi."}, {"prompt": "Hi?", "response": "Hi. " * 48}])
    assert short.reward is not None
    assert long.reward is None
    assert "status 400" in long.reason


@pytest.mark.parametrize("answer", [{}, [], {"data": []}, {"data": [{"probs": []}]}, {"data": [{"probs": ["1"]}]}, 7])
def test_an_answer_that_holds_no_reward_ends_the_run_and_is_no_reward(model, server, answer):
    server.answer = answer
    with pytest.raises(FusionError, match="no answer|no whole answer|expected"):
        remote(model, server, patience=0.1)


@pytest.mark.parametrize("endpoint", ["classify", "predict"])
def test_a_head_with_several_outputs_needs_a_label_also_on_a_server(tmp_path, endpoint):
    folder = tiny.reward_checkpoint(tmp_path / "labels")
    with fake_reward_server.running(lambda given: [3.0, float(len(given) + len(given[-1:])), 9.0]) as made:
        options = {"base_url": made.url, "endpoint": endpoint, "served_name": "served"}
        with pytest.raises(ConfigError, match="3 outputs.*label is None"):
            RewardScorer(model=folder, backend="server", options=options)
        made.outputs = lambda given: [3.0, float(len(str(given))), 9999.0]
        scorer = RewardScorer(model=folder, backend="server", options=options, label=1, self_check="skip")
        (score,) = scorer.score(rows(1))
        assert score.reward not in (3.0, 9999.0)


def test_a_sigmoid_is_pointed_out(tmp_path, capsys):
    folder = tiny.reward_checkpoint(tmp_path / "model")
    with fake_reward_server.running(lambda ids: [0.5 + (hash(tuple(ids)) % 997) / 2000]) as made:
        options = {"base_url": made.url, "served_name": "served"}
        RewardScorer(model=folder, backend="server", options=options, self_check="warn")
    assert "lie between 0 and 1" in capsys.readouterr().err


def test_another_name_than_the_served_one_is_refused_with_the_names(model, server):
    with pytest.raises(ScoringError, match="expected the model 'mine', got served. Set options.served_name"):
        remote(model, server, served_name="mine")


def test_the_key_is_sent_and_never_shown(model, server, monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "sk-very-secret")
    server.outputs = lambda ids: 403
    with pytest.raises(SourceError) as caught:
        remote(model, server, api_key_env="REWARD_KEY")
    assert server.keys == {"Bearer sk-very-secret"}
    assert "sk-very-secret" not in str(caught.value)


def test_a_retrained_model_behind_the_same_url_is_noticed(model, server, tmp_path, responses):
    def run():
        options = {"base_url": server.url, "served_name": "served"}
        scorers = {"reward": {"model": model, "backend": "server", "options": options}}
        return score_responses(ScoreConfig(responses=responses, out=str(tmp_path / "scored"), scorers=scorers, limit=2))

    run()
    good = server.outputs
    # Batches of another size change the last digits; that is the same model.
    server.outputs = lambda ids: [value * 1.0001 for value in good(ids)]
    run()
    server.outputs = lambda ids: [value * 1.2 + 0.3 for value in good(ids)]
    with pytest.raises(MismatchError, match="probe_rewards"):
        run()


# Known answers


def test_a_model_that_prefers_good_answers_passes_and_its_negation_does_not(local, tmp_path, capsys):
    assert judge_order([score.reward for score in local.score(known_rows())]).right >= 11
    folder = tiny.trained_reward_checkpoint(tmp_path / "negated", sign=-1)
    with pytest.raises(ScoringError, match=r"got [01] of 12 known answers in the right order .wrong: 'What is 12"):
        RewardScorer(model=folder)
    capsys.readouterr()
    RewardScorer(model=folder, self_check="warn")
    assert "of 12 known answers in the right order" in capsys.readouterr().err
    RewardScorer(model=folder, self_check="skip")
    assert "known answers" not in capsys.readouterr().err


def test_a_model_that_measures_length_is_pointed_out(capsys, tmp_path):
    folder = tiny.reward_checkpoint(tmp_path / "model")
    with fake_reward_server.running(lambda ids: [float(len(ids))]) as made:
        options = {"base_url": made.url, "served_name": "served"}
        RewardScorer(model=folder, backend="server", options=options)
        assert "6 of 12 known answers in the right order" in capsys.readouterr().err
        # Of a preset it is known that it can do better.
        with pytest.raises(ScoringError, match="6 of 12"):
            RewardScorer(preset="armorm", model=folder, backend="server", options=options, max_length=250)


def test_a_good_known_answer_is_as_often_the_longer_one_as_not():
    longer = sum(len(good) > len(bad) for _, good, bad in KNOWN_ANSWERS)
    assert longer * 2 == len(KNOWN_ANSWERS)


# Presets


def test_every_preset_is_valid_and_runs_no_code_of_others():
    for name, options in REWARD_PRESETS.items():
        assert RewardOptions(preset=name).model == options["model"]
        assert not RewardOptions(preset=name).trust_remote_code
    assert RewardOptions(preset="armorm", dtype="bfloat16").dtype == "bfloat16"


def test_an_unknown_preset_and_unknown_options_of_a_backend_are_named(model):
    with pytest.raises(ConfigError, match="one of the presets armorm, skywork-v2-llama-3.1-8b"):
        RewardScorer(preset="skywork")
    with pytest.raises(ConfigError, match="scorers.reward.options.*gpus: unknown key"):
        RewardScorer(model=model, options={"gpus": 2})
    with pytest.raises(ConfigError, match="backend: .*'openai'"):
        RewardScorer(model=model, backend="openai")
