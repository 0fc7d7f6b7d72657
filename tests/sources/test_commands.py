"""The commands: settings from files and flags, dry runs, and what is printed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.errors import ConfigError
from fusion_plugins.sources.sample_config import SampleConfig
from fusion_plugins.sources.sample_estimate import estimate_samples
from fusion_plugins.store import open_rows, open_store


def test_the_command_reads_yaml_lets_flags_win_and_refuses_unknown_keys(model, texts, tmp_path):
    file = tmp_path / "capture.yml"
    file.write_text(f"model: {model}\ntexts: {texts}\nout: {tmp_path / 'a'}\ntop_k: 5\n")
    result = CliRunner().invoke(app, ["capture", "-c", str(file), "--top-k", "3", "--set", "options.batch_tokens=64"])
    assert result.exit_code == 0, result.output
    assert open_store(tmp_path / "a").manifest.top_k == 3
    result = CliRunner().invoke(app, ["capture", "-c", str(file), "--set", "tpo_k=3", "--set", "dtype=int3"])
    assert isinstance(result.exception, ConfigError)
    assert "tpo_k: unknown key; known keys: ask_ids, backend" in str(result.exception)
    assert "dtype: Input should be" in str(result.exception)
    result = CliRunner().invoke(app, ["capture", "-c", str(file), "--top-k", "3", "--set", "options.batch_tokns=64"])
    assert "batch_tokns: unknown key; known keys: attn_implementation, batch_prompts" in str(result.exception)


def test_the_command_says_which_settings_are_wrong_and_dry_run_writes_nothing(model, prompts, tmp_path):
    file = tmp_path / "sample.yml"
    values = {
        "prompts": str(prompts),
        "out": str(tmp_path / "out"),
        "n": 2,
        "sources": [{"name": "a", "model": str(model), "max_tokens": 4}],
    }
    file.write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["sample", "-c", str(file), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert not Path(values["out"]).exists()
    assert estimate_samples(SampleConfig(**values))["a"]["responses"] == 12
    result = CliRunner().invoke(app, ["sample", "-c", str(file), "--limit", "1"])
    assert result.exit_code == 0, result.output
    assert len(open_rows(values["out"])) == 2
    values["sources"] += [{"name": "a", "model": "m"}]
    file.write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["sample", "-c", str(file)])
    assert isinstance(result.exception, ConfigError)
    assert "expected different names, got a twice: set `name`" in str(result.exception)
    values["sources"] = [{"model": "m", "preset": "fusechat4", "temprature": 1}]
    file.write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["sample", "-c", str(file)])
    assert "expected one of the presets fusechat3-gemma-2-27b, " in str(result.exception)
    assert "got 'fusechat4'; name one of them" in str(result.exception)


def test_torch_and_the_engines_are_not_loaded_by_the_commands_module():
    code = (
        "import sys, fusion_plugins.sources.commands as c; print(sorted({'torch', 'vllm', 'ray'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("command", "key", "message"),
    [
        ("capture", "unit_bytes=5", "unit_bytes is now batch_bytes"),
        ("sample", "unit_requests=5", "unit_requests is now batch_requests"),
        ("capture", "unusable=stop", r"unusable is now on_unusable, with the values raise \(was: stop\) and skip"),
        ("sample", "unusable=skip", r"unusable is now on_unusable, with the values raise \(was: stop\) and skip"),
        ("capture", "on_unusable=stop", "on_unusable: Input should be 'raise' or 'skip', got 'stop'"),
        ("sample", "on_unusable=stop", "on_unusable: Input should be 'raise' or 'skip', got 'stop'"),
    ],
)
def test_old_keys_and_values_are_refused_with_the_new_ones(command, key, message):
    flags = {"capture": ["--texts", "t", "--model", "m"], "sample": ["--prompts", "p", "--set", "sources=[{model: m}]"]}
    result = CliRunner().invoke(app, [command, *flags[command], "--out", "o", "--set", key])
    assert isinstance(result.exception, ConfigError)
    assert re.search(message, str(result.exception))


def test_what_was_done_and_what_was_left_out_is_printed_also_with_brackets_in_it(model, texts, prompts, tmp_path):
    for file, name in ((texts, "[/INST]"), (prompts, "[/INST]")):
        with file.open("a") as lines:
            lines.write(json.dumps({"id": name, "text": "[/INST] " * 100}) + "\n")
    out = [str(tmp_path / "a"), str(tmp_path / "b")]
    capture = ["capture", "--texts", str(texts), "--model", str(model), "--out", out[0], "--set", "on_unusable=skip"]
    result = CliRunner().invoke(app, capture)
    assert result.exit_code == 0, result.output
    assert "10 texts captured (" in result.output
    assert f"0 were there, 1 left out: {out[0]}\nleft out [/INST]: expected at most 256 tokens" in result.output
    source = f"sources=[{{model: {model}, n: 1, max_tokens: 2}}]"
    sample = ["sample", "--prompts", str(prompts), "--out", out[1], "--set", source, "--set", "on_unusable=skip"]
    result = CliRunner().invoke(app, sample)
    assert result.exit_code == 0, result.output
    assert "6 responses drawn (" in result.output
    assert "1 prompts left out" in result.output
    assert "left out [/INST] of llama: a prompt of" in result.output


def test_a_dry_run_of_capture_prints_an_estimate(model, texts, tmp_path):
    command = ["capture", "--texts", str(texts), "--model", str(model), "--out", str(tmp_path / "a"), "--dry-run"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert re.search(
        r"10 texts, about [\d,]+ tokens, [\d.]+ MB, (less than 1 s|\d+ s) at the measured [\d,]+ tokens/s",
        result.output,
    )
    assert not (tmp_path / "a").exists()
