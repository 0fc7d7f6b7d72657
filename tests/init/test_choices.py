"""What `fusion init` decides: each decision follows from sizes, windows and GPUs alone."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

from fusion_plugins.init import choices
from fusion_plugins.init.machine import Machine, this_machine

CPU, ONE, EIGHT = Machine(0, 80e9, False), Machine(1, 24e9, True), Machine(8, 80e9, True)


@pytest.mark.parametrize("name", ["choices", "names", "texts", "write"])
def test_the_examples_of_the_docstrings_run(name):
    result = doctest.testmod(import_module(f"fusion_plugins.init.{name}"))
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize(
    ("windows", "longest", "asked", "expected"),
    [
        ([4096, 2048, 8192], None, None, 2048),
        ([4096, 1024], None, None, 1024),
        ([None, None], None, None, 2048),
        ([None, 512], 10_000, None, 512),
        ([4096], 300, None, 320),
        ([4096], 320, None, 320),
        ([4096], 9000, None, 2048),
        ([4096], 300, 4096, 4096),
    ],
)
def test_the_sequence_length_is_within_all_windows_and_no_longer_than_needed(windows, longest, asked, expected):
    assert choices.sequence_len(windows, longest, asked).value == expected


@pytest.mark.parametrize(
    ("parameters", "machine", "reference", "expected"),
    [
        (7e9, EIGHT, False, (None, 2, True)),
        (8e9, EIGHT, True, (None, 2, True)),
        (27e9, EIGHT, False, (None, 3, True)),
        (70e9, EIGHT, False, ("lora", 3, True)),
        (400e9, EIGHT, False, ("qlora", 0, False)),
        (1e9, ONE, False, (None, 0, True)),
        (7e9, ONE, False, ("lora", 0, True)),
        (13e9, ONE, False, ("qlora", 0, True)),
        (70e9, ONE, False, ("qlora", 0, False)),
        (70e9, CPU, False, (None, 0, True)),
    ],
)
def test_what_is_trained_and_how_it_is_divided_follow_from_size_and_memory(parameters, machine, reference, expected):
    found = choices.memory(parameters, machine, reference=reference)
    assert (found.adapter, found.stage, found.fits) == expected


def test_an_adapter_that_is_asked_for_is_taken_and_one_that_does_not_fit_is_said():
    assert choices.memory(1e9, EIGHT, "lora").adapter == "lora"
    assert choices.memory(7e9, ONE, "none").fits is False
    assert choices.memory(13e9, ONE, "lora").fits is False
    assert choices.memory(1e9, CPU, "lora").adapter == "lora"


def test_what_was_measured_is_chosen_and_names_the_page_that_says_so():
    page = (Path(__file__).parents[2] / "docs" / "evidence.md").read_text()
    assert (choices.LM_LOSS_WEIGHT.value, choices.ENTRIES.value) == (0.5, 64)
    for choice, shown in (
        (choices.LM_LOSS_WEIGHT, "lambda 0.5 minus CLM"),
        (choices.ENTRIES, "`top_k` of the capture: 10"),
    ):
        assert "docs/evidence.md" in choice.why
        assert shown in page


def test_rounds_ask_no_cross_entropy_who_teaches_and_get_new_prompts_where_there_are_many():
    assert [choices.rule("rounds", count).value for count in (1, 2)] == ["min_ce", "fixed_weights"]
    assert choices.rule("fusellm", 3).value == "min_ce"
    given = [(10, 2), (1999, 2), (2000, 2), (5000, 1), (9001, 3)]
    assert [choices.prompts_per_round(*each).value for each in given] == [None, None, 1000, None, 3000]
    assert choices.learning_rate("rounds", 8e9, "llama", None).value == 1e-6
    assert choices.epochs("rounds", 8e9).value == 1


@pytest.mark.parametrize("kind", ["llama", "mllama_text_model"])
def test_llama_targets_get_the_length_normalised_loss(kind):
    assert [choice.value for choice in choices.preference_loss(kind)] == ["sigmoid_norm", 10]


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "mistral", "phi3"])
def test_other_targets_get_the_plain_loss_with_a_small_beta(kind):
    assert [choice.value for choice in choices.preference_loss(kind)] == ["sigmoid", 0.01]


def test_a_small_set_gets_smaller_batches_and_never_an_empty_step():
    for sequences in (3, 100, 1000, 1e6):
        for machine in (CPU, ONE, EIGHT):
            found = choices.batch(sequences, 7e9, machine)
            assert found.total == found.micro * found.accumulate * max(machine.gpus, 1) <= 128
            assert found.total <= max(sequences / 49, 8)
    assert choices.batch(1e6, 1e9, EIGHT, asked=64).total == 64


def test_a_forward_pass_fits_and_a_source_that_does_not_fit_is_said():
    small, large = choices.batch_tokens(1e9, 32_000, ONE), choices.batch_tokens(1e9, 256_000, ONE)
    assert small.value > large.value >= 1024
    assert choices.batch_tokens(70e9, 128_000, EIGHT) is None
    assert [choices.tensor_parallel(size, EIGHT) for size in (7e9, 70e9, 400e9)] == [1, 4, None]


def test_a_machine_can_be_said_by_hand():
    assert this_machine(4, 40.0) == Machine(4, 40e9, this_machine().flash_attention)
    assert this_machine(2).memory > 0
