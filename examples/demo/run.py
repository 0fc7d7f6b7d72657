"""The whole main job on this machine's CPU, with models that it trains itself: ``python examples/demo/run.py``.

What is finished is kept in OUT/.cache and passed over the next time; logs stand in OUT/logs.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from fusion_demo.plan import make_plan, write_configs
from fusion_demo.results import write_results
from fusion_demo.settings import SIZES
from fusion_demo.stages import StageFailed, run_stages
from rich.console import Console

#: No model hub, no telemetry, no processes that outlive their stage; tools are called by bare name.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
}


def main() -> int:
    """Run all stages; print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder of results, logs and cache")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: every stage runs, the numbers mean nothing")
    parser.add_argument("--jobs", type=int, default=2, help="stages at a time")
    arguments = parser.parse_args()
    size = "quick" if arguments.quick else "full"
    out = arguments.out.resolve()
    work = out / ".cache" / size
    os.environ |= ENVIRONMENT
    # Caches stand where the work is, not in the home folder; compiled bytecode saves seconds of every import.
    os.environ["HF_HOME"] = str(work / "huggingface")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(work / "bytecode"))
    # Stages run in sessions of their own: a terminated run must still end them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console()
    started = time.monotonic()
    write_configs(work, SIZES[size])
    try:
        spent = run_stages(make_plan(size), work, out / "logs", jobs=arguments.jobs, console=console)
    except StageFailed as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; the next run goes on after the stages that are finished")
        return 130
    write_results(out, work, size, spent, time.monotonic() - started, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
