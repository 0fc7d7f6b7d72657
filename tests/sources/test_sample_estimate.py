"""Dry runs of sampling."""

import pytest
import source_checks
from fake_server import running
from source_checks import server_config as config

from fusion_plugins.errors import SourceError
from fusion_plugins.sources.sample_estimate import estimate_samples


def test_a_dry_run_asks_prompts_of_all_domains_at_the_width_of_the_run(tmp_path):
    rows = [{"id": f"i{n}", "text": "short", "domain": "instruction"} for n in range(60)]
    rows += [{"id": f"m{n}", "text": "long" * 25, "domain": "math"} for n in range(60)]
    prompts = source_checks.write_rows(tmp_path / "prompts.jsonl", rows)
    with running(lambda number, body: "slowly") as server:
        estimate = estimate_samples(config(prompts, tmp_path / "out", server))["remote"]
    assert estimate["tokens"] == 60 * 2 * (5 + 100)
    assert estimate["bytes"] == estimate["tokens"]
    assert server.most_at_once == 8


def test_rounds_grow_up_to_a_batch_and_a_source_that_answers_nothing_is_an_error(tmp_path):
    prompts = source_checks.prompts(tmp_path / "prompts.jsonl", 60)
    with running() as server:
        settings = config(prompts, tmp_path / "out", server).model_copy(update={"batch_requests": 16})
        assert estimate_samples(settings)["remote"]["responses"] == 120
        assert len(server.requests) == 4 + 16
        server.trouble = lambda number, body: "refused"
        message = "source 'remote': expected an answer to one of 20 prompts, got none: .*max_tokens is too large"
        with pytest.raises(SourceError, match=message):
            estimate_samples(settings)
    assert not (tmp_path / "out").exists()


def test_a_source_whose_domains_do_not_occur_is_left_out(tmp_path):
    prompts = source_checks.prompts(tmp_path / "prompts.jsonl")
    with running() as server:
        settings = config(prompts, tmp_path / "out", server, source={"domains": ["chinese"]})
        assert estimate_samples(settings) == {}
