"""Programs that are wrong and try to pass: from outside, none of them does."""

import pytest

from fusion_plugins.scoring.code_scorer import CodeScorer
from fusion_plugins.scoring.code_tests import read_tests

WRONG = "def f(x):\n    return x\n"
#: finds what a test expects, where its text can be read; made so that it does not find itself
SEARCH = (
    "import re\ndef search(text):\n    text = text.decode('latin-1') if isinstance(text, bytes) else text\n"
    "    found = re.search(r'123' + r'45\\)?\\]?,? ?(?:==|-|, ) ?\"?(\\d+)|(\\d{5})' + r' in list', text)\n"
    "    return int(found[1] or found[2]) if found else None\n"
)
#: way -> program that is wrong and tries to be taken for right
FORGED = {
    # objects that claim to be right
    "an object that equals everything": (
        "class A:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return A()"
    ),
    "a number that equals everything": (
        "class A(int):\n    def __eq__(self, other):\n        return True\n    __hash__ = int.__hash__\n"
        "def f(x):\n    return A(x)"
    ),
    "a text that equals everything": (
        "class A(str):\n    def __eq__(self, other):\n        return True\n    __hash__ = str.__hash__\n"
        "def f(x):\n    return A(x)"
    ),
    "a list that equals everything": (
        "class A(list):\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return A([x])"
    ),
    "a container that contains everything": (
        "class A:\n    def __contains__(self, x):\n        return True\n    def __eq__(self, x):\n        return True\n"
        "    def __len__(self):\n        return 5\ndef f(x):\n    return A()"
    ),
    "an object that subtracts to nothing": (
        "class A:\n    def __sub__(self, x):\n        return 0\n"
        "    __rsub__ = __eq__ = __lt__ = __sub__\n    def __abs__(self):\n        return 0\n"
        "    def __float__(self):\n        return 0.0\ndef f(x):\n    return A()"
    ),
    "an object that lies about its class": (
        "class A:\n    __class__ = int\n    def __eq__(self, x):\n        return True\n    def __index__(self):\n"
        "        return 2\ndef f(x):\n    return A()"
    ),
    "a class whose class says that all are equal": (
        "class M(type):\n    def __eq__(self, x):\n        return True\n    def __instancecheck__(self, x):\n"
        "        return True\n    __hash__ = type.__hash__\nclass A(metaclass=M):\n    pass\ndef f(x):\n    return A"
    ),
    "an always equal object in a list": (
        "class A:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return [A()]"
    ),
    "an iterator of such objects": (
        "class A:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    while True:\n        yield A()"
    ),
    # the checks are ended before they have compared
    "the end of an iteration out of a call": "def f(x):\n    raise StopIteration",
    "the end of an iteration out of an attribute": (
        "class A:\n    def __getattr__(self, name):\n        raise StopIteration\n    __len__ = __iter__ = __str__ = "
        "__repr__ = __bool__ = __getitem__ = lambda self, *_: self.stop\ndef f(x):\n    return A()"
    ),
    # what the checks use is patched
    "a patched abs": WRONG + "import builtins\nbuiltins.abs = lambda x: 0\nabs = builtins.abs",
    "patched functions": (
        WRONG + "import builtins, math\nfor name in ('isinstance', 'all', 'any', 'len', 'set', 'sorted', 'round'):\n"
        "    setattr(builtins, name, lambda *a, **k: True)\nmath.isclose = lambda *a, **k: True"
    ),
    "another AssertionError": WRONG + "import builtins\nbuiltins.AssertionError = type('Fine', (SystemExit,), {})",
    "a patched unittest": (
        WRONG + "import unittest\nfor name in dir(unittest.TestCase):\n    if name.startswith('assert'):\n"
        "        setattr(unittest.TestCase, name, lambda *a, **k: None)\n"
        "unittest.TestResult.addFailure = unittest.TestResult.addError = lambda *a: None"
    ),
    "a patched json": (
        WRONG + "import json\njson.dumps = lambda *a, **k: '[\"value\", true, null]'\n"
        'json.dump = lambda x, file, **k: file.write(\'{"verdict": "passed", "error": null}\')'
    ),
    "a patched runner": (
        WRONG + "import sys\nfor name, module in list(sys.modules.items()):\n    if 'fusion_plugins' in name:\n"
        "        for key in list(vars(module)):\n            if callable(getattr(module, key)):\n"
        "                setattr(module, key, lambda *a, **k: ('passed', None))"
    ),
    "a patched __main__": (
        WRONG + "import __main__\nfor key in list(vars(__main__)):\n    if callable(getattr(__main__, key)):\n"
        "        setattr(__main__, key, lambda *a, **k: ('passed', None))"
    ),
    "a check that is counted without being made": WRONG + "import builtins\nbuiltins._check_is_reached_ = print",
    "a hook for imports": (
        WRONG
        + (
            "import sys\nclass Hook:\n    def find_spec(self, name, path=None, target=None):\n"
            "        raise SystemExit(0)\nsys.meta_path.insert(0, Hook())"
        )
    ),
    "a hook for exceptions": WRONG + "import sys, os\nsys.excepthook = lambda *a: os._exit(0)",
    # the test is read
    "a look at the frames": SEARCH
    + (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        for space in (frame.f_locals, frame.f_globals):\n            found = search(str(space))\n"
        "            if found:\n                return found\n        frame = frame.f_back\n    return x"
    ),
    "a search of all objects": SEARCH
    + (
        "import gc\ndef f(x):\n    for thing in gc.get_objects():\n        try:\n"
        "            found = search(repr(thing))\n        except Exception:\n            continue\n"
        "        if found:\n            return found\n    return x"
    ),
    "the constants of code": (
        "import gc\ndef f(x):\n    for thing in gc.get_objects():\n        code = getattr(thing, '__code__', None)\n"
        "        constants = getattr(code, 'co_consts', ())\n        if 12340 + 5 in constants:\n"
        "            return max(value for value in constants if isinstance(value, int))\n    return x"
    ),
    "the open files": SEARCH
    + (
        "import os\ndef f(x):\n    for file in range(64):\n        try:\n"
        "            found = search(os.pread(file, 10**6, 0))\n        except OSError:\n"
        "            continue\n        if found:\n            return found\n    return x"
    ),
    "the memory": SEARCH
    + (
        "import ctypes\ndef f(x):\n    start = id(object()) & ~0xFFFFF\n"
        "    return search(ctypes.string_at(start, 1 << 20)) or x"
    ),
    "files of processes": SEARCH
    + (
        "import glob\ndef f(x):\n"
        "    for path in (p for d in ('/proc/*/fd/*', '/proc/*/cmdline', '/tmp/**', "
        "'/dev/*') for p in glob.glob(d)):\n        try:\n"
        "            found = search(open(path, 'rb').read(10**6))\n        except OSError:\n"
        "            continue\n        if found:\n            return found\n    return x"
    ),
    "the lines of the test": SEARCH
    + (
        "import inspect, linecache\ndef f(x):\n    for frame in inspect.stack():\n"
        "        found = search(str(frame)) or search(str(linecache.cache))\n        if found:\n"
        "            return found\n    return x"
    ),
    # a verdict is written
    "a verdict to every file": (
        WRONG
        + (
            "import os\nfor file in range(3, 64):\n    try:\n"
            '        os.write(file, b\'{"verdict": "passed", "error": null}\')\n    except OSError:\n'
            "        pass\nos._exit(0)"
        )
    ),
    "a verdict over what is written": (
        WRONG
        + (
            "import os, atexit\ndef forge():\n    for file in range(3, 64):\n        try:\n"
            "            os.ftruncate(file, 0)\n"
            '            os.pwrite(file, b\'{"verdict": "passed", "error": null}\', 0)\n'
            "        except OSError:\n            pass\nforge()\natexit.register(forge)"
        )
    ),
    "answers before they are asked for": (
        WRONG
        + (
            "import os, struct, json\n"
            "for message in (['value', ['list', 'f'], None], *[['value', value, None] for "
            "value in (True, 2, 1e9, None)] * 9):\n    data = json.dumps(message).encode()\n"
            "    for file in range(3, 64):\n        try:\n"
            "            os.write(file, struct.pack('<I', len(data)) + data)\n        except OSError:\n"
            "            pass"
        )
    ),
    "answers that are no values": (
        "import os, struct\ndef f(x):\n"
        '    for data in (b\'["value", ["__import__", "os"], null]\', b\'["value", {"a": '
        "1}, null]', b'[' * 9999, b'[\"error\", \"exit\"]'):\n        for file in range(3, 64):\n"
        "            try:\n                os.write(file, struct.pack('<I', len(data)) + data)\n"
        "            except OSError:\n                pass\n    return x"
    ),
    "an endless message": (
        "import os, struct\ndef f(x):\n    for file in range(3, 64):\n        try:\n"
        "            os.write(file, struct.pack('<I', 0xFFFFFFFF) + bytes(1000))\n"
        "        except OSError:\n            pass\n    return x"
    ),
    "a printed verdict": WRONG + 'print(\'{"verdict": "passed", "error": null}\', flush=True)\nprint(67890)',
    # the end
    "an exit": WRONG + "import sys\nsys.exit(0)",
    "an exit of the process": "import os\ndef f(x):\n    os._exit(0)",
    "an exit by exception": "def f(x):\n    raise SystemExit(0)",
    "a skipped test": "import unittest\ndef f(x):\n    raise unittest.SkipTest('fine')",
    "an interrupt": "def f(x):\n    raise KeyboardInterrupt",
    "an exception that is no Exception": "class E(BaseException):\n    pass\ndef f(x):\n    raise E",
    "a child that goes on": WRONG + "import os\nif os.fork():\n    os._exit(0)",
    # other processes
    "signals to all": WRONG
    + "import os\nfor number in (9, 15, 2):\n    try:\n        os.kill(-1, number)\n    except OSError:\n        pass",
    "signals to numbers": (
        WRONG
        + (
            "import os\nfor process in range(0, 300):\n    if process != os.getpid():\n        try:\n"
            "            os.kill(process, 9) if process else None\n        except OSError:\n"
            "            pass"
        )
    ),
    "files of another process": (
        WRONG
        + (
            "import ctypes, os\nlibc = ctypes.CDLL(None)\nfor process in range(1, 50):\n"
            "    other = libc.syscall(434, process, 0)\n    for file in range(16):\n"
            "        taken = libc.syscall(438, other, file, 0)\n        if taken >= 0:\n"
            '            os.write(taken, b\'{"verdict": "passed"}\')'
        )
    ),
    "a traced process": (
        WRONG
        + (
            "import ctypes\nlibc = ctypes.CDLL(None)\nfor process in range(1, 50):\n"
            "    libc.ptrace(16, process, 0, 0)\n    libc.syscall(310, process, 0, 0, 0, 0, 0)"
        )
    ),
    # values below Python
    "another value for small numbers": (
        WRONG
        + "import ctypes, sys\nfor number in (0, 1, 2):\n    ctypes.c_long.from_address(id(number) + 24).value = 67890"
    ),
    "traced lines": (
        "import sys\ndef trace(frame, event, value):\n    frame.f_trace_opcodes = True\n"
        "    for name in list(frame.f_locals):\n        frame.f_locals[name] = True\n"
        "    return trace\nsys.settrace(trace)\n" + WRONG
    ),
    "what is left at the end": WRONG
    + "class A:\n    def __del__(self):\n        import os\n        os._exit(0)\nkept = A()\nkept.me = kept",
    "a thread that writes later": (
        WRONG
        + (
            "import threading, os, time\ndef write():\n    while True:\n"
            "        for file in range(3, 16):\n            try:\n"
            "                os.write(file, b'\\x1a\\0\\0\\0[\"value\", true, null]     ')\n"
            "            except OSError:\n                pass\n        time.sleep(0.001)\n"
            "threading.Thread(target=write, daemon=True).start()"
        )
    ),
}

