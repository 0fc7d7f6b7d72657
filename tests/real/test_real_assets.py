"""The real tokenizers and the real model are what their names say."""

import pytest
import real_assets
from transformers import AutoConfig

pytestmark = pytest.mark.real
SIZES = {
    "llama2": 32_000,
    "llama3_1": 128_256,
    "gemma3": 262_145,
    "qwen3": 151_669,
    "deepseek_v3": 128_815,
    "gptoss": 200_019,
    "smollm2": 49_152,
    "mistral_v1": 32_000,
    "tekken": 131_072,
}


@pytest.mark.parametrize("name", real_assets.TOKENIZERS)
def test_every_tokenizer_is_of_the_size_that_its_makers_state(name):
    assert len(real_assets.tokenizer(name)) == SIZES[name]


@pytest.mark.parametrize("name", real_assets.WITH_OWN_TEMPLATE)
def test_own_templates_render_a_chat(name):
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Forty-two."}]
    text = real_assets.tokenizer(name).apply_chat_template(chat, tokenize=False)
    assert text.index("How many?") < text.index("Forty-two.")


def test_the_model_is_smollm2():
    config = AutoConfig.from_pretrained(real_assets.model_folder())
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (49_152, 576, 30)
