"""Which tests run outside of the program's process, and that honest programs get the same verdict there."""

import doctest
import json

import pytest

from fusion_plugins.scoring import sandbox_values, trust
from fusion_plugins.scoring.code_scorer import CodeScorer
from fusion_plugins.scoring.code_tests import read_tests
from fusion_plugins.scoring.sandbox_values import NotAValue, TooLarge, decode, encode

NEXT = "def f(x):\n    return x + 1"
STACK = (
    "class Stack:\n    def __init__(self, items=()):\n        self.items = list(items)\n    def push(self, x):\n"
    "        self.items.append(x)\n        return self\n    def pop(self):\n        return self.items.pop()\n"
    "    def __eq__(self, other):\n        return self.items == other.items\n"
)
LINKED = (
    "class Node:\n    def __init__(self, value, next=None):\n        self.value = value\n        self.next = next\n"
    "def build(values):\n    node = None\n    for value in reversed(values):\n        node = Node(value, node)\n"
    "    return node\ndef f(node):\n    return node.value + (f(node.next) if node.next else 0)"
)
OWN_ERROR = "class Odd(ValueError):\n    pass\ndef f(x):\n    if x % 2:\n        raise Odd('odd: %d' % x)\n    return x"

#: what the tests use -> (tests, program)
NAMED = "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(x):\n    return P(x, 2)"
POINT = (
    "class Point:\n    def __init__(self, x):\n        self.x = x\n    def __repr__(self):\n"
    "        return f'Point({self.x})'\n    def __eq__(self, other):\n        return self.x == other.x\n"
    "def f(x):\n    return Point(x)"
)
OUTSIDE = {
    "values": ("assert f(1) == 2", NEXT),
    "a set": ("assert set(f([1, 1])) == {1}", "def f(x):\n    return x"),
    "a tuple": ("assert f(1) == (1, 2)", "def f(x):\n    return x, x + 1"),
    "a tuple that is no list": ("assert f(1) != [1, 2]", "def f(x):\n    return x, x + 1"),
    "a named tuple and its fields": ("assert f(1) == (1, 2) and f(1).x == 1 and str(f(1)) == 'P(x=1, y=2)'", NAMED),
    "a named tuple that goes back": (
        "assert g(f(1)) == [f(3)]",
        NAMED + "\ndef g(p):\n    return [p._replace(x=p.x + 2)]",
    ),
    "figures of a cache": (
        "f(1)\nf(1)\nassert f.cache_info().hits == 1",
        "import functools\n@functools.cache\ndef f(x):\n    return x",
    ),
    "how an object is shown": ("assert repr(f(1)) == 'Point(1)' and f'{f(2)!r}' == 'Point(2)'", POINT),
    "objects that are equal": ("assert f(1) == f(1) and f(1) != f(2) and f(3) in [f(2), f(3)]", POINT),
    "the end of an iteration": (
        "g = f(1)\nnext(g)\ntry:\n    g.send(None)\n    assert False\nexcept StopIteration:\n    pass\n"
        "assert f(1) is not None",
        "def f(x):\n    yield x",
    ),
    "nearly": ("assert abs(f(2.5) - 3) < 1e-6", "def f(x):\n    return x + 0.5"),
    "not a number": ("assert f(1) != f(1)", "def f(x):\n    return float('nan')"),
    "infinity": ("assert f() == float('inf')", "def f():\n    return float('inf')"),
    "a large number": ("assert f(9) == 7 ** 9999", "def f(x):\n    return 7 ** 9999"),
    "bytes": ("assert f(b'a\\xff') == bytearray(b'a\\xff!')", "def f(x):\n    return bytearray(x + b'!')"),
    "half of a pair": ("assert f('\\ud83d') == '\\ud83d!'", "def f(x):\n    return x + '!'"),
    "nested": ("assert f({1: [(2, {3})]}) == {1: [(2, {3})], None: True}", "def f(x):\n    return {**x, None: True}"),
    "a complex number": ("assert f(1) == 1j", "def f(x):\n    return x * 1j"),
    "decimals and fractions": (
        "from decimal import Decimal\nfrom fractions import Fraction\nassert f(Decimal('0.1'), Fraction(1, 3)) == "
        "(Decimal('0.2'), Fraction(2, 3))",
        "def f(x, y):\n    return x * 2, y * 2",
    ),
    "dates": (
        "import datetime\nassert f(datetime.date(2020, 2, 29), datetime.timedelta(1)) == datetime.date(2020, 3, 1)",
        "def f(x, y):\n    return x + y",
    ),
    "a counter": (
        "from collections import Counter\nassert f('aab') == Counter(a=2, b=1)\nassert isinstance(f('a'), Counter)",
        "import collections\ndef f(x):\n    return collections.Counter(x)",
    ),
    "a named tuple": (
        "assert f() == (1, 2)",
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f():\n    return P(1, 2)",
    ),
    "an IntEnum": ("assert f() == 1", "import enum\nclass E(enum.IntEnum):\n    A = 1\ndef f():\n    return E.A"),
    "a range": ("assert list(f(range(3))) == [0, 1, 2]", "def f(x):\n    return x"),
    "views": ("assert f({1: 2}) == ({1}, [2])", "def f(x):\n    return x.keys(), list(x.values())"),
    "a generator": ("assert list(f(3)) == [0, 1, 2]", "def f(x):\n    yield from range(x)"),
    "an endless generator": (
        "g = f()\nassert [next(g), next(g)] == [1, 2]",
        "import itertools\ndef f():\n    return itertools.count(1)",
    ),
    "a map": ("assert sum(f([1, 2])) == 5", "def f(x):\n    return map(lambda y: y + 1, x)"),
    "an iterator that is handed back": (
        "assert list(f(g(3))) == [0, 2, 4]",
        "def g(x):\n    yield from range(x)\ndef f(x):\n    return [2 * y for y in x]",
    ),
    "a function that is returned": ("assert f(1)(2) == 3", "def f(x):\n    return lambda y: x + y"),
    "a function among values": (
        "f_one, name = f(1)\nassert f_one(2) == 3 and name == 'one'",
        "def f(x):\n    return (lambda y: x + y), 'one'",
    ),
    "changed arguments": ("x = [3, 1]\nf(x)\nassert x == [1, 3]", "def f(x):\n    x.sort()"),
    "changed arguments inside others": (
        "row = [1]\ntable = {'row': row, 'gone': 1}\nassert f(table) is None\n"
        "assert row == [1, 2] and table == {'row': row}",
        "def f(x):\n    x['row'].append(2)\n    del x['gone']",
    ),
    "changed keyword": ("x = {1}\nf(x=x)\nassert x == {1, 2}", "def f(*, x):\n    x.add(2)"),
    "unchanged arguments": ("x = [3, 1]\nassert f(x) == [1, 3]\nassert x == [3, 1]", "def f(x):\n    return sorted(x)"),
    "an error": (
        "import pytest\ndef test_a():\n    with pytest.raises(ValueError, match='odd'):\n"
        "        f(1)\n    assert f(2) == 2",
        OWN_ERROR,
    ),
    "errors of unittest": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n"
        "        self.assertRaises(ValueError, f, 1)\n"
        "        with self.assertRaises((TypeError, KeyError)) as caught:\n            f('a')\n"
        "        self.assertEqual(f(2), 2)",
        "def f(x):\n    if x == 1:\n        raise ValueError('no')\n    return x + 0",
    ),
    "the text of an error": (
        "try:\n    f(1)\nexcept KeyError as error:\n    assert error.args == (1, 'gone')\nelse:\n    assert False",
        "def f(x):\n    raise KeyError(x, 'gone')",
    ),
    "an error with arguments of its own": (
        "try:\n    f(b'\\xff')\nexcept UnicodeDecodeError:\n    pass\nelse:\n    assert False",
        "def f(x):\n    return x.decode()",
    ),
    "several functions": ("assert f(g(1)) == 3", "def g(x):\n    return x + 1\ndef f(x):\n    return x + 1"),
    "functions as values": (
        "for h in (f, g):\n    assert h(1) == 2\nassert list(map(f, [1])) == [2]",
        NEXT + "\ng = f",
    ),
    "a name that is built in": ("assert sum(10, 15) == 25", "def sum(x, y):\n    return x + y"),
    "a built-in name that is shadowed": (
        "assert abs(f(1)) == 1",
        "def abs(x):\n    return 7\ndef f(x):\n    return -x",
    ),
    "objects that only the program looks into": ("assert f(build([1, 2, 3])) == 6", LINKED),
    "attributes": ("n = build([1, 2])\nassert n.next.value == 2 and n.next.next is None", LINKED),
    "methods": ("s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2 and s.items == [1]", STACK),
    "an object at once": ("assert Stack([1]).pop() == 1", STACK),
    "Solution": (
        {"test": "def check(c):\n    assert c(nums=[1, 2], target=3) == [0, 1]", "entry_point": "Solution().f"},
        "class Solution:\n    def f(self, nums, target):\n        return [0, 1]",
    ),
    "modules that nobody imports": ("assert math.isclose(f(1), 2)", "import math\n" + NEXT),
    "names of the prompt": (
        {
            "prompt": "import math\ndef twice(x):\n    return 2 * x\n\ndef f(x):\n    '''Doubles.'''\n",
            "test": "def check(c):\n    assert math.fabs(c(2) - twice(2)) < 1e-9",
            "entry_point": "f",
        },
        "def f(x):\n    return x + x",
    ),
    "a setup": (
        {
            "setup": "from typing import *\nONE = 1\ndef same(a: List, b):\n    assert a == b",
            "tests": ["same(f(ONE), 2)"],
        },
        NEXT,
    ),
    "parametrized tests": (
        "import pytest\nfrom solution import f\n@pytest.mark.parametrize('x, y', [(1, 2), (2, 3)])\n"
        "def test_a(x, y):\n    assert f(x) == pytest.approx(y)",
        NEXT,
    ),
    "arguments and results": ({"fn_name": "f", "inputs": [[1]], "outputs": [2]}, NEXT),
    "standard input": ({"inputs": ["1"], "outputs": ["2"]}, "print(int(input()) + 1)"),
    "equal arguments that are one": ("x = []\nf(x, x)\nassert x == [1]", "def f(x, y):\n    x.append(1)\n    y[:] = x"),
}
INSIDE = {
    "a context": (
        "with f(1) as x:\n    assert x == 1",
        "import contextlib\n@contextlib.contextmanager\ndef f(x):\n    yield x",
    ),
    "the type of a generator": (
        "import types\nassert isinstance(f(1), types.GeneratorType)",
        "def f(x):\n    yield x",
    ),
    "objects that are compared": ("assert Stack([1]).push(2) == Stack([1, 2])", STACK),
    "classes": ("s = Stack()\nassert isinstance(s, Stack) and s.items == []", STACK),
    "a class of its own": ("class Two(Stack):\n    pass\nassert Two([1]).pop() == 1", STACK),
    "an error of the program": (
        "try:\n    f(1)\nexcept Odd:\n    pass\nelse:\n    assert False\nassert f(2) == 2",
        OWN_ERROR,
    ),
    "an error of the program by name": (
        "import pytest\ndef test_a():\n    with pytest.raises(Odd):\n        f(1)",
        OWN_ERROR,
    ),
    "an error of a module": (
        "import json\ntry:\n    f('{')\nexcept json.JSONDecodeError:\n    pass\nelse:\n"
        "    assert False\nassert f('1') == 1",
        "import json\ndef f(x):\n    return json.loads(x)",
    ),
    "a function that is handed in": ("assert f(lambda x: x + 1, 1) == 2", "def f(g, x):\n    return g(x)"),
    "an object of the setup": (
        {"setup": "class Node:\n    def __init__(self, x):\n        self.x = x", "tests": ["assert f(Node(1)) == 2"]},
        "def f(node: Node):\n    return node.x + 1",
    ),
    "what is printed": (
        "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n    f()\n"
        "assert out.getvalue() == 'x\\n'",
        "def f():\n    print('x')",
    ),
    "a fixture for what is printed": (
        "def test_a(capsys):\n    f()\n    assert capsys.readouterr().out == 'x\\n'",
        "def f():\n    print('x')",
    ),
    "a patched module": (
        "from unittest import TestCase, mock\nclass T(TestCase):\n    @mock.patch('time.sleep')\n"
        "    def test_a(self, sleep):\n        f()\n        self.assertEqual(sleep.call_count, 1)",
        "import time\ndef f():\n    time.sleep(100)",
    ),
    "a file": ("open('a', 'w').write('x')\nassert f('a') == 'x'", "def f(path):\n    return open(path).read()"),
    "a seed": (
        "import random\nrandom.seed(1)\na = f()\nrandom.seed(1)\nassert f() == a",
        "import random\ndef f():\n    return random.random()",
    ),
    "identity": ("x = []\nassert f(x) is x", "def f(x):\n    return x"),
    "a documentation string": ("assert f.__doc__ == 'Doc.'", "def f():\n    'Doc.'"),
    "a value of the program": ("assert LIMIT == 3", "LIMIT = 3"),
    "an attribute that is set": ("s = Stack()\ns.items = [4]\nassert s.pop() == 4", STACK),
    "a helper that only the program has": (
        {"test": "def check(c):\n    assert encode(c('a')) == 'a!!'", "entry_point": "f"},
        "def encode(x):\n    return x + '!'\ndef f(x):\n    return x + '!'",
    ),
}


