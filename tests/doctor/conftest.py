"""Checkpoints of three tokenizers, and the stores of four short texts."""

import json

import pytest
import tiny

TEXTS = [
    "def area(width, height):\n    return width * height\n",
    "Ann has 12 apples and buys 345 more. She has 357 apples.",
    "中文数学题：小明有十二个苹果。",
    "Plain prose, with a comma; and a naïve café.",
]


@pytest.fixture(scope="session")
def contents():
    """Id -> text."""
    return {str(index): text for index, text in enumerate(TEXTS)}


@pytest.fixture(scope="session")
def work(tmp_path_factory, contents):
    """A folder with models/{target,a,b}, texts.jsonl and stores/{target,a,b,other-texts}."""
    folder = tmp_path_factory.mktemp("doctor")
    lines = [json.dumps({"id": id, "text": text}) for id, text in contents.items()]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    (folder / "others.jsonl").write_text(json.dumps({"id": "elsewhere", "text": "something else"}))
    models = {"target": tiny.byte_level(), "a": tiny.sentencepiece_bpe(), "b": tiny.digit_splitting()}
    for seed, (name, tokenizer) in enumerate(models.items()):
        tiny.llama_checkpoint(folder / "models" / name, seed=seed, tokenizer=tokenizer)
        _capture(folder, name, "texts", name)
    _capture(folder, "a", "others", "other-texts")
    return folder


def _capture(folder, model, texts, out):
    from fusion_plugins.sources.capture import capture_texts
    from fusion_plugins.sources.capture_config import CaptureConfig

    settings = {"model": str(folder / "models" / model), "texts": str(folder / f"{texts}.jsonl"), "top_k": 32}
    capture_texts(CaptureConfig(**settings, out=str(folder / "stores" / out)))
