"""Make the tables and plots of ``docs/evidence.md`` from ``lab/results``: ``make lab-report``."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from fusion_lab.report import write_page  # noqa: E402

if __name__ == "__main__":
    print("made", ", ".join(write_page()))
