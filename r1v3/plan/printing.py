"""The plan for people and, as JSON, for programs."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from r1v3.model.parts import PARTS
from r1v3.plan import host, memory
from r1v3.plan.plan import Plan, RankPlan
from r1v3.plan.search import MORE_GPUS, Proposal


def gb(value: float) -> str:
    """Bytes as 10^9 with one decimal."""
    return f"{value / 1e9:.1f}"


def print_plan(
    plan: Plan,
    title: str,
    proposals: Sequence[Proposal],
    larger: tuple[int, Proposal] | None,
    console: Console,
) -> None:
    """Print layout, parameters, memory of every kind of rank, operations, and the verdict.

    Args:
        larger: where nothing is proposed, the number of GPUs on which the stage would fit, and how.
    """
    job, pack = plan.job, plan.job.pack
    context = f"context {job.shards.context} x " if job.shards.context > 1 else ""
    console.print(
        f"[bold]{title}[/]: {job.cluster.gpus} GPUs = tensor {job.shards.tensor} x pipeline "
        f"{job.shards.pipeline} {list(job.shards.layers)} x {context}data {job.data}",
        highlight=False,
        soft_wrap=True,
    )
    counts = ", ".join(f"{part} {plan.parameters[part]:,}" for part in PARTS)
    console.print(
        f"parameters {sum(plan.parameters.values()):,} ({counts}); padding {plan.padding:,} more",
        highlight=False,
        soft_wrap=True,
    )
    if job.trains:
        limit = "" if job.packing.tokens is None else f" of up to {job.packing.tokens:,}"
        console.print(
            f"micro-batch: {pack.prompts} x {pack.group} sequences of {job.sequence_tokens:,} "
            f"tokens, {pack.tiles} tiles each, are {pack.tokens:,} rows{limit}; "
            f"{job.micro_batches} a step, {-(-job.micro_batches // job.data)} a replica",
            highlight=False,
            soft_wrap=True,
        )
    console.print(_memory_table(plan))
    for line in _notes(plan):
        console.print(line, highlight=False, soft_wrap=True)
    _print_verdict(plan, proposals, larger, console)


def _memory_table(plan: Plan) -> Table:
    limit = plan.job.cluster.memory
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"GB of {limit / 1e9:.0f} per rank")
    for rank in plan.ranks:
        table.add_column(f"stage {rank.stage}", justify="right")
    for name, cells in _rows(plan.ranks, limit):
        table.add_row(name, *cells)
    return table


def _rows(ranks: Sequence[RankPlan], limit: float) -> Iterator[tuple[str, list[str]]]:
    """(name, one cell per kind of rank)."""

    def verdict(needed: float) -> str:
        return f"[{'red' if needed > limit else 'green'}]{gb(needed)}[/]"

    yield "ranks x language layers", [f"{rank.count} x {rank.layers}" for rank in ranks]
    yield (
        "parameters, padding included",
        [f"{sum(rank.parameters.values()) / 1e9:.2f} B" for rank in ranks],
    )
    yield "weights", [gb(rank.state.weights + rank.reference) for rank in ranks]
    yield "gradients", [gb(rank.state.gradients) for rank in ranks]
    yield "optimizer", [gb(rank.state.optimizer) for rank in ranks]
    moving = [rank.activations for rank in ranks if rank.activations is not None]
    if moving:
        kept = [f"{gb(one.kept)} x {one.in_flight}" for one in moving]
        yield "activations kept x micro-batches in flight", kept
        yield "and, for a moment, a layer's backward", [gb(one.layer) for one in moving]
        yield "or, for a moment, the fused head", [gb(one.head) for one in moving]
        yield "   (it would be, with all logits)", [gb(one.materialized) for one in moving]
    yield "CUDA, NCCL, sleeping vLLM", [gb(rank.outside + rank.asleep) for rank in ranks]
    if moving:
        yield "training, at most", [verdict(rank.training) for rank in ranks]
    if ranks[0].rollout is not None:
        yield "sampling, at most", [verdict(rank.sampling) for rank in ranks]


def _notes(plan: Plan) -> list[str]:
    job, lines = plan.job, []
    rollout = plan.ranks[0].rollout
    if rollout is not None and job.rollout is not None and job.rollout.engine == "vllm":
        lines.append(
            f"vLLM on {job.rollout.tensor} GPUs, {gb(rollout.reserved)} GB each: weights "
            f"{gb(rollout.weights)}, key-value cache {gb(rollout.cache)} for {rollout.sequences} "
            f"sequences of {job.sequence_tokens:,} tokens ({rollout.sharing} where those of a "
            f"prompt share it), workspace {gb(memory.VLLM_WORKSPACE)}"
        )
    elif rollout is not None and rollout.sequences is not None:
        lines.append(
            f"local sampling of {rollout.sequences} sequences at a time: "
            f"{max(gb(rank.rollout.reserved) for rank in plan.ranks if rank.rollout)} GB"
        )
    if job.trains:
        parts = ", ".join(f"{part} {plan.flops[part]:.2e}" for part in PARTS)
        rate = job.cluster.gpus * plan.seconds
        reached = sum(plan.flops.values()) / rate / 1e12
        lines.append(
            f"training step {sum(plan.flops.values()):.2e} FLOPs ({parts}), "
            f"{plan.hardware_flops:.2e} with recomputation"
        )
        lines.append(
            f"at {job.cluster.flops / 1e12:.0f} TFLOP/s per GPU: {plan.seconds:.0f} s, pipeline "
            f"included, at full length ({reached:.0f} model TFLOP/s per GPU)"
        )
    nodes = min(job.cluster.gpus, host.GPUS_PER_NODE)
    copied = f", {gb(plan.host.copy)} of it while a checkpoint is written" if job.trains else ""
    lines.append(
        f"host memory: {gb(plan.host.node)} GB for {nodes} ranks of a node and the pictures' files"
        f"{copied}"
    )
    if job.kept.checkpoints:
        lines.append(
            f"disk: {gb(plan.host.disk)} GB for {job.kept.checkpoints} checkpoints of "
            f"{gb(plan.host.checkpoint)} and {job.kept.models} models of {gb(plan.host.model)}"
        )
    if plan.rollout_flops:
        lines.append(f"sampling {plan.rollout_flops:.2e} FLOPs, bound by memory bandwidth")
    lines.append(
        f"assumed, not measured: CUDA and NCCL {gb(memory.CUDA_AND_NCCL)} GB, sleeping vLLM "
        f"{gb(memory.VLLM_ASLEEP)} GB, a process {gb(host.PROCESS)} GB of its host, flash "
        "attention and fused norms"
    )
    return lines


def _print_verdict(
    plan: Plan,
    proposals: Sequence[Proposal],
    larger: tuple[int, Proposal] | None,
    console: Console,
) -> None:
    if plan.fits:
        console.print(f"[green]fits[/]: {gb(-plan.overflow)} GB left on the fullest rank")
        return
    for problem in plan.problems:
        console.print(f"[red]does not fit[/]: {problem}", highlight=False, soft_wrap=True)
    if not proposals:
        told = "no change of layout, micro-batch or vLLM memory fits"
        if larger is None:
            most = MORE_GPUS[-1] * plan.job.cluster.gpus
            told += f", nor do up to {most:,} GPUs; shorten the response, or lower max_tiles"
        else:
            gpus, found = larger
            told += f" {plan.job.cluster.gpus} GPUs; {gpus:,} would do"
            told += f" with {' '.join(found.overrides)}" if found.overrides else ""
        console.print(told, highlight=False, soft_wrap=True)
    for proposal in proposals:
        console.print(
            f"[green]would fit[/] ({gb(-proposal.plan.overflow)} GB left, "
            f"{proposal.plan.seconds:.0f} s): {' '.join(proposal.overrides)}",
            highlight=False,
            soft_wrap=True,
        )


def as_json(plan: Plan, proposals: Sequence[Proposal]) -> dict[str, Any]:
    """Everything, in bytes and operations."""
    job = plan.job
    ranks = []
    for rank in plan.ranks:
        entry = asdict(rank)
        if rank.activations is not None:
            entry["activations"]["total"] = rank.activations.total
            entry["activations"]["total_materialized"] = rank.activations.total_materialized
        ranks.append(entry | {"training": rank.training, "sampling": rank.sampling})
    return {
        "gpus": job.cluster.gpus,
        "memory": job.cluster.memory,
        "tensor": job.shards.tensor,
        "pipeline": job.shards.pipeline,
        "context": job.shards.context,
        "data": job.data,
        "layers": list(job.shards.layers),
        "micro_batch": asdict(job.pack) | {"tokens": job.pack.tokens},
        "micro_batch_tokens": job.packing.tokens,
        "micro_batches": job.micro_batches,
        "parameters": plan.parameters,
        "total_parameters": sum(plan.parameters.values()),
        "padding": plan.padding,
        "ranks": ranks,
        "flops": plan.flops,
        "hardware_flops": plan.hardware_flops,
        "rollout_flops": plan.rollout_flops,
        "seconds": plan.seconds,
        "host": asdict(plan.host) | asdict(job.kept),
        "fits": plan.fits,
        "problems": plan.problems,
        "proposals": [
            {"overrides": list(p.overrides), "seconds": p.plan.seconds, "left": -p.plan.overflow}
            for p in proposals
        ],
    }
