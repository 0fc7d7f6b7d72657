"""``fusion run --dry-run``: what steps will take, as their own commands say it."""

import subprocess
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fusion_plugins.chain.process import environment_of
from fusion_plugins.chain.settings import Chain, Step
from fusion_plugins.escape import for_terminal

if TYPE_CHECKING:
    from fusion_plugins.chain.run import Planned

#: commands with a dry run of their own: it loads the model, works on a small part and writes nothing
ESTIMATED = (("fusion", "capture"), ("fusion", "sample"))


def estimates(chain: Chain, plan: "Sequence[Planned]") -> Iterator[tuple[str, str]]:
    """Yield name and estimate of every step that has to run and can tell: texts or responses, tokens, bytes, time."""
    for planned in plan:
        step = planned.step
        if planned.due is None or tuple(step.words[:2]) not in ESTIMATED:
            continue
        if planned.waits:
            yield step.name, f"can be estimated after {', '.join(planned.waits)}"
        else:
            yield step.name, _estimate(chain, step)


def _estimate(chain: Chain, step: Step) -> str:
    try:
        done = subprocess.run(
            [*step.words, "--dry-run"],
            cwd=chain.folder,
            env=environment_of(chain, step),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except OSError as error:  # no such program, or no such folder
        return for_terminal(f"no estimate: {step.words[0]}: {error.strerror or error}")
    lines = [line.strip() for line in done.stdout.decode(errors="replace").replace("\r", "\n").split("\n")]
    said = [line for line in lines if " tokens, " in line and " at the measured " in line]
    if done.returncode == 0 and said:
        return for_terminal("; ".join(said))
    last = next((line for line in reversed(lines) if line), f"status {done.returncode}")
    return for_terminal(f"no estimate: {last}")
