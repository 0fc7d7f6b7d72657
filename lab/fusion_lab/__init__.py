"""The lab: a toy world whose sources have mastered their domain, and a runner of declared experiments in it.

The world is also that of the demonstration (`examples/demo`).
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
