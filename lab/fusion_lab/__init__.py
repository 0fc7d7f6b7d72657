"""The lab: a toy world whose sources have mastered their domain, and a runner of declared experiments in it.

Texts and tokenizers are made by the demonstration's modules, which this makes importable.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_DEMO = str(ROOT / "examples" / "demo")
if _DEMO not in sys.path:
    sys.path.append(_DEMO)
