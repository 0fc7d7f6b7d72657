r"""Find the program in a model's response: which of its blocks count, and how they belong together. Nothing is run.

1. The thinking is cut off, and the rest is split into fenced blocks, as loosely as models write them.
2. The last block that defines what the tests need is the answer. A block that only restates the signature is none.
3. Names that this block reads and does not define are taken from the definitions in the other blocks, nearest first: a
   helper or the imports may be in a block of their own.

A response without fences is a program as a whole, or holds one between its paragraphs.
"""

import ast
import re
import textwrap
from collections.abc import Collection

from fusion_plugins.scoring.answers import final_part
from fusion_plugins.scoring.code_blocks import (
    BINDING,
    READS_INPUT,
    Block,
    all_blocks,
    bound_at_top,
    is_empty,
    without_quote_marks,
)
from fusion_plugins.scoring.names import OFFERED, bound_names, free_names, parse

#: the end of a turn that was not cut off
_TURN_END = re.compile(r"(?:<\|\w+\|>|</s>)\s*\Z")


def extract_code(response: str, needed: Collection[str] = frozenset(), prompt: str = "") -> str:
    r"""Return the program in a response; empty where there is none.

    Args:
        response: of the model, in full.
        needed: names that the tests expect; empty for a program that reads its input by itself.
        prompt: the beginning of a program, which the response may continue (HumanEval).

    Example:
        >>> extract_code("Sure:\n```python\ndef f(): return 1\n```\nUsage:\n```python\nprint(f(), 'more')\n```", {"f"})
        'def f(): return 1\n'
    """
    text = _TURN_END.sub("", final_part(response)).replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")
    text = without_quote_marks(text)
    blocks = [block for block in all_blocks(text) if block.code.strip()]
    if not blocks:
        return ""
    answer = _choose(blocks, needed)
    if prompt and needed and not any(answer.defines(name) for name in needed):
        body = textwrap.indent(textwrap.dedent(answer.code), "    ")
        continued = Block(f"{prompt.rstrip()}\n{body}", labelled=True)
        if continued.tree is not None and any(continued.defines(name) for name in needed):
            return continued.code
    code = _link(answer, blocks, needed)
    return _with_offered(_behind_prompt(code, prompt, needed) if prompt and needed else code)


def _behind_prompt(code: str, prompt: str, needed: Collection[str]) -> str:
    """Return a program behind what the prompt imports and defines and the program does not."""
    tree, given = parse(code), parse(prompt)
    if tree is None or given is None:
        return code
    own = {*needed}.union(*(bound_at_top(node) for node in tree.body if isinstance(node, BINDING)))
    return _join(
        [
            node
            for node in given.body
            if isinstance(node, BINDING)
            and not bound_at_top(node) & own
            and not (isinstance(node, ast.FunctionDef) and is_empty(node.body))
        ],
        tree,
        code,
    )


def _with_offered(code: str) -> str:
    """Return a program with the imports it lacks of those that LeetCode offers, where it defines ``Solution``."""
    tree = parse(code)
    if not any(isinstance(node, ast.ClassDef) and node.name == "Solution" for node in (tree.body if tree else ())):
        return code
    missing = {name: OFFERED[name] for name in free_names(tree) if name in OFFERED}
    text = "".join(
        f"from {module} import {name}\n" if module else f"import {name}\n" for name, module in sorted(missing.items())
    )
    return _join(ast.parse(text).body, tree, code)


def _choose(blocks: list[Block], needed: Collection[str]) -> Block:
    """Return the block that is the answer."""
    programs = [block for block in blocks if block.labelled or block.tree is not None] or blocks
    if needed:
        defining = [block for block in programs if any(block.defines(name) for name in needed)]
        complete = [block for block in defining if not block.is_stub()]
        return (complete or defining or [max(programs, key=lambda block: len(block.code))])[-1]
    reading = [block for block in programs if READS_INPUT.search(_link(block, blocks, needed))]
    labelled = [block for block in programs if block.labelled]
    return (reading or labelled or [max(programs, key=lambda block: len(block.code))])[-1]


def _link(answer: Block, blocks: list[Block], needed: Collection[str]) -> str:
    """Return the answer with the definitions that it reads and that are in other blocks."""
    if answer.tree is None or len(blocks) == 1:
        return answer.code
    own = blocks.index(answer)
    others = [*range(own - 1, -1, -1), *range(own + 1, len(blocks))]
    linked: dict[tuple[int, int], ast.stmt] = {}
    missing = [*needed, *free_names(answer.tree)]
    known = set(missing) & bound_names(answer.tree)
    while missing:
        name = missing.pop()
        if name in known:
            continue
        known.add(name)
        # What no block binds may be in a module of which one imports everything.
        places = (
            place for wanted in (name, "*") for block in others if (place := _definition(blocks[block], block, wanted))
        )
        if place := next(places, None):
            linked[place[:2]] = place[2]
            missing += free_names(place[2])
    return _join([linked[place] for place in sorted(linked)], answer.tree, answer.code)


def _join(before: list[ast.stmt], tree: ast.Module, code: str) -> str:
    """Return a program behind other statements."""
    if not before:
        return code
    lines = code.split("\n")
    # They must be the first statements of a program.
    future = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    for node in future:
        lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "\n".join([*map(ast.unparse, [*future, *before]), *lines])


def _definition(block: Block, place: int, name: str) -> tuple[int, int, ast.stmt] | None:
    """Return the last statement of a block that binds a name, and its place; None where none does."""
    body = block.tree.body if block.tree else []
    for index, node in reversed(list(enumerate(body))):
        if isinstance(node, BINDING) and name in bound_at_top(node):
            return place, index, node
    return None
