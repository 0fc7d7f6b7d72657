"""Code that comes with a model runs only if it is asked for, and nobody is asked on the terminal."""

import ast
import builtins
import json
from pathlib import Path

import pytest
import source_checks
import yaml
from typer.testing import CliRunner

import fusion_plugins
from fusion_plugins.cli import app
from fusion_plugins.errors import FusionError

PACKAGE = Path(fusion_plugins.__file__).parent
#: attributes and names whose call can load code beside a model
LOADERS = {"from_pretrained", "from_config", "LLM", "pipeline"}
#: reads JSON, and has no such argument
HARMLESS = {"PeftConfig.from_pretrained"}


def calls_that_load():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                config = name.endswith("reference.config") or name.endswith("ref.config")
                if (name.rsplit(".", 1)[-1] in LOADERS or config) and name not in HARMLESS:
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}", node


def test_every_call_that_loads_a_model_or_a_part_of_it_says_whether_its_code_may_run():
    found = dict(calls_that_load())
    assert len(found) >= 8
    # vLLM gets its arguments as one dict, which says it.
    silent = [
        place
        for place, node in found.items()
        if not any(keyword.arg in ("trust_remote_code", None) for keyword in node.keywords)
    ]
    assert silent == []
    engine = (PACKAGE / "sources/backends/vllm_engine.py").read_text(encoding="utf-8")
    assert '"trust_remote_code": settings.trust_remote_code' in engine
    assert "trust_remote_code=True" not in "".join(path.read_text() for path in PACKAGE.rglob("*.py"))


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """A folder whose every part names code of its own, once of a known type and once of an unknown one."""
    folder = tmp_path_factory.mktemp("strange")
    code = f"open({str(folder / 'ran')!r}, 'a').write('x')\nfrom transformers import *\n"
    for name in ("known", "unknown"):
        model = source_checks.checkpoint(folder / name)
        classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
        for file, autos in (
            ("config.json", {one: f"theirs.Their{one}" for one in classes}),
            ("tokenizer_config.json", {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}),
            ("generation_config.json", {"AutoConfig": "theirs.Theirs"}),
        ):
            values = json.loads((model / file).read_text()) | {"auto_map": autos}
            if name == "unknown":
                values |= {"model_type": "strange"} if file == "config.json" else {"tokenizer_class": "Theirs"}
            (model / file).write_text(json.dumps(values))
        (model / "theirs.py").write_text(code)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["known", "unknown"])
def test_no_command_runs_the_code_of_a_model_or_asks_for_leave(strange, tmp_path, monkeypatch, name):
    model = strange / name
    texts, prompts = source_checks.texts(tmp_path / "t.jsonl"), source_checks.prompts(tmp_path / "p.jsonl")
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *arguments: asked.append(arguments) or "y")
    answer = {"prompt_id": "p", "source": "s", "prompt": "Hi", "response": "Ho"}
    answers = source_checks.write_rows(tmp_path / "a.jsonl", [answer])
    source = {"model": str(model), "max_tokens": 2, "n": 1}
    merge = {
        "merge_method": "linear",
        "dtype": "float32",
        "models": [{"model": str(model), "parameters": {"weight": 1.0}}] * 2,
    }
    server = {"base_url": "http://127.0.0.1:9/v1", "patience": 0.1}
    files = {
        "sample.yml": {"prompts": str(prompts), "out": str(tmp_path / "rows"), "sources": [source]},
        "score.yml": {
            "responses": str(answers),
            "out": str(tmp_path / "scored"),
            "scorers": {"reward": {"model": str(model)}},
        },
        "merge.yml": merge,
        "remote.yml": {
            "model": "served",
            "backend": "openai",
            "tokenizer": str(model),
            "texts": str(texts),
            "out": str(tmp_path / "remote"),
            "options": server,
        },
    }
    for file, values in files.items():
        (tmp_path / file).write_text(yaml.safe_dump(values))
    commands = [
        ["capture", "--texts", texts, "--model", model, "--out", tmp_path / "store"],
        ["capture", "--config", tmp_path / "remote.yml"],
        ["sample", "--config", tmp_path / "sample.yml"],
        ["score", "--config", tmp_path / "score.yml"],
        ["cut", "--texts", texts, "--tokenizer", model, "--max-length", 32, "--out", tmp_path / "cut.jsonl"],
        ["doctor", model, "--target", model, "--texts", texts, "--out", tmp_path / "doctor"],
        ["merge-check", tmp_path / "merge.yml"],
    ]
    for command in commands:
        result = CliRunner().invoke(app, [str(part) for part in command], input="y\n" * 100)
        ended = result.exception
        assert ended is None or isinstance(ended, FusionError | SystemExit), (command, ended)
        assert not (strange / "ran").exists(), command
        assert asked == [], command
