"""Supervised and preference rows of one conversation have the same ids, cut where the answer begins and its turn ends."""

import copy
from pathlib import Path

import pytest
import real_assets
import tiny
import trl

from fusion_plugins.axolotl.preference_rows import make_rows, preference_row, supervised_row, SUPERVISED
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer
from fusion_plugins.core.text.token_table import Role
from fusion_plugins.errors import DataError

#: answers whose first letters merge with what is before them in one tokenizer or another, or that end oddly
ANSWERS = ("the theory of the other", " five", "\nfive", "  \n\tfive", "42", "数学 5", "five\n", "👩‍👩‍👧", "...", "<s> five", "é")
PROMPTS = ("Say it now: ", "1 + 1 =", "How many?\n", "Why? 🎉", [{"role": "user", "content": "Hi"}])
TEMPLATES = sorted(path.stem for path in Path(trl.__file__).with_name("chat_templates").glob("*.jinja"))


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return TargetTokenizer.of(changed, {})


def check(target, prompt, chosen, rejected):
    """What holds for every pair; returns the row."""
    answers = [target.answer(prompt, response) for response in (chosen, rejected)]
    row = preference_row(*answers)
    for answer, side in zip(answers, ("chosen_ids", "rejected_ids"), strict=True):
        supervised = supervised_row(answer)
        assert row["prompt_ids"] + row[side] == supervised["input_ids"]
        learnt = [label for label in supervised["labels"] if label != -100]
        # The pair's answer is the supervised one; only letters of the prompt that merged with the other may precede it.
        assert row[side][-len(learnt) :] == learnt
        bos = target.table.id_of_role(Role.BOS)
        assert supervised["input_ids"][:2] != [bos, bos]
        assert target.table.role_of(learnt[-1]) in (Role.EOS, Role.END_OF_TURN)
        assert [target.table.role_of(token) for token in learnt[-2:]].count(Role.EOS) <= 1
    return row
