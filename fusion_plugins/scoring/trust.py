"""Which tests can be checked from outside of the program's process, from their text alone.

They can where they call functions of the program and compare values. What needs the program's own interpreter runs in
it: its classes compared or inherited from, its exceptions by type, patched modules, its output, files. The text of a
test decides and never the program, so that no program can choose to be checked where it could deceive.
"""

import ast
import builtins
import contextlib
import importlib
from collections.abc import Mapping
from typing import Any

from fusion_plugins.scoring.check_counts import COUNTER
from fusion_plugins.scoring.code_tests import Suite
from fusion_plugins.scoring.names import bound_names, free_names, parse

#: modules that a test may use, because they share nothing with the program
_PURE = frozenset(
    "__future__ abc ast bisect cmath collections copy dataclasses datetime decimal enum fractions functools heapq "
    "itertools json math numbers numpy operator pytest random re solution statistics string textwrap time types typing "
    "typing_extensions unittest".split()
)
#: names that show what two processes do not share
_SHARED = frozenset(
    "open input eval exec compile vars locals setattr delattr id type help memoryview redirect_stdout redirect_stderr "
    "StringIO patch Mock MagicMock seed warns assertWarns assertWarnsRegex assertLogs assertNoLogs deprecated_call "
    "GeneratorType Generator "
    "monkeypatch capsys capfd caplog tmp_path tmpdir mocker recwarn __import__ importorskip".split()
)
_RAISES = frozenset(("raises", "assertRaises", "assertRaisesRegex"))
#: names of the standard library that tests use without importing them -> its module
_WELL_KNOWN = {
    name: module
    for module, names in {
        "typing": "Any Callable Dict Iterable Iterator List Optional Sequence Set Tuple Union",
        "collections": "Counter OrderedDict defaultdict deque namedtuple",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "math": "isclose inf nan pi",
    }.items()
    for name in names.split()
}
#: functions that call the functions they are given
_APPLY = frozenset("map filter sorted min max reduce callable hasattr partial sum list tuple set all any".split())


def apart(suite: Suite) -> tuple[Mapping[str, Any], ...]:
    """Return the tests of a suite; those that can run outside have ``outside`` with what they need.

    That is ``names``, which the test takes from the program, and ``setup``, what runs before it.
    """
    return tuple({**test, "outside": _outside(test, suite)} for test in suite.tests)


def _outside(test: Mapping[str, Any], suite: Suite) -> dict[str, Any] | None:
    if test["kind"] == "stdio":
        return None
    tree, setup = parse(test["function"] if test["kind"] == "calls" else test["source"]), parse(suite.setup)
    if tree is None or setup is None:
        # It says so where it runs.
        return {"names": [], "setup": suite.setup}
    given = _given_by_prompt(suite)
    behind = ast.Module([*given, *setup.body], [])
    names = (free_names(tree) | free_names(setup)) - {COUNTER} - _bound_outside(behind, tree)
    helpers = {name for name in names if name in _WELL_KNOWN or name in _PURE}
    if names - helpers - {"Solution"}:
        names -= helpers
    else:
        helpers = set()
    # "assert sum(10, 15) == 6" tests a function of this name, where no other name is tested.
    names = names or frozenset(_called(tree) & vars(builtins).keys())
    if test["kind"] == "check" and names - suite.needed - {"Solution"}:
        # A helper that only the program could give would check itself.
        return None
    if any(_needs_inside(part, names) for part in (behind, tree)):
        return None
    imports = [
        f"from {_WELL_KNOWN[name]} import {name}" if name in _WELL_KNOWN else f"import {name}"
        for name in sorted(helpers)
    ]
    return {"names": sorted(names), "setup": "\n".join([*imports, *map(ast.unparse, given), suite.setup])}


def _given_by_prompt(suite: Suite) -> list[ast.stmt]:
    """Return the imports and the complete functions of a prompt, which the checks may use."""
    tree = parse(suite.prompt)
    return [
        node
        for node in (tree.body if tree else ())
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in suite.needed)
    ]


def _bound_outside(behind: ast.Module, tree: ast.Module) -> set[str]:
    """Return names that the checks get from what stands before them, or by importing all of a module."""
    found = {name for node in behind.body if not isinstance(node, ast.Expr) for name in _bound_by(node)}
    for node in ast.walk(ast.Module([*behind.body, *tree.body], [])):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*" and node.module in _PURE - {"solution"}:
            with contextlib.suppress(ImportError):
                found |= set(vars(importlib.import_module(node.module)))
    return found


