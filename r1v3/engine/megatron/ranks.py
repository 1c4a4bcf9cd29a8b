"""One tensor-, pipeline-, context- and data-parallel job of the processes that torchrun started."""

import os
import warnings

import torch

from r1v3.config import Parallel
from r1v3.ranks import Ranks, join_job


def connect(parallel: Parallel, *, device: str = "cpu") -> Ranks:
    """Initialize torch.distributed and megatron-core's parallel state; return all ranks.

    Devices and backends are those of `join_job`.

    Raises:
        ValueError: the number of processes is not a multiple of tensor x pipeline x context.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size % parallel.model_ranks:
        context = f" x parallel.context {parallel.context}" if parallel.context > 1 else ""
        raise ValueError(
            f"parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline}{context} "
            f"does not divide the {size} processes; start a multiple of {parallel.model_ranks} "
            "with torchrun --nproc-per-node"
        )
    # megatron-core warns of every extension that is not installed, torch of how it is called.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.c10d_logger")
    ranks = join_job(device, parallel.timeout_seconds)
    if torch.device(device).type == "cpu":
        from r1v3.model.megatron import cpu

        cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            parallel.tensor,
            parallel.pipeline,
            context_parallel_size=parallel.context,
            distributed_timeout_minutes=max(1, round(parallel.timeout_seconds / 60)),
        )
        # Nothing random is left in training, but megatron-core wants its generators seeded.
        model_parallel_cuda_manual_seed(0)
    return ranks
