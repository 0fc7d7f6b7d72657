"""Read the tests of a prompt, in the formats of the benchmarks, and count the checks that they hold.

Each format is turned into tests that :mod:`fusion_plugins.scoring.sandbox_runner` can run: mappings with ``kind`` and
what that kind needs. A format that is not recognised is an error, never a test that tests nothing.
"""

import ast
import base64
import binascii
import contextlib
import json
import pickletools
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusion_plugins.errors import DataError
from fusion_plugins.scoring.check_counts import count_checks
from fusion_plugins.scoring.names import UNPARSABLE, bound_names, free_names, parse

EXPECTED = (
    "a program, a list of programs, stdin and stdout or arguments and results in 'inputs' and 'outputs', or a mapping "
    "with 'test' or 'tests' and perhaps 'setup' and 'entry_point'"
)
_TESTS = ("tests", "test", "test_list")
#: cases in several lists: LiveCodeBench, CodeContests
_CASES = ("public_test_cases", "private_test_cases", "public_tests", "private_tests", "generated_tests")
#: characters of packed tests, once unpacked
_MAX_UNPACKED = 256 << 20
#: what a pickle of one text consists of
_ONE_TEXT = frozenset(
    "PROTO FRAME SHORT_BINUNICODE BINUNICODE BINUNICODE8 UNICODE MEMOIZE PUT BINPUT LONG_BINPUT STOP".split()
)
_SETUPS = ("test_imports", "test_setup_code", "setup")
_ENTRY_POINTS = ("entry_point", "fn_name", "func_name")
_MISSING = object()


@dataclass(frozen=True)
class Suite:
    """The tests of one prompt.

    Attributes:
        format: what they were recognised as: asserts, check, unittest, pytest, stdio or calls.
        tests: what the runner runs, in order; each in a process of its own.
        setup: a program that runs before the response's, and again after it.
        needed: names that the tests expect the response to define; empty where it is a whole program.
        prompt: the beginning of a program that the response may continue; empty without one.
    """

    format: str
    tests: tuple[Mapping[str, Any], ...]
    setup: str = ""
    needed: frozenset[str] = frozenset()
    prompt: str = ""


def read_tests(tests: Any) -> Suite | None:
    """Return the tests of a prompt; None where there are none.

    Args:
        tests: any of

            * a program: plain asserts, ``unittest.TestCase`` classes (BigCodeBench), ``test_*`` functions (KodCode), or
              a function ``check(candidate)``, which needs an entry point (HumanEval, LeetCode);
            * a list of programs, such as the assert lines of MBPP;
            * a mapping with ``test``, ``tests`` or ``test_list`` (either of those), ``setup`` and ``entry_point``;
            * a mapping with ``inputs`` and ``outputs``: texts for stdin and stdout, or with ``fn_name`` arguments and
              results (APPS, TACO); or a list of mappings with ``input`` and ``output`` (LiveCodeBench);
            * a mapping that holds the latter under ``input_output``, or parts of them under ``public_test_cases`` and
              ``private_test_cases`` (LiveCodeBench, also packed) or ``public_tests`` and so on (CodeContests);
            * the JSON text of any of these.

    Raises:
        DataError: anything else.

    Example:
        >>> suite = read_tests('{"inputs": ["1 2"], "outputs": ["3"]}')
        >>> suite.format, len(suite.tests)
        ('stdio', 1)
    """
    tests = _from_json(tests)
    if isinstance(tests, dict) and {"input", "output"} <= tests.keys():
        # One case, or lists of them as in CodeContests.
        several = isinstance(tests["input"], list) and isinstance(tests["output"], list)
        tests = {**tests, "inputs": tests["input"], "outputs": tests["output"]} if several else [tests]
    context = dict(tests) if isinstance(tests, dict) else {}
    suite = _read_mapping(tests, context)
    prompt = context.get("prompt")
    return replace(suite, prompt=prompt) if suite and isinstance(prompt, str) else suite