@pytest.fixture(scope="module")
def scorer(short_limits):
    made = CodeScorer(workers=2, **short_limits)
    yield made
    made.close()


@pytest.mark.parametrize(("cases", "where"), [(OUTSIDE, "outside"), (INSIDE, "inside")], ids=["outside", "inside"])
def test_right_programs_pass_where_their_tests_can_run(scorer, cases, where):
    rows = [{"response": f"```python\n{code}\n```", "tests": tests} for tests, code in cases.values()]
    found = dict(zip(cases, scorer.score(rows), strict=True))
    wrong = {
        name: score for name, score in found.items() if (score.correct, score.details.get("trust")) != (True, where)
    }
    assert wrong == {}


def test_what_the_program_returns_never_moves_a_test_inside(scorer):
    """Objects where the test wants a value, also when it hands them back, are wrong and not an excuse."""
    programs = [
        "def f(x):\n    return object()",
        "def f(x):\n    return iter([x])",
        "def f(x):\n    x = [x]\n    x.append(x)\n    return x",
    ]
    tests = ["assert f(f(1)) == 3", "assert [f(1)] == [2] and f([f(2)]) == 1"]
    rows = [{"response": f"```python\n{code}\n```", "tests": test} for code in programs for test in tests]
    assert {(score.correct, score.details["trust"]) for score in scorer.score(rows)} == {(False, "outside")}


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -5,
        10**400,
        1.5,
        float("-inf"),
        "a\ud800",
        b"\0",
        [1, [2]],
        (1,),
        {1: {2}},
        {(1, 2): []},
        range(1, 9, 2),
    ],
)
def test_values_come_back_as_they_were(value):
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    "coded",
    [
        ["ndarray", "O", ["list", 1]],
        ["ndarray", "<U3", ["list", "a"]],
        ["namedtuple", "P", ["__eq__"], 1],
        ["namedtuple", "P;", ["x"], 1],
        ["namedtuple", "P", "x", 1, 2],
        {"a": 1},
        ["eval", "1"],
        ["object", 1],
        [],
        ["dict", 1],
        [[]],
        ["set", ["list"]],
        ["range", 1, 2, "x"],
    ],
)
def test_what_is_no_value_is_refused(coded):
    with pytest.raises((ValueError, KeyError, TypeError)):
        decode(coded)


def test_what_cannot_be_sent_is_named():
    with pytest.raises(NotAValue, match="type object is no value"):
        encode([object()])
    nested = []
    for _ in range(200):
        nested = [nested]
    with pytest.raises(TooLarge, match="more than 100 deep"):
        encode(nested)


def test_the_text_of_a_test_decides_and_names_what_it_takes_from_the_program():
    (test,) = trust.apart(read_tests("assert math.isclose(f(1), g(2)) and abs(1) == 1"))
    assert test["outside"]["names"] == ["f", "g"]
    assert "import math" in test["outside"]["setup"]
    assert trust.apart(read_tests("import os\nassert f(1) == os.sep"))[0]["outside"] is None


@pytest.mark.parametrize("module", [trust, sandbox_values])
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.failed == 0
