"""All three methods on this machine's CPU, with models that it trains itself: ``python examples/demo/run.py``.

Writes a chain into OUT/cpu and carries it out as ``fusion run`` does: what is finished is passed over the next time.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "lab"))

from fusion_demo.chain import SIZES, write_chain
from fusion_lab.handover import warm_programs
from rich.console import Console
from rich.markdown import Markdown

from fusion_plugins.cli import main as fusion

#: what the last step of the chain writes, and a person looks at
RESULTS = ("results.md", "results.json", "results.svg")


def main() -> int:
    """Run all steps; print the results and put them into the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder of everything that is made")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: every step runs, the numbers mean nothing")
    parser.add_argument("--jobs", type=int, default=2, help="steps at a time")
    arguments = parser.parse_args()
    size = SIZES["quick" if arguments.quick else "full"]
    out = arguments.out.resolve()
    folder = out / size.world
    chain = write_chain(folder, size)
    # Caches are where the work is, not in the home folder; compiled bytecode saves seconds of every start.
    os.environ["HF_HOME"] = str(folder / "huggingface")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(folder / "bytecode"))
    with warm_programs(folder / "warm", folder / "logs" / "warm.log"):
        try:
            fusion(["run", str(chain), "--jobs", str(arguments.jobs)])
        except SystemExit as ended:
            if ended.code:
                return int(ended.code)
    for name in RESULTS:
        shutil.copyfile(folder / name, out / name)
    Console().print(Markdown((out / "results.md").read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
