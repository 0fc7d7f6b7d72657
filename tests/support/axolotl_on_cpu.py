"""Run `axolotl` with DeepSpeed on the CPU, alone or as one of torchrun's processes.

DeepSpeed would first compile its operator for processes that share memory, under a lock file that a killed process
leaves behind for all later ones to wait for: everything goes through gloo, as on platforms that the operator does not
support. And for one process axolotl asks for NCCL, which only GPUs have: it takes a process group that is there
already.
"""

import os
import socket
import sys


def main() -> None:
    import deepspeed.ops
    from axolotl.cli.main import cli
    from torch.distributed import init_process_group

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        with socket.socket() as connection:
            connection.bind(("127.0.0.1", 0))
            port = connection.getsockname()[1]
        init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    cli([*sys.argv[1:], "--launcher", "python"])


if __name__ == "__main__":
    main()