def _bound_by(node: ast.stmt) -> frozenset[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return frozenset({node.name})
    return bound_names(node)


def _called(tree: ast.AST) -> set[str]:
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def _needs_inside(tree: ast.Module, names: frozenset[str]) -> bool:
    """Return whether a program does what only works beside the tested program, of which it uses the names."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    own = bound_names(tree)
    return any(
        _shares_a_module(node)
        or _enters(node, names)
        or _shares_a_name(node, names)
        or _tells_objects_apart(node)
        or (isinstance(node, ast.Name) and node.id in names and not _is_used_plainly(node, parents, own, tree))
        for node in ast.walk(tree)
    )


def _shares_a_module(node: ast.AST) -> bool:
    """Return whether an import is of a module that test and program have to share."""
    match node:
        case ast.Import(names=aliases):
            return any(alias.name.partition(".")[0] not in _PURE or "mock" in alias.name for alias in aliases)
        case ast.ImportFrom(module=module, names=aliases):
            wanted = {alias.name for alias in aliases}
            return (
                (module or "").partition(".")[0] not in _PURE
                or bool(wanted & (_SHARED | {"mock"}))
                or "mock" in (module or "")
                or (module == "solution" and "*" in wanted)
            )
    return False


def _enters(node: ast.AST, names: frozenset[str]) -> bool:
    """Return whether a statement ``with`` enters an object of the program, which gets the exceptions of the checks."""
    return isinstance(node, ast.With) and any(_root(item.context_expr) in names for item in node.items)


def _shares_a_name(node: ast.AST, names: frozenset[str]) -> bool:
    """Return whether a name or attribute shows what two processes do not share."""
    match node:
        case ast.Attribute(attr=name, ctx=context):
            # A changed attribute of a module or of the program.
            changed = not isinstance(context, ast.Load) and _root(node) not in ("self", "cls")
            return name.startswith("__") or name in _SHARED or changed
        case ast.Name(id=name):
            return name in _SHARED and name not in names
        case ast.arg(arg=name):
            return name in _SHARED
    return False


def _tells_objects_apart(node: ast.AST) -> bool:
    """Return whether a comparison is by identity, or an exception is caught by a class that is not built in."""
    match node:
        case ast.Compare(ops=ops, comparators=others, left=left):
            same = any(isinstance(op, ast.Is | ast.IsNot) for op in ops)
            return same and not any(isinstance(side, ast.Constant) for side in (left, *others))
        case ast.ExceptHandler(type=ast.expr() as kind):
            return not _is_builtin_error(kind)
        case ast.Call(func=func, args=[first, *_] as arguments):
            if _name(func) in ("assertIs", "assertIsNot"):
                return not any(isinstance(argument, ast.Constant) for argument in arguments)
            return _name(func) in _RAISES and not _is_builtin_error(first)
    return False


def _is_used_plainly(node: ast.Name, parents: Mapping[ast.AST, ast.AST], own: frozenset[str], tree: ast.AST) -> bool:
    """Return whether a name of the program is called, read from, or handed to what calls it."""
    parent = parents[node]
    match parent:
        case ast.Call(func=func) if func is node:
            return not node.id[0].isupper() or _is_used_for_methods(parent, parents, tree)
        case ast.Call(func=func):
            called = _name(func)
            return not node.id[0].isupper() and (called in own or called in _APPLY or called in _RAISES)
        case ast.Attribute() | ast.IfExp():
            return True
        case ast.Assign() | ast.keyword() | ast.List() | ast.Tuple():
            return not node.id[0].isupper()
    return False


def _is_used_for_methods(made: ast.Call, parents: Mapping[ast.AST, ast.AST], tree: ast.AST) -> bool:
    """Return whether of an object that a test makes only methods and attributes are used."""
    match parents[made]:
        case ast.Attribute():
            return True
        case ast.Assign(targets=[ast.Name(id=name)]):
            uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name]
            return all(isinstance(use.ctx, ast.Store) or isinstance(parents[use], ast.Attribute) for use in uses)
    return False


def _is_builtin_error(kind: ast.expr) -> bool:
    """Return whether an exception, or each of several, is built in, so that its name says all."""
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    known = vars(builtins)
    return all(isinstance(one, ast.Name) and isinstance(known.get(one.id), type) for one in kinds)


def _name(func: ast.expr) -> str:
    return func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")


def _root(node: ast.expr) -> str:
    """Return the name that an expression of attributes, items and calls begins with; "" for another."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return getattr(node, "id", "")
