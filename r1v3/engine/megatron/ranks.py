"""One tensor-, pipeline- and data-parallel job of the processes that torchrun started."""

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from r1v3.config import Parallel
from r1v3.ranks import Ranks


def connect(parallel: Parallel, *, device: str = "cpu") -> Ranks:
    """Initialize torch.distributed and megatron-core's parallel state; return all ranks.

    Without torchrun the job is this process alone. On CUDA a rank takes the device of its local
    rank and uses NCCL; on the CPU it uses gloo. The calls of `Ranks` always use gloo.

    Raises:
        ValueError: the number of processes is not a multiple of tensor x pipeline.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size % (parallel.tensor * parallel.pipeline):
        raise ValueError(
            f"parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline} does not "
            f"divide the {size} processes; start a multiple of "
            f"{parallel.tensor * parallel.pipeline} with torchrun --nproc-per-node"
        )
    # megatron-core warns of every extension that is not installed, torch of how it is called.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.c10d_logger")
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu:
        from r1v3.model.megatron import cpu

        cpu.enable()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    timeout = timedelta(seconds=parallel.timeout_seconds)
    if not dist.is_initialized():
        backend = "gloo" if on_cpu else "nccl"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            parallel.tensor,
            parallel.pipeline,
            distributed_timeout_minutes=max(1, round(parallel.timeout_seconds / 60)),
        )
        # Nothing random is left in training, but megatron-core wants its generators seeded.
        model_parallel_cuda_manual_seed(0)
    if on_cpu:
        return Ranks(dist.group.WORLD)
    return Ranks(dist.new_group(backend="gloo", timeout=timeout))