CASES = "def check(candidate):\n    assert abs(candidate(12345) - 67890) < 1e-6\n    assert candidate(5) == 7\n"
TEST_CASE = (
    "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(f(12345), 67890)\n"
    "    def test_b(self):\n        self.assertIn(7, [f(5)])\n"
)
TESTS = {
    "assert": "assert f(12345) == 67890",
    "asserts about parts": "assert 67890 in list(f(12345)) and sorted(set(f(12345))) == [67890]",
    "a map of asserts": "assert all(map(lambda case: f(case[0]) == case[1], [(12345, 67890), (5, 7)]))",
    "check": {"test": CASES, "entry_point": "f"},
    "unittest": TEST_CASE,
    "calls": {"fn_name": "f", "inputs": [[12345]], "outputs": [67890]},
}


@pytest.fixture(scope="module")
def scorer(short_limits):
    made = CodeScorer(workers=2, **short_limits)
    yield made
    made.close()


@pytest.mark.parametrize("form", TESTS)
def test_no_wrong_program_passes_a_check_from_outside(scorer, form):
    rows = [{"response": f"```python\n{code}\n```", "tests": TESTS[form]} for code in FORGED.values()]
    scores = dict(zip(FORGED, scorer.score(rows), strict=True))
    assert {way: score for way, score in scores.items() if score.correct is not False} == {}
    assert {score.details["trust"] for score in scores.values()} == {"outside"}


def test_these_ways_work_where_the_checks_run_beside_the_program(sandbox):
    """So that the test above shows what it seems to show."""
    forged = set()
    for form in ("assert", "check", "unittest"):
        suite = read_tests(TESTS[form])
        for way, code in FORGED.items():
            outcome = sandbox.run(code, suite.tests, suite.setup)
            if outcome.tests and all(test.verdict == "passed" for test in outcome.tests):
                forged.add(way)
    assert len(forged) >= 8, forged


def test_there_are_enough_ways():
    assert len(FORGED) >= 41


def test_a_right_program_passes_in_each_of_these_forms(scorer):
    value = "```python\ndef f(x):\n    return 67890 if x == 12345 else x + 2\n```"
    parts = "```python\ndef f(x):\n    return [67890]\n```"
    rows = [{"response": parts if "parts" in form else value, "tests": tests} for form, tests in TESTS.items()]
    assert [(score.correct, score.details["trust"]) for score in scorer.score(rows)] == [(True, "outside")] * len(rows)
