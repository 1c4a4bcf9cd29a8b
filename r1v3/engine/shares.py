"""The micro-batches of each data-parallel replica, the same on every rank."""

from collections.abc import Mapping, Sequence

from r1v3.balance import longest_first, pipeline_order
from r1v3.model.flops import Dimensions, Work, train_flops


def replica_shares(
    works: Sequence[Work],
    replicas: int,
    dims: Dimensions,
    modules: Mapping[str, bool],
    *,
    recompute: bool = False,
    pipelined: bool = False,
) -> list[list[int]]:
    """Divide micro-batches among replicas so that all have about the same operations.

    Args:
        works: of the micro-batches.
        modules: which of vision, connector and llm are trained.
        recompute: activations are computed again in the backward.
        pipelined: order each share for a 1F1B schedule; without, it is ascending.
    """
    costs = [sum(train_flops(dims, work, modules, recompute=recompute).values()) for work in works]
    shares = longest_first(costs, replicas)
    return [pipeline_order(share, costs) for share in shares] if pipelined else shares
