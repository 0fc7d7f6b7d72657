"""The shapes in which models write programs; read by the tests and by tools/extraction_table.py."""

import json
import textwrap

GOOD = "def f(x):\n    return x * 2"
BAD = "def f(x):\n    return x + 7"
MARKED_UP = 'def f(x):\n    """Doubles.\n\n    ```python\n    f(1)\n    ```\n    """\n    return x * 2'
STUB = "def f(x):\n    ..."
HELPER = "def twice(x):\n    return 2 * x"
CALLER = "def f(x):\n    return twice(x)"
ANNOTATED = "def f(x: List):\n    return x * 2"
WITH_FLOOR = "def f(x):\n    return x * floor(2.5)"
FROM_THE_FUTURE = "from __future__ import annotations\ndef f(x: T):\n    return twice(x)"
USAGE = "\n".join(["# how to use it"] * 5 + ["print(f(1))", "print(f(2))", "print('a long, long example of its use')"])


def fenced(code, language="python", fence="```"):
    return f"{fence}{language}\n{code}\n{fence}"


SESSION = "In [1]: def f(x):\n   ...:     return x * 2\n   ...: \n\nIn [2]: f(2)\nOut[2]: 4"
CELLS = "In [1]:\ndef f(x):\n    return x * 2\n\nIn [2]:\nprint(f(2))\n\nOut[2]:\n4"


def quoted(text, mark="> "):
    return "\n".join(f"{mark}{line}".rstrip() for line in text.split("\n"))


