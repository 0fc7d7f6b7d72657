"""An axolotl plugin for tests: FSDP on a machine without a GPU.

axolotl asks for a mesh of CUDA devices, and accelerate leaves FSDP out where it sees none.
"""

from accelerate import ParallelismConfig, PartialState
from accelerate.utils import DistributedType
from axolotl.integrations.base import BasePlugin


class CpuMeshPlugin(BasePlugin):
    def register(self, cfg):
        build, start = ParallelismConfig.build_device_mesh, PartialState.__init__

        def started(state, *args, **kwargs):
            start(state, *args, **kwargs)
            if state.distributed_type == DistributedType.MULTI_CPU:
                state.distributed_type = DistributedType.MULTI_GPU

        PartialState.__init__ = started
        ParallelismConfig.build_device_mesh = lambda parallelism, device: build(parallelism, "cpu")
