"""What all backends share: settings, the choice of a backend, and batches in turn."""

import pytest
from pydantic import ValidationError

from fusion_plugins.errors import ConfigError
from fusion_plugins.sources.backends import base
from fusion_plugins.sources.backends.base import Sampling, SourceSettings, in_turn, least, open_source


def test_a_source_is_named_after_the_last_part_of_its_model():
    assert SourceSettings(model="org/model").source_name == "model"
    assert SourceSettings(model="/models/llama/").source_name == "llama"
    assert SourceSettings(model="org/model", name="short").source_name == "short"


def test_sampling_settings_can_be_compared_and_not_changed():
    assert len({Sampling(), Sampling(), Sampling(top_k=5)}) == 2
    with pytest.raises(ValidationError, match="frozen"):
        Sampling().top_k = 5
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Sampling(topk=5)


@pytest.mark.parametrize("value", [1e-6, 0.005, float("inf"), float("nan"), -1])
def test_temperatures_that_an_engine_would_change_are_refused(value):
    with pytest.raises(ValidationError):
        Sampling(temperature=value)
    assert [Sampling(temperature=kept).temperature for kept in (0, 0.01, 2)] == [0, 0.01, 2]


def test_the_least_limit_is_that_of_the_known_ones():
    assert least(None, 5, 3) == 3
    assert least(None) is None


def test_batches_are_answered_one_after_the_other_each_result_with_its_place():
    def answer(batch):
        for index in reversed(range(len(batch))):
            yield index, batch[index].upper()

    assert list(in_turn([["a", "b"], ["c"]], answer)) == [((0, 1), "B"), ((0, 0), "A"), ((1, 0), "C")]


def test_a_backend_whose_packages_are_missing_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(base.BACKENDS, "vllm", "no_such_engine.module")
    with pytest.raises(
        ConfigError, match="source 'm': backend 'vllm' needs the package no_such_engine, .* install it. Or choose"
    ):
        open_source(SourceSettings(model="org/m", backend="vllm"), "capture")