#: group -> shape -> response in which f doubles its argument
GROUPS = {
    "fences": {
        "one block": f"Sure:\n\n{fenced(GOOD)}\n\nIt doubles.",
        "no language": fenced(GOOD, ""),
        "py": fenced(GOOD, "py"),
        "py3": fenced(GOOD, "py3"),
        "Python with a capital": fenced(GOOD, "Python"),
        "python3": fenced(GOOD, "python3"),
        "attributes": fenced(GOOD, 'python title="f.py" linenums="1"'),
        "braces": fenced(GOOD, "{.python .numberLines}"),
        "a file name": fenced(GOOD, "python:main.py"),
        "a space before the language": fenced(GOOD, " python"),
        "text": fenced(GOOD, "text"),
        "code": fenced(GOOD, "code"),
        "tildes": fenced(GOOD, fence="~~~"),
        "four backticks around three": fenced(MARKED_UP, fence="````"),
        "text before the fence": f"Here is the code: {fenced(GOOD)}",
        "text before the fence in Chinese": f"代码如下：{fenced(GOOD, 'py')}",
        "a heading and the fence": f"### Solution ```python\n{GOOD}\n```",
        "text behind the closing fence": f"```python\n{GOOD}\n``` This doubles x.",
        "closing fence at the end of a line": f"```python\n{GOOD}```",
        "code behind the opening fence": f"```python {GOOD}\n```",
        "unclosed fence": f"```python\n{GOOD}\n",
        "CRLF": fenced(GOOD).replace("\n", "\r\n"),
        "a list item": "1. Write it:\n   ```python\n   def f(x):\n       return x * 2\n   ```\n2. Done.",
        "a nested list with tabs": "- a\n\t- b\n\t```python\n\tdef f(x):\n\t    return x * 2\n\t```",
        "an indented body": "```python\n    def f(x):\n        return x * 2\n```",
        "a quote mark in the text": f"It's easy, don't worry:\n{fenced(GOOD)}\nThat's all.",
        "inline code before": f"Use `x * 2` or ```x + x```:\n{fenced(GOOD)}",
        "no new line at the end": f"```python\n{GOOD}\n```",
        "spaces of typesetting": fenced(GOOD.replace("    ", "\u00a0\u00a0\u00a0\u00a0")),
        "a byte order mark": "\ufeff" + fenced(GOOD),
    },
    "a fence opened by the prompt": {
        "prefilled fence": f"{GOOD}\n```\nIt doubles.",
        "prefilled fence with imports": f"import math\n\n{GOOD}\n```",
        "prefilled fence and an example": f"{GOOD}\n```\nFor example:\n```python\n{USAGE}\n```",
    },
    "fences inside of code": {
        "fence in a docstring": fenced(MARKED_UP),
        "fence in a docstring, unclosed": f"```python\n{MARKED_UP}",
        "fence in a comment": fenced("# ```\n# f(2)\n# ```\n" + GOOD),
        "fence in a string": fenced('FENCE = "```"\n' + GOOD),
        "fence in a long string": fenced("TEXT = '''\n```\n'''\n" + GOOD),
        "a docstring that is never closed": f'```python\ndef g():\n    """Broken.\n```\nBetter:\n{fenced(GOOD)}',
    },
    "several blocks": {
        "draft, then final": f"First try:\n{fenced(BAD)}\nThat adds. Corrected:\n{fenced(GOOD)}",
        "draft with a syntax error": f"{fenced('def f(x:')}\nOops.\n{fenced(GOOD)}",
        "draft that was never closed": f"```python\n{BAD}\nWait, that is wrong.\n```python\n{GOOD}\n```",
        "usage longer than the answer": f"{fenced(GOOD)}\nUsage:\n{fenced(USAGE)}",
        "usage without language": f"{fenced(GOOD)}\nUsage:\n{fenced(USAGE, '')}",
        "output of the program": f"{fenced(GOOD)}\nOutput:\n{fenced('2' * 100, '')}",
        "tests of its own": f"{fenced(GOOD)}\n{fenced('def test_f(): assert f(1) == 2 # and a long remark', 'python')}",
        "a shell block": f"{fenced('pip install numpy', 'bash')}\n{fenced(GOOD)}\n{fenced('python f.py', 'bash')}",
        "another language": f"{fenced(GOOD)}\nIn JavaScript:\n{fenced('function f(x) { return 3 * x }', 'javascript')}",
        "pseudocode": f"{fenced('def f(x): give back x twice', '')}\n{fenced(GOOD)}",
        "pseudocode behind": f"{fenced(GOOD)}\n{fenced('def f(x): give back x twice', '')}",
        "signature restated": f"{fenced(GOOD)}\nThe signature stays:\n{fenced(STUB)}",
        "helper and main": f"{fenced(HELPER)}\n{fenced(CALLER)}",
        "main, then helper": f"{fenced(CALLER)}\n{fenced(HELPER)}",
        "imports in a block of their own": f"{fenced('from typing import List')}\n{fenced(ANNOTATED)}",
        "a chain of helpers": "\n".join(
            fenced(code)
            for code in ("TWO = 2", "def g(x):\n    return x * TWO", "print(g(1))", "def f(x):\n    return g(x)")
        ),
        "future import in the last block": f"{fenced(HELPER)}\n{fenced(FROM_THE_FUTURE)}",
        "star import in a block of its own": f"{fenced('from math import *')}\n{fenced(WITH_FLOOR)}",
    },
    "definitions": {
        "lambda": fenced("f = lambda x: x * 2"),
        "async and decorated": fenced("import functools\n@functools.cache\ndef f(x):\n    return x * 2"),
        "an alias": fenced("def double(x):\n    return x * 2\n\nf = double"),
        "an imported name": fenced("from functools import partial\nfrom operator import mul\nf = partial(mul, 2)"),
    },
    "no fences, tags, sessions": {
        "bare code": GOOD,
        "bare code with text around": f"Here is my solution:\n\n{GOOD}\n\nThis runs in constant time.",
        "bare code with a note that reads as Python": f"Solution:\n{GOOD}\n\nComplexity: O(1)\nDone",
        "bare code in two parts": f"First this:\n\nTWO = 2\n\nThen this:\n\n{GOOD.replace('2', 'TWO')}\n\nThat is it.",
        "bare code that is indented": f"Solution:\n\n{textwrap.indent(GOOD, '    ')}\n\nIt runs in constant time.",
        "bare code and the end of its turn": f"{GOOD}<|im_end|>",
        "tags": f"[PYTHON]\n{GOOD}\n[/PYTHON]",
        "tags of an answer": f"<answer>\n{GOOD}\n</answer>",
        "fence in tags": f"<answer>```python\n{GOOD}\n```</answer>",
        "interpreter session": fenced(">>> def f(x):\n...     return x * 2\n...\n>>> f(2)\n4"),
        "a docstring with examples": fenced('def f(x):\n    """\n    >>> f(2)\n    4\n    """\n    return x * 2'),
        "a notebook": fenced("!pip install numpy\n%matplotlib inline\n" + GOOD),
        "bare interpreter session": ">>> def f(x):\n...     return x * 2\n...\n>>> f(2)\n4",
        "interpreter session in a text": "Try it:\n\n>>> def f(x):\n...     return x * 2\n...\n>>> f(2)\n4\n\nDone.",
        "notebook session": fenced(SESSION),
        "notebook session, bare": SESSION,
        "notebook session that corrects itself": fenced(f"In [1]: f = None\n{SESSION.replace('1]', '2]')}", "ipython"),
        "notebook session with output": fenced(SESSION.replace("f(2)\nOut[2]: 4", "print(f(2))\n4 is it\n\nIn [3]: ")),
        "cells of a notebook": fenced(CELLS),
        "cells of a notebook, bare": CELLS,
        "notebook session in one line each": "In [1]: f = lambda x: x * 2\nIn [2]: f(2)\nOut[2]: 4",
    },
    "block quotes": {
        "a block quote": quoted(f"Answer:\n{fenced(GOOD)}\nIt doubles."),
        "a block quote between paragraphs": f"You asked:\n\n{quoted(fenced(GOOD))}\n\nThat is it.",
        "a block quote without spaces": quoted(fenced(GOOD), ">"),
        "a block quote in a block quote": quoted(quoted(fenced(GOOD))),
        "a block quote with tildes": quoted(fenced(GOOD, fence="~~~")),
        "a block quote of a session": quoted(fenced(">>> def f(x):\n...     return x * 2\n")),
        "a block quote of bare code": f"As before:\n\n{quoted(GOOD)}",
        "a quoted draft, then the final": f"{quoted(fenced(BAD))}\n\nCorrected:\n{fenced(GOOD)}",
        "a quoted question before": f"> Write f.\n> It doubles.\n\n{fenced(GOOD)}",
    },
    "JSON": {
        "JSON": json.dumps({"code": GOOD}),
        "JSON with an explanation": json.dumps({"thought": "It doubles x.", "language": "python", "code": GOOD}),
        "JSON in a fence": fenced(json.dumps({"solution": GOOD}, indent=2), "json"),
        "JSON in a fence without language": fenced(json.dumps({"solution": GOOD}, indent=2), ""),
        "JSON with new lines as they are": '{"code": "' + GOOD + '"}',
        "JSON that holds a fence": json.dumps({"answer": f"Here:\n{fenced(GOOD)}\nDone."}),
        "JSON in a text": f"My answer is {json.dumps({'code': GOOD})}. It doubles.",
        "a call of a tool": json.dumps({"name": "submit", "arguments": {"code": GOOD}}),
        "a call of a tool with JSON as text": json.dumps({"name": "submit", "arguments": json.dumps({"code": GOOD})}),
        "a list of files in JSON": json.dumps([{"path": "a.txt", "text": "hello"}, {"path": "f.py", "text": GOOD}]),
        "JSON of an example beside the program": f"{fenced(json.dumps({'x': 2}), 'json')}\n{fenced(GOOD)}",
    },
    "thinking": {
        "think, then a block": f"<think>\nMaybe\n{fenced(BAD)}\n</think>\n{fenced(GOOD)}",
        "think, then bare code": f"<think>\nLet me see. {fenced(BAD)}\n</think>\n\n{GOOD}",
        "think without its begin": f"Maybe {fenced(BAD)}\n</think>\n\n{fenced(GOOD)}",
        "think with an open fence": f"<think>\n```python\n{BAD}\n</think>\n{fenced(GOOD)}",
        "think, fence on the same line": f"<think>hm</think>```python\n{GOOD}\n```",
        "the word in a program": fenced(GOOD + "\n\nTAG = '<think>'\nEND = '</think>'"),
        "a block of another function last": f"{fenced(GOOD)}\nA variant:\n{fenced(HELPER)}",
    },
}
SHAPES = {shape: text for group in GROUPS.values() for shape, text in group.items()}