def _read_mapping(tests: Any, context: dict[str, Any]) -> Suite | None:
    """Return the tests of :func:`read_tests`; ``context`` is what stands beside them."""
    found = _find_tests(tests, context)
    if found is None or found in ("", [], {}) or (isinstance(found, str) and not found.strip()):
        return None
    # LiveCodeBench has the function's name beside the cases, in a JSON text.
    entry_point = _entry_point(context)
    if entry_point is None and isinstance(found, list):
        # SYNTHETIC-1 and DeepCoder have it in each case.
        entry_point = next(filter(None, (_entry_point(case) for case in found if isinstance(case, dict))), None)
    if entry_point is not None and not (isinstance(entry_point, str) and parse(entry_point, "eval") is not None):
        raise DataError(
            f"entry_point: expected the name of what is tested, such as f or Solution().f, got {entry_point!r}"
        )
    setup = "\n".join(_lines(name, context[name]) for name in _SETUPS if context.get(name))
    if isinstance(found, dict):
        return _read_cases(found.get("inputs"), found.get("outputs"), entry_point, setup)
    if isinstance(found, list) and found and all(isinstance(case, dict) for case in found):
        functional = [case for case in found if case.get("testtype") == "functional"]
        if functional and entry_point is None:
            raise DataError("tests: expected 'fn_name' beside cases of testtype functional, got none")
        inputs, outputs = ([case.get(name, _MISSING) for case in found] for name in ("input", "output"))
        return _read_cases(inputs, outputs, entry_point, setup)
    programs = [found] if isinstance(found, str) else found
    if not (isinstance(programs, list) and all(isinstance(program, str) for program in programs)):
        raise DataError(f"expected {EXPECTED}, got {_kind_of(tests)}")
    return _read_programs([program for program in programs if program.strip()], entry_point, setup)


def _find_tests(tests: Any, context: dict[str, Any]) -> Any:
    """Return the tests themselves, out of the mappings in which they are; ``context`` gets what stands beside them."""
    found = tests
    if context and "inputs" not in context:
        # Where both are given, the program is the benchmark's own test (LeetCodeDataset).
        names = (*_TESTS, "input_output") if context.get("test") else ("input_output", *_TESTS)
        found = _from_json(_first(context, names)) or _all_cases(context)
    if isinstance(found, dict):
        context |= found
        if "inputs" not in context:
            found = _from_json(_first(found, _TESTS))
    return found


def _all_cases(context: Mapping[str, Any]) -> list[Any]:
    """Return the cases that stand under several names."""
    found: list[Any] = []
    for name in _CASES:
        part = _from_json(context.get(name))
        if isinstance(part, dict):
            inputs, outputs = part.get("input"), part.get("output")
            if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)):
                raise DataError(f"{name}: expected as many texts in 'input' as in 'output'")
            part = [{"input": one, "output": other} for one, other in zip(inputs, outputs, strict=True)]
        if part is not None and not isinstance(part, list):
            raise DataError(f"{name}: expected a list of cases, got {_kind_of(part)}")
        found += part or []
    return found


def _entry_point(context: Mapping[str, Any]) -> Any:
    metadata = _from_json(context.get("metadata"))
    return _first({**metadata, **context} if isinstance(metadata, dict) else context, _ENTRY_POINTS)


def _read_programs(programs: list[str], entry_point: str | None, setup: str) -> Suite | None:
    if not programs:
        return None
    trees = [parse(program) for program in programs]
    formats = {_format(tree) for tree in trees}
    if None in trees or len(formats) > 1:
        # Pieces of one program, such as the imports in one entry and the asserts in the next.
        programs = ["\n".join(programs)]
        trees = [parse(programs[0])]
        formats = {_format(trees[0])}
    (format,) = formats
    if format == "check":
        programs = [_call_check(program, tree, entry_point) for program, tree in zip(programs, trees, strict=True)]
    elif format == "asserts" and len(programs) > 1 and any(_counted(program)[1] == 0 for program in programs):
        programs = ["\n".join(programs)]
    counted = [_counted(program) for program in programs]
    setup, in_setup = _counted(setup)
    if any(checks == 0 for _, checks in counted) and in_setup == 0:
        raise DataError("the tests hold no check: no assert, no test function that asserts, nothing that can raise")
    tests = [
        {"kind": format, "source": source, **({"classes": _test_cases(parse(source))} if format == "unittest" else {})}
        for source, _ in counted
    ]
    needed = (
        _root(entry_point) if entry_point else frozenset().union(*map(free_names, trees)) - bound_names(parse(setup))
    )
    return Suite(format, tuple(tests), setup, needed)


