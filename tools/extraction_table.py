"""Measure in how many shapes of answers the right program is found; prints the table of docs/responses.md."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from program_shapes import GROUPS, WHOLE_PROGRAMS

from fusion_plugins.scoring.programs import extract_code


def doubles(response: str) -> bool:
    """Return whether the program in a response defines f, which doubles its argument; the shapes are ours."""
    names: dict[str, Any] = {"__name__": "solution"}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(extract_code(response, {"f"}), "<response>", "exec", dont_inherit=True), names)
            return bool(names["f"](4) == 8)
    except Exception:
        return False


def adds(response: str) -> bool:
    """Return whether the program in a response writes the sum of the two numbers that it reads."""
    output, given = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO("17 25\n")
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(extract_code(response), "<response>", "exec", dont_inherit=True), {"__name__": "__main__"})
    except Exception:
        return False
    finally:
        sys.stdin = given
    return output.getvalue() == "42\n"


def main() -> None:
    """Print the table."""
    print("| group | right | shapes |\n|---|---|---|")
    total = right = 0
    for group, shapes in {**GROUPS, "whole programs": WHOLE_PROGRAMS}.items():
        found = {shape: (adds if shapes is WHOLE_PROGRAMS else doubles)(text) for shape, text in shapes.items()}
        names = "; ".join(shape if is_right else f"**{shape}**" for shape, is_right in found.items())
        total, right = total + len(found), right + sum(found.values())
        print(f"| {group} | {sum(found.values())} of {len(found)} | {names} |")
    print(f"| all | {right} of {total} | |")


if __name__ == "__main__":
    main()