ADD = "def add(a, b):\n    return a + b"
ADDS = "a, b = map(int, input().split())\nprint(add(a, b))"
READ = "def read():\n    return map(int, input().split())"
READS_BY_CALL = "a, b = read()\nprint(a + b)"
NO_INPUT = "\n".join(["print(1 + 2)"] * 9)
READS = "a, b = map(int, input().split())\nprint(a + b)"
#: shape -> response whose program prints the sum of two numbers that it reads
WHOLE_PROGRAMS = {
    "one block": fenced(READS),
    "draft, then final": f"{fenced(READS.replace('+', '-'))}\nNo:\n{fenced(READS)}",
    "sample": f"{fenced(READS)}\nSample input:\n{fenced('1 2', '')}\nSample output:\n{fenced('3', '')}",
    "sample before": f"For the input\n{fenced('1 2', '')}\nthis prints 3:\n{fenced(READS)}",
    "helper and main": f"{fenced(ADD)}\n{fenced(ADDS)}",
    "reader in a helper": f"{fenced(READ)}\n{fenced(READS_BY_CALL)}",
    "longer example": f"{fenced(READS)}\nWithout input:\n{fenced(NO_INPUT)}",
    "standard input": fenced("import sys\nprint(sum(map(int, sys.stdin.read().split())))"),
    "bare": READS,
}