def _format(tree: ast.Module | None) -> str:
    for node in tree.body if tree else ():
        # A helper check(x, y) is another thing.
        if isinstance(node, ast.FunctionDef) and node.name == "check" and _takes_one(node.args):
            return "check"
        if isinstance(node, ast.ClassDef) and any("TestCase" in ast.unparse(base) for base in node.bases):
            return "unittest"
    # Functions that the program calls by itself need nobody to find them.
    called = {
        node.func.id
        for node in (ast.walk(tree) if tree else ())
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    for node in tree.body if tree else ():
        name = getattr(node, "name", "")
        if isinstance(node, ast.ClassDef) and name.startswith("Test"):
            return "pytest"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and name.startswith("test") and name not in called:
            return "pytest"
    return "asserts"


def _takes_one(arguments: ast.arguments) -> bool:
    names = [*arguments.posonlyargs, *arguments.args]
    return (
        bool(names)
        and len(names) - len(arguments.defaults) <= 1
        and not any(default is None for default in arguments.kw_defaults)
    )


def _call_check(program: str, tree: ast.Module | None, entry_point: str | None) -> str:
    """Return a program that calls its ``check`` with the entry point."""
    calls = [
        node.value.func
        for node in (tree.body if tree else ())
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    # MultiPL-E calls it in a function that it calls at the end.
    inside = any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check"
        for node in (ast.walk(tree) if tree and entry_point is None else ())
    )
    if inside or any(isinstance(called, ast.Name) and called.id == "check" for called in calls):
        return program
    if entry_point is None:
        raise DataError(
            "the tests define check(candidate), but no 'entry_point' says what to check; add it to the tests"
        )
    return f"{program}\ncheck({_resolved(entry_point)})\n"


def _resolved(entry_point: str) -> str:
    """Return an expression for the entry point, which is a function or a method of the class ``Solution``."""
    if not entry_point.isidentifier() or entry_point == "Solution":
        return entry_point
    # The method first: a star import may bring another function of that name, such as heapq's merge.
    return f"(Solution().{entry_point} if hasattr(globals().get('Solution'), {entry_point!r}) else {entry_point})"


def _read_cases(inputs: Any, outputs: Any, entry_point: str | None, setup: str) -> Suite | None:
    if not (isinstance(inputs, list) and isinstance(outputs, list)) or _MISSING in [*inputs, *outputs]:
        raise DataError("tests: expected lists in 'inputs' and 'outputs', or 'input' and 'output' in each case")
    if len(inputs) != len(outputs):
        raise DataError(f"tests: expected one output per input, got {len(inputs)} inputs and {len(outputs)} outputs")
    if not inputs:
        return None
    if entry_point is None:
        cases = [
            {"kind": "stdio", "stdin": _lines("inputs", given), "stdout": _lines("outputs", expected)}
            for given, expected in zip(inputs, outputs, strict=True)
        ]
        return Suite("stdio", tuple(cases), setup)
    # APPS writes each result into a list of its own, where others write the result itself.
    wrapped = all(isinstance(expected, list) and len(expected) == 1 for expected in outputs)
    calls = [
        {
            "kind": "calls",
            "function": _resolved(entry_point),
            "arguments": _arguments(given),
            # A text beside a list of arguments may be the result itself, such as the digits "21".
            "results": [
                *([expected] if isinstance(given, list) and isinstance(expected, str) else []),
                result := _literal(expected),
                *(result if wrapped else ()),
            ],
        }
        for given, expected in zip(inputs, outputs, strict=True)
    ]
    return Suite("calls", tuple(calls), setup, frozenset({*_root(entry_point), "Solution"}))


def _arguments(given: Any) -> list[Any]:
    if isinstance(given, list):
        return given
    if isinstance(given, str) and re.match(r"[A-Za-z_]\w*\s*=[^=]", given):  # "nums = [3, 3], target = 6"
        call = parse(f"f({given})", "eval")
        if call is not None and not call.body.args:
            with contextlib.suppress(ValueError):
                return [ast.literal_eval(keyword.value) for keyword in call.body.keywords]
    if isinstance(given, str):  # one argument per line
        return [_literal(line) for line in given.split("\n") if line.strip()]
    raise DataError(
        f"inputs: expected a list of arguments, or a text with one argument per line, got {_kind_of(given)}"
    )


def _literal(value: Any) -> Any:
    """Return what a text holds as JSON or as a Python literal; anything else as it is."""
    if not isinstance(value, str):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value)
        except UNPARSABLE:
            continue
    return value


