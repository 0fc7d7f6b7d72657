"""Count the checks that a test holds, so that a test that reaches none of them is no pass."""

import ast
from typing import Any

#: what the runner calls when a check is reached; :func:`count_checks` writes the calls into the tests
COUNTER = "_check_is_reached_"


def count_checks(source: str) -> tuple[str, int]:
    r"""Return a program that calls :data:`COUNTER` before each of its checks, and the number of checks in its text.

    Checks are assert statements about something (``assert True`` is none), calls and context managers whose name says
    that they assert or expect an exception, and branches that can raise.

    Raises:
        SyntaxError: it is no program; also ValueError, MemoryError and RecursionError.

    Example:
        >>> print(count_checks("assert f(1) == 2")[0])
        _check_is_reached_()
        assert f(1) == 2
        >>> count_checks("f(1)\nassert True")[1]
        0
    """
    counting = _Counting()
    tree = ast.fix_missing_locations(counting.visit(ast.parse(source)))
    return ast.unparse(tree), counting.checks


class _Counting(ast.NodeTransformer):
    def __init__(self) -> None:
        self.checks = 0
        self._swallowed: set[ast.AST] = set()

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Try) and _swallows(node):
            self._swallowed |= {inner for statement in node.body for inner in ast.walk(statement)}
        visited = self.generic_visit(node)
        if not isinstance(node, ast.stmt) or node in self._swallowed or not _is_check(node):
            return visited
        self.checks += 1
        return [ast.Expr(ast.Call(ast.Name(COUNTER, ast.Load()), [], [])), visited]


def _is_check(node: ast.stmt) -> bool:
    match node:
        case ast.Assert(test=test):
            # ``assert (f(1) == 2, "why")`` holds always.
            return not isinstance(test, ast.Tuple) and _says_something(test)
        case ast.Expr(value=ast.Call() | ast.Await(value=ast.Call())):
            call = node.value.value if isinstance(node.value, ast.Await) else node.value
            assert isinstance(call, ast.Call)
            arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
            # ``self.assertTrue(True)`` checks nothing; ``self.fail("why")`` does.
            return _asserts(call) and (not arguments or _is_fail(call) or any(map(_says_something, arguments)))
        case ast.With(items=items) | ast.AsyncWith(items=items):
            return any(_asserts(item.context_expr) for item in items)
        case ast.If() | ast.Match() | ast.Try():
            return _can_raise(node)
    return False


def _says_something(test: ast.expr) -> bool:
    """Return whether a value depends on a name: ``True`` and ``1 == 1`` do not."""
    return any(isinstance(node, ast.Name) for node in ast.walk(test))


def _is_fail(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and "fail" in (getattr(node.func, "attr", ""), getattr(node.func, "id", ""))


def _swallows(node: ast.Try) -> bool:
    """Return whether a failing assert in the body of ``try`` ends in one of its handlers, which does not raise."""
    for handler in node.handlers:
        caught = {"AssertionError"} if handler.type is None else {getattr(n, "id", "") for n in ast.walk(handler.type)}
        if caught & {"AssertionError", "Exception", "BaseException"}:
            # What the handler keeps may be checked behind the statement.
            return all(map(_says_nothing_more, handler.body))
    return False


def _says_nothing_more(node: ast.stmt) -> bool:
    if isinstance(node, ast.Pass | ast.Continue):
        return True
    called = node.value.func if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
    return isinstance(called, ast.Name) and called.id == "print"


def _asserts(node: ast.AST) -> bool:
    """Return whether a call's name says that it checks: ``assert_allclose``, ``pytest.raises``, ``self.fail``."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return "assert" in name.lower() or name in ("raises", "fail", "warns")


def _can_raise(node: ast.AST) -> bool:
    """Return whether the branches of a statement raise, or assert what is never true, outside of functions in them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) or (isinstance(child, ast.Assert) and isinstance(child.test, ast.Constant)):
            return True
        if _is_fail(child):
            return True
        inside = not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)
        if inside and _can_raise(child):
            return True
    return False
