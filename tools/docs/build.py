"""Build the documentation: ``python tools/docs/build.py``; what is wrong is printed, and the status is 1."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

from absent_hosts import hide_hosts
from check_site import problems_of
from stage import stage

STAGED = ROOT / "build" / "docs"
SITE = ROOT / "site"


def main() -> int:
    """Stage, build, check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage-only", type=Path, metavar="FOLDER", help="write the pages to FOLDER and build nothing")
    arguments = parser.parse_args()
    hide_hosts()
    stage(ROOT, arguments.stage_only or STAGED)
    if arguments.stage_only:
        return 0
    command = [
        sys.executable,
        "-m",
        "zensical",
        "build",
        "--clean",
        "--strict",
        "--config-file",
        str(ROOT / "zensical.toml"),
    ]
    # The builder imports our griffe extension by name, and formats signatures with the ruff that is beside it.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = os.environ | {"PYTHONPATH": str(HERE), "PATH": path}
    built = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    print(built.stderr, file=sys.stderr, end="")
    if built.returncode != 0 or "warning" in built.stderr.lower():
        return 1
    problems = problems_of(SITE)
    print("\n".join(problems) or f"{len(list(SITE.rglob('*.html')))} pages in {SITE}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