def _lines(name: str, value: Any) -> str:
    if isinstance(value, list) and all(isinstance(line, str | int | float) for line in value):
        return "\n".join(str(line).rstrip("\n") for line in value)
    if not isinstance(value, str):
        raise DataError(f"{name}: expected a text or a list of lines, got {_kind_of(value)}")
    return value


def _unpacked(text: str) -> str | None:
    """Return the text that LiveCodeBench has packed with pickle, zlib and base64; None where a text is not packed.

    Nothing is unpickled, because that can run code: the text is read from a pickle that holds one text and no more.

    Raises:
        DataError: it holds something else.
    """
    if len(text) < 16 or not re.fullmatch(r"e[A-Za-z0-9+/\s]+=*\s*", text):
        return None
    try:
        packed = base64.b64decode(text)
        unpack = zlib.decompressobj()
        data = unpack.decompress(packed, _MAX_UNPACKED)
        steps = [(step.name, argument) for step, argument, _ in pickletools.genops(data)]
    except (ValueError, zlib.error, binascii.Error):
        return None
    texts = [argument for _, argument in steps if isinstance(argument, str)]
    others = {name for name, _ in steps} - _ONE_TEXT
    if others or len(texts) != 1 or unpack.unconsumed_tail:
        raise DataError(
            "packed tests: expected a pickle of one text, of which nothing else is read, got "
            + (
                f"the steps {', '.join(sorted(others))}"
                if others
                else f"more than {_MAX_UNPACKED >> 20} MiB or {len(texts)} texts"
            )
        )
    return str(texts[0])


def _from_json(value: Any) -> Any:
    """Return what a JSON text of a list or mapping holds; anything else as it is."""
    if isinstance(value, str) and (unpacked := _unpacked(value)) is not None:
        return _from_json(unpacked)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{", '"'):
        try:
            return _from_json(json.loads(value))
        except (ValueError, RecursionError):
            return value
    return value


def _kind_of(value: Any) -> str:
    """Return what a value is, in a few words that are the same for many rows."""
    if isinstance(value, dict):
        return f"a mapping with {', '.join(map(str, value))}"[:80] if value else "an empty mapping"
    inner = f" with {type(value[0]).__name__}" if isinstance(value, list) and value else ""
    return type(value).__name__ + inner


def _first(context: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((context[name] for name in names if context.get(name) not in (None, "")), None)


def _counted(program: str) -> tuple[str, int]:
    """Return :func:`count_checks`; a program that is none stays as it is, for the runner to say so."""
    try:
        return count_checks(program)
    except UNPARSABLE:
        return program, 1


def _test_cases(tree: ast.Module) -> list[str]:
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def _root(entry_point: str) -> frozenset[str]:
    """Return the name that an entry point begins with.

    Example:
        >>> sorted(_root("Solution().two_sum"))
        ['Solution']
    """
    names = [node.id for node in ast.walk(ast.parse(entry_point, mode="eval")) if isinstance(node, ast.Name)]
    return frozenset(names[:1])
