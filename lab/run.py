"""Run questions of the lab: ``python lab/run.py QUESTION ... [--quick] [--size cpu] [-- DOIT ARGUMENTS]``.

Finished cells are passed over, so the same command resumes a run that was killed. ``-- -n 2`` runs two cells side by
side; ``-- list`` lists the tasks; ``-- run NAME`` runs one of them.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from fusion_lab import warm  # noqa: E402
from fusion_lab.world import Lab  # noqa: E402


def main() -> int:
    """Run what the command line asks for."""
    own, _, rest = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="+", help="starts of names of files of lab/questions, or all")
    parser.add_argument("--quick", action="store_true", help="the form that CI runs: seconds, proves nothing")
    parser.add_argument("--size", choices=("quick", "cpu", "gpu"), help="size of the world; cpu, or quick with --quick")
    parser.add_argument("--out", type=Path, default=Path("lab_out"), help="folder of everything that is made")
    args = parser.parse_args(own.split())
    warm.warm_up()

    from fusion_lab.runner import QUESTIONS, run_question

    every = sorted(path.stem for path in QUESTIONS.glob("*.yml"))
    names = every if args.questions == ["all"] else args.questions
    lab = Lab(args.size or ("quick" if args.quick else "cpu"), args.out.resolve())
    return max(run_question(name, lab, quick=args.quick, arguments=rest.split()) for name in names)


if __name__ == "__main__":
    sys.exit(main())
