"""Memory of the hosts and space on the disk that a stage needs beside its GPUs."""

from dataclasses import dataclass

from r1v3.config import GRPO, Stage, Supervised
from r1v3.data.tiles import KEPT_BYTES
from r1v3.model.flops import Dimensions
from r1v3.plan import memory

GPUS_PER_NODE = 8
# Not measured here; what is usual for a process with torch, CUDA and its libraries.
PROCESS = 6e9


@dataclass(frozen=True)
class Kept:
    """Folders of a stage that are on disk at a time, at most.

    checkpoints: complete ones, the one that is being written included. models: without the
    optimizer's state.
    """

    checkpoints: int
    models: int

    @classmethod
    def of(cls, config: Stage) -> "Kept":
        """Count those of a stage."""
        if isinstance(config, Supervised):
            return cls(config.keep + 1, 2)  # the best model and what is published
        if not isinstance(config, GRPO):
            return cls(0, 0)
        saved = -(-config.steps // config.checkpoint_every)
        older = max(0, saved - config.keep)
        if config.keep_models is not None:
            older = min(older, config.keep_models)
        return cls(min(saved, config.keep + 1), older + 1)


@dataclass(frozen=True)
class HostPlan:
    """Bytes beside the GPUs.

    node: of the memory of a node, pictures' files apart; of these, copy: of what its ranks write of
    a checkpoint, while it is written. checkpoint, model: of one on disk. disk: of all that stay.
    """

    node: float
    copy: float
    checkpoint: float
    model: float
    disk: float


def host_plan(
    dims: Dimensions,
    state: float,
    element: int,
    gpus: int,
    modules: dict[str, bool],
    kept: Kept,
) -> HostPlan:
    """Count the memory of a node of eight GPUs, and the disk.

    Args:
        state: bytes of the optimizer's state on the rank that holds most of it.
        element: bytes of a weight.
        modules: which of vision, connector and llm are trained; none where nothing is saved.
    """
    parameters = dims.parameters()
    whole = memory.State.of(parameters, modules, element=element, data=1, distributed=True)
    ranks = min(gpus, GPUS_PER_NODE)
    copy = ranks * (state + whole.weights / gpus) if kept.checkpoints else 0.0
    checkpoint = whole.weights + whole.optimizer
    return HostPlan(
        node=ranks * (PROCESS + KEPT_BYTES) + copy,
        copy=copy,
        checkpoint=checkpoint,
        model=whole.weights,
        disk=kept.checkpoints * checkpoint + kept.models * whole.weights,
    )
