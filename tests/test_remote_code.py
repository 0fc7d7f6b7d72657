"""Python code that comes with a model or a tokenizer does not run unless the user says so, and nobody is asked."""

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import source_checks
import tiny
import yaml

from fusion_plugins.cli import main

PACKAGE = Path(__file__).parents[1] / "fusion_plugins"
#: calls of transformers and mergekit that run code of a model folder if they are told to, or if they are told nothing
LOADERS = {"from_pretrained", "from_config", "get_class_from_dynamic_module"}


def calls() -> list[tuple[str, ast.Call]]:
    """Every call of the package that loads a configuration, a tokenizer or a model through an Auto class."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS:
                owner = ast.unparse(node.func.value)
                # Settings of an adapter are plain data; peft has no code to run for them.
                if owner != "PeftConfig":
                    found.append((f"{path.relative_to(PACKAGE)}:{node.lineno}: {owner}", node))
    return found


def test_every_call_that_may_run_code_of_a_model_says_whether_it_may() -> None:
    assert len(calls()) >= 8
    silent = [where for where, call in calls() if "trust_remote_code" not in {keyword.arg for keyword in call.keywords}]
    assert silent == []


def test_the_flag_is_off_unless_it_is_set() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert "trust_remote_code=True" not in path.read_text(), path


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose configuration, model and tokenizer all name code of its own, which leaves a trace if it runs."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    tiny.llama_checkpoint(folder, tokenizer=tiny.byte_level())
    auto = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoModel": "own.Own"}
    auto |= {"AutoModelForSequenceClassification": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    for name, changes in {
        "config.json": {"model_type": "own_kind", "auto_map": auto},
        "tokenizer_config.json": {"auto_map": auto, "tokenizer_class": "Own"},
    }.items():
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(values))
    (folder / "own.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\nclass Own: pass\n")
    return folder


@pytest.mark.parametrize("command", ["doctor", "cut", "capture", "server", "sample", "score", "merge-check"])
def test_a_folder_with_code_of_its_own_is_refused_and_nobody_is_asked(
    hostile: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = source_checks.texts(tmp_path / "texts.jsonl")
    prompts = source_checks.prompts(tmp_path / "prompts.jsonl")
    rows = tmp_path / "responses.jsonl"
    rows.write_text(json.dumps({"prompt_id": "p", "source": "a", "prompt": "a", "response": "b"}) + "\n")
    out = {"out": str(tmp_path / "out")}
    settings = {
        "doctor": {"target": str(hostile), "sources": [str(hostile)], "texts": str(texts), **out},
        "cut": {"texts": str(texts), "tokenizers": [str(hostile)], "max_length": 64, **out},
        "capture": {"texts": str(texts), "model": str(hostile), **out},
        "server": {"texts": str(texts), "model": "m", "backend": "openai", "tokenizer": str(hostile), **out}
        | {"options": {"base_url": "http://127.0.0.1:9/v1"}},
        "sample": {"prompts": str(prompts), "sources": [{"name": "a", "model": str(hostile)}], **out},
        "score": {"responses": str(rows), "scorers": {"reward": {"model": str(hostile)}}, **out},
        "merge-check": {
            "merge_method": "varm",
            "base_model": str(hostile),
            "models": [{"model": str(hostile)}, {"model": str(shutil.copytree(hostile, tmp_path / "two"))}],
        },
    }[command]
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    name = {"server": "capture"}.get(command, command)
    with pytest.raises(SystemExit) as ended:
        main([name, str(file)] if command == "merge-check" else [name, "-c", str(file)])
    said = "".join(capsys.readouterr())
    assert ended.value.code == 1, said
    assert "Traceback" not in said
    assert not (hostile.parent / "ran").exists()
    assert sys.stdin.read() == "y\n" * 20
