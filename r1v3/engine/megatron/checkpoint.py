"""Weights and optimizer state of a Megatron model as megatron-core's distributed checkpoint.

It is written in the background while training goes on, and loads in any tensor-, pipeline- and
data-parallel layout. The format holds pickled metadata: load only files that your own jobs have
saved; to share a model, use the safetensors beside it.
"""

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from r1v3.engine.megatron import results_process
from r1v3.engine.megatron.optimizer import MegatronAdamW
from r1v3.model.megatron.internvl import InternVL
from r1v3.ranks import Ranks

FOLDER = "megatron"
# Moments and main parameters are stored by parameter, so that every layout can read them.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


class AsyncWriting:
    """A `contract.Writing` of megatron-core's asynchronous save."""

    def __init__(self, queue: AsyncCallsQueue) -> None:
        self._queue = queue

    def done(self) -> bool:
        """See `contract.Writing.done`."""
        self._queue.maybe_finalize_async_calls(blocking=False)
        return self._queue.get_num_unfinalized_calls() == 0

    def wait(self) -> None:
        """See `contract.Writing.wait`."""
        self._queue.maybe_finalize_async_calls(blocking=True)


def save_sharded(
    directory: Path, model: InternVL, optimizer: MegatronAdamW, ranks: Ranks
) -> AsyncWriting:
    """Start to write model and optimizer below an existing directory."""
    folder = directory / FOLDER
    ranks.on_main(folder.mkdir)
    if filesystem_async._results_queue is None:
        # megatron-core's own dies of the SIGTERM that asks for a save, and outlives a killed rank.
        filesystem_async._results_queue = results_process.start().Queue()
    request = dist_checkpointing.save(
        _state(model, optimizer, loading=False), str(folder), async_sharded_save=True
    )
    queue = AsyncCallsQueue()
    queue.schedule_async_request(request)
    return AsyncWriting(queue)


def load_sharded(directory: Path, model: InternVL, optimizer: MegatronAdamW) -> None:
    """Load the files of `save_sharded` into model and optimizer."""
    state = dist_checkpointing.load(_state(model, optimizer, loading=True), str(directory / FOLDER))
    model.load_state_dict(state["model"])
    chained = optimizer.optimizer.chained_optimizers
    for one in chained:
        if isinstance(one, DistributedOptimizer):
            _keep_step(one)
    optimizer.optimizer.load_state_dict(state["optimizer"])
    for one in chained:
        # torch's AdamW counts in place, and was given one counter for all parameters.
        for moments in one.optimizer.state.values():
            if isinstance(moments.get("step"), Tensor):
                moments["step"] = moments["step"].clone()


def _keep_step(optimizer: DistributedOptimizer) -> None:
    """Add the step, already restored for all parameters at once, to each parameter's state.

    With torch's AdamW, megatron-core requires it there but does not read it.
    """
    store = optimizer._set_main_param_and_optimizer_states

    def with_step(parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        group, place = optimizer.model_param_group_index_map[parameter]
        main = optimizer.optimizer.param_groups[group]["params"][place]
        state = optimizer.optimizer.state[main]
        store(parameter, {**({"step": state["step"]} if "step" in state else {}), **tensors})

    optimizer._set_main_param_and_optimizer_states = with_step


def _state(model: InternVL, optimizer: MegatronAdamW, *, loading: bool) -> dict[str, Any]:
    weights = model.sharded_state_dict(prefix="")
    moments = optimizer.optimizer.sharded_state_dict(
        weights, is_loading=loading, metadata=_METADATA
    )
    return {"model": weights, "optimizer": moments}
