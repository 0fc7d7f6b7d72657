"""The machine that a run is planned for: how many GPUs, and how much memory each of them has."""

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Machine:
    """GPUs of one machine.

    Attributes:
        gpus: how many; 0 for a run on the CPU.
        memory: bytes of one of them.
        flash_attention: whether this environment has it.
    """

    gpus: int
    memory: float
    flash_attention: bool


def this_machine(gpus: int | None = None, gigabytes: float | None = None) -> Machine:
    """Return what is present, or what was said by hand in its place.

    Args:
        gpus: number of GPUs, for another machine than this one.
        gigabytes: memory of one of them; 80 where it is not said and cannot be seen.
    """
    import torch

    present = torch.cuda.device_count()
    count = present if gpus is None else gpus
    seen = float(torch.cuda.get_device_properties(0).total_memory) if present else 80e9
    return Machine(count, seen if gigabytes is None else gigabytes * 1e9, find_spec("flash_attn") is not None)
