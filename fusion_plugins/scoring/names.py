"""The names that a program binds, reads and imports, from its text alone; nothing is run."""

import ast
import builtins
from typing import Any

#: errors of a text that is no program, or is nested too deeply to be read
UNPARSABLE = (SyntaxError, ValueError, MemoryError, RecursionError)
#: what LeetCode imports before a solution, and its own answers therefore do not import: name -> module
OFFERED = {
    name: module
    for module, names in {
        "typing": "Any Callable DefaultDict Deque Dict Generator Generic Iterable Iterator List Optional Sequence Set "
        "Tuple TypeVar Union",
        "collections": "Counter OrderedDict defaultdict deque namedtuple",
        "functools": "cache cmp_to_key lru_cache partial reduce",
        "itertools": "accumulate chain combinations combinations_with_replacement count cycle groupby islice pairwise "
        "permutations product repeat starmap takewhile zip_longest",
        "heapq": "heapify heappop heappush heappushpop heapreplace nlargest nsmallest",
        "bisect": "bisect_left bisect_right insort insort_left insort_right",
        "math": "ceil comb factorial floor gcd inf isqrt lcm log log2 perm pi sqrt",
        "string": "ascii_letters ascii_lowercase ascii_uppercase digits",
    }.items()
    for name in names.split()
} | dict.fromkeys(
    "bisect collections datetime functools heapq itertools json math operator random re statistics string sys "
    "typing".split()
)


def parse(source: str, mode: str = "exec") -> Any:
    """Return the syntax tree of a program; None where it is none."""
    try:
        return ast.parse(source, mode=mode)
    except UNPARSABLE:
        return None


def bound_names(tree: ast.AST | None) -> frozenset[str]:
    """Return all names that a program binds, in whatever scope."""
    names: set[str] = set()
    for node in ast.walk(tree) if tree else ():
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.arg(arg=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                names.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names |= {alias.asname or alias.name.partition(".")[0] for alias in aliases}
    return frozenset(names)


def free_names(tree: ast.AST | None) -> frozenset[str]:
    """Return names that a program reads and neither binds nor has built in, and those it imports from ``solution``."""
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} if tree else set()
    given = {
        alias.name
        for node in (ast.walk(tree) if tree else ())
        if isinstance(node, ast.ImportFrom) and node.module == "solution"
        for alias in node.names
    }
    modules = {
        alias.asname or alias.name
        for node in (ast.walk(tree) if tree else ())
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "solution"
    }
    given |= {
        node.attr
        for node in (ast.walk(tree) if tree and modules else ())
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
    }
    return frozenset((read - bound_names(tree) - vars(builtins).keys()) | given - {"*"})
