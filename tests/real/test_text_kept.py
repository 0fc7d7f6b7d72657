"""DeepSeek-V3's files name a tokenizer class that drops every space; the right class is accepted."""

import pytest
import real_assets
import source_checks
from transformers import AutoTokenizer
from typer.testing import CliRunner

from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer
from fusion_plugins.cli import app
from fusion_plugins.core.text.round_trip import text_changes
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.errors import TokenizerError
from fusion_plugins.sources.capture import capture_texts

pytestmark = pytest.mark.real
LOST = "loses or changes spaces, .*'the quick brown fox' becomes 'thequickbrownfox'.*PreTrainedTokenizerFast"


def test_the_declared_class_is_refused_everywhere(tmp_path):
    folder = real_assets.folder("deepseek_v3")
    texts = source_checks.texts(tmp_path / "texts.jsonl")
    with pytest.raises(TokenizerError, match=f"source 'deepseek_v3': .*{LOST}"):
        capture_texts(source_checks.capture_config(folder, texts, tmp_path / "store"))
    declared = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(TokenizerError, match=LOST):
        TargetTokenizer.of(declared, {})
    arguments = [folder, "--target", real_assets.folder("qwen3"), "--texts", texts, "--out", tmp_path / "doctor"]
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)])
    assert result.exit_code == 1
    assert "'thequickbrownfox'" in str(result.exception)


@pytest.mark.parametrize("name", real_assets.TOKENIZERS)
def test_real_tokenizers_lose_nothing(name):
    tokenizer = real_assets.tokenizer(name)
    found = text_changes(tokenizer, TokenTable.from_tokenizer(tokenizer).spell)
    known = {"llama2": ("a space before the text",), "mistral_v1": ("a space before the text",), "qwen3": ("NFC",)}
    assert (found.lost, found.known) == ({}, known.get(name, ()))
