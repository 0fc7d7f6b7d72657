"""What is supervised in a chat is what axolotl's own type `chat_template` supervises."""

import copy

import numpy as np
import pytest
import tiny
from axolotl.prompt_strategies.chat_template import ChatTemplatePrompter, ChatTemplateStrategy
from tokenizers import AddedToken

from fusion_plugins.axolotl.target_tokenizer import IGNORED, TargetTokenizer
from fusion_plugins.core.text.token_table import TokenTable

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}<|turn_end|>\n{% endfor %}"


@pytest.mark.parametrize("special", [True, False])
def test_the_token_that_ends_a_turn_is_trained_however_it_was_added(special):
    """`tokens:` of an axolotl configuration adds tokens that are not special."""
    tokenizer = copy.deepcopy(tiny.byte_level())
    tokenizer.add_tokens([AddedToken("<|turn_end|>", special=special, normalized=False)], special_tokens=special)
    tokenizer.chat_template = TEMPLATE
    names = {"role": "role", "content": "content"}
    prompter = ChatTemplatePrompter(tokenizer, TEMPLATE, message_property_mappings=names)
    theirs = ChatTemplateStrategy(
        prompter, tokenizer, False, 512, roles_to_train=["assistant"], train_on_eos="turn", eot_tokens=["<|turn_end|>"]
    ).tokenize_prompt({"messages": tiny.CHAT})
    ours = TargetTokenizer(tokenizer, TokenTable.from_tokenizer(tokenizer), {}).encode(tiny.CHAT)
    assert ours.tokens.input_ids.tolist() == theirs["input_ids"]
    assert ours.labels.tolist() == theirs["labels"]
    end = tokenizer.convert_tokens_to_ids("<|turn_end|>")
    assert np.count_nonzero(ours.labels == end) == 2
    assert np.count_nonzero(ours.labels != IGNORED) > 20


@pytest.mark.parametrize("special", [True, False])
def test_preference_rows_end_with_it_as_well(special):
    tokenizer = copy.deepcopy(tiny.byte_level())
    tokenizer.add_tokens([AddedToken("<|turn_end|>", special=special, normalized=False)], special_tokens=special)
    tokenizer.chat_template = TEMPLATE
    target = TargetTokenizer(tokenizer, TokenTable.from_tokenizer(tokenizer), {})
    answer = target.answer("Hi", "Ho")
    assert answer.text == tokenizer.decode(answer.answer_ids) == "Ho<|turn_end|>"
