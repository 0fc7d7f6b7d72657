"""Real tokenizers and a real language model, which `make real-assets` fetches; tests that use them are marked `real`.

Two more real tokenizers come with the mistral-common package: `tiny.tekken` and `tiny.mistral_v1`.
"""

import importlib.util
import os
from functools import cache
from pathlib import Path

import pytest
import tiny
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CACHE = Path(__file__).parents[2] / ".cache" / "real"
FETCHED = ("llama2", "llama3_1", "gemma3", "qwen3", "deepseek_v3", "gptoss", "smollm2")
TOKENIZERS = (*FETCHED, "mistral_v1", "tekken")
"""All real tokenizers."""
WITH_OWN_TEMPLATE = ("llama3_1", "gemma3", "qwen3", "deepseek_v3", "smollm2")
"""Those that were published with a chat template; `tokenizer` gives two others one of their family."""
_CURE = "run `make real-assets`"


def require() -> None:
    """Skip the running test where the assets are missing; in CI, fail it.

    Call it before :func:`tokenizer` in tests without the marker `real`, which does so itself.
    """
    missing = [name for name in FETCHED if not (CACHE / name / "source.txt").is_file()]
    if missing and os.environ.get("CI"):
        pytest.fail(f"real assets are missing ({', '.join(missing)}): {_CURE}", pytrace=False)
    if missing:
        pytest.skip(f"real assets are missing: {_CURE}")


def folder(name: str) -> Path:
    """The files of a tokenizer as they were published (deepseek_v3 names a class that loses text), or of a model."""
    found = CACHE / name
    if not found.is_dir():
        raise FileNotFoundError(f"{found}: {_CURE}")
    return found


def model_folder(name: str = "smollm2") -> Path:
    """A real language model as safetensors with its tokenizer: SmolLM2-135M-Instruct, float32."""
    return folder(name)


@cache
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A real tokenizer, loaded as it is meant to be; the same object each time, so do not change it.

    With its own chat template if it has one; that of trl for gptoss, one of its family for llama2 and mistral_v1,
    none for tekken.
    """
    if name in ("mistral_v1", "tekken"):
        return getattr(tiny, name)()
    if name == "deepseek_v3":
        # The class that its files name, LlamaTokenizerFast, drops every space in transformers 5.
        return PreTrainedTokenizerFast.from_pretrained(folder(name))
    found = AutoTokenizer.from_pretrained(folder(name))
    if name == "llama2":
        found.chat_template = tiny.INST
    if name == "gptoss":
        found.chat_template = _trl_template("gptoss")
    return found


def _trl_template(name: str) -> str | None:
    package = importlib.util.find_spec("trl")
    if package is None:  # the environment of vLLM has none
        return None
    return (Path(package.origin).parent / "chat_templates" / f"{name}.jinja").read_text()
