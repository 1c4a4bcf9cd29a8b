"""The time of a step in a 1F1B pipeline, communication left out."""

from collections.abc import Mapping, Sequence

from r1v3.balance import longest_first, pipeline_order
from r1v3.model.flops import Dimensions, Work, forward_flops, train_flops
from r1v3.plan.job import Job

Cost = tuple[float, float]


def stage_costs(
    dims: Dimensions,
    work: Work,
    layers: Sequence[int],
    modules: Mapping[str, bool],
    *,
    recompute: bool = True,
) -> list[Cost]:
    """Operations of a micro-batch's (forward, backward) in every pipeline stage.

    Args:
        layers: language layers of each stage.
        modules: which of vision, connector and llm are trained.
        recompute: activations are computed again in the backward.
    """
    parts = (
        Work(tokens=work.tokens, attended=work.attended),
        Work(tiles=work.tiles),
        Work(labels=work.labels),
    )
    forward = [sum(forward_flops(dims, part).values()) for part in parts]
    total = [sum(train_flops(dims, part, modules, recompute=recompute).values()) for part in parts]
    found = []
    for stage, count in enumerate(layers):
        held = (count / dims.layers, float(stage == 0), float(stage == len(layers) - 1))
        ahead = sum(share * one for share, one in zip(held, forward, strict=True))
        both = sum(share * one for share, one in zip(held, total, strict=True))
        found.append((ahead, both - ahead))
    return found


def simulate(costs: Sequence[Sequence[Cost]]) -> float:
    """Return the time of a 1F1B schedule without communication.

    Stage s of p runs p - s - 1 forwards first, then a forward and a backward in turn, then the
    backwards that are left, as megatron-core's schedule without interleaving.

    Args:
        costs: (forward, backward) of every micro-batch, in order, in every stage.
    """
    if not costs:
        return 0.0
    count, stages = len(costs), len(costs[0])
    schedules: list[list[tuple[int, int]]] = []
    for stage in range(stages):
        warm = min(stages - stage - 1, count)
        schedule = [(0, i) for i in range(warm)]
        for i in range(count - warm):
            schedule += [(0, i + warm), (1, i)]
        schedules.append(schedule + [(1, i) for i in range(count - warm, count)])
    ended: dict[tuple[int, int, int], float] = {}
    clocks, places = [0.0] * stages, [0] * stages
    while len(ended) < 2 * count * stages:
        for stage in range(stages):
            while places[stage] < len(schedules[stage]):
                kind, i = schedules[stage][places[stage]]
                before = stage - 1 if kind == 0 else stage + 1
                waits = 0 <= before < stages
                if waits and (kind, before, i) not in ended:
                    break
                start = max(clocks[stage], ended[kind, before, i] if waits else 0.0)
                clocks[stage] = ended[kind, stage, i] = start + costs[i][stage][kind]
                places[stage] += 1
    return max(clocks)


def step_seconds(job: Job, dims: Dimensions) -> float:
    """Return the time of a training step at the stated rate, of the replica that takes longest."""
    rate = job.cluster.flops * job.shards.tensor * job.shards.context
    costs: list[list[Cost]] = []
    for pack, count in job.packing.packs.items():
        stages = stage_costs(
            dims, pack.work(), job.shards.layers, job.modules, recompute=job.shards.recompute
        )
        costs += [[(ahead / rate, back / rate) for ahead, back in stages]] * count
    totals = [sum(ahead + back for ahead, back in one) for one in costs]
    orders = (pipeline_order(share, totals) for share in longest_first(totals, job.data))
    # Replicas whose micro-batches are alike take the same time.
    different = {tuple(totals[i] for i in order): order for order in orders}
    return max(simulate([costs[i] for i in order]) for order in different.values())
