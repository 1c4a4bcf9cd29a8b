"""Demands of a stage's configuration on a cluster: memory of every kind of rank, operations."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from r1v3.model.flops import Dimensions, decode_flops, forward_flops, train_flops
from r1v3.plan import memory
from r1v3.plan.build import BuiltRank
from r1v3.plan.host import HostPlan, host_plan
from r1v3.plan.job import Job
from r1v3.plan.schedule import step_seconds


@dataclass(frozen=True)
class RolloutMemory:
    """Memory of a rank while completions are sampled.

    reserved: bytes on top of the training state. sequences: full-length ones that one copy of
    the engine holds at a time; None where it is not on these devices. sharing: how many, where
    the completions of a prompt hold it once.
    """

    reserved: float
    weights: float
    cache: float
    sequences: int | None
    sharing: int | None = None


@dataclass(frozen=True)
class RankPlan:
    """Bytes of one kind of rank."""

    stage: int
    count: int
    layers: int
    parameters: dict[str, int]
    state: memory.State
    reference: float
    activations: memory.Activations | None
    outside: float
    asleep: float
    rollout: RolloutMemory | None

    @property
    def resident(self) -> float:
        """Held all the time, while completions are sampled as well."""
        return self.state.total + self.reference + self.outside

    @property
    def training(self) -> float:
        """At the worst moment of a step."""
        moving = 0.0 if self.activations is None else self.activations.total
        return self.resident + self.asleep + moving

    @property
    def sampling(self) -> float:
        """While completions are sampled."""
        return self.resident + (0.0 if self.rollout is None else self.rollout.reserved)

    @property
    def peak(self) -> float:
        """The larger of the two."""
        return max(self.training, self.sampling)


@dataclass(frozen=True)
class Plan:
    """All kinds of ranks, and what a step costs.

    parameters: of the whole model by part, without padding. flops: of a step by part, model
    operations; hardware_flops with what is computed again. seconds: of a training step at the
    stated rate, waiting in the pipeline included. rollout_flops: of sampling.
    """

    job: Job
    ranks: list[RankPlan]
    host: HostPlan
    parameters: dict[str, int]
    padding: int
    flops: dict[str, float]
    hardware_flops: float
    seconds: float
    rollout_flops: float
    problems: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def overflow(self) -> float:
        """Bytes by which the fullest rank is too full; negative: what it has left."""
        return max(rank.peak for rank in self.ranks) - self.job.cluster.memory


def make_plan(job: Job, dims: Dimensions, built: Sequence[BuiltRank] | None = None) -> Plan:
    """Count everything; parameters come from the built modules, or without them from formulas."""
    stages = range(job.shards.pipeline)
    counts = [memory.stage_parameters(dims, job.shards, stage) for stage in stages]
    whole = dims.parameters()
    if built is not None:
        counts = [rank.parameters for rank in built]
        whole = {part: sum(rank.whole[part] for rank in built) for part in whole}
    ranks = [_rank(job, dims, stage, counts[stage]) for stage in stages]
    work = job.work
    if job.trains:
        flops = train_flops(dims, work, job.modules)
        hardware = train_flops(dims, work, job.modules, recompute=job.shards.recompute)
    else:
        flops = dict.fromkeys(whole, 0.0)
        hardware = dict(flops)
    sampled = 0.0
    if job.rollout is not None:
        alone = memory.Pack(1, 1, job.pack.prompt_tokens, 1, job.pack.tiles).work()
        each = [job.pack.response_tokens] * job.group
        sampled = job.prompts * (
            sum(forward_flops(dims, alone).values())
            + decode_flops(dims, job.pack.prompt_tokens, each)
        )
    return Plan(
        job=job,
        ranks=ranks,
        host=host_plan(
            dims,
            max(rank.state.optimizer for rank in ranks),
            job.shards.element,
            job.cluster.gpus,
            dict(job.modules),
            job.kept,
        ),
        parameters=whole,
        padding=_padding(dims, job.shards),
        flops=flops,
        hardware_flops=sum(hardware.values()),
        seconds=step_seconds(job, dims) if job.trains else 0.0,
        rollout_flops=sampled,
        problems=_problems(job, dims, ranks),
    )


def _padding(dims: Dimensions, shards: memory.Shards) -> int:
    """Parameters of the whole model that no checkpoint has."""
    size = dims.vision_hidden // dims.vision_heads
    heads = (shards.padded_heads - dims.vision_heads) * size
    per_head_column = 4 * dims.vision_hidden + 3 * dims.vision_bias + 2 * dims.qk_norm
    rows = (shards.padded_vocab - dims.vocab) * dims.hidden
    return heads * per_head_column * dims.vision_layers + rows * (1 if dims.tied else 2)


def _rank(job: Job, dims: Dimensions, stage: int, parameters: dict[str, int]) -> RankPlan:
    shards, cuda = job.shards, job.shards.cuda
    state = memory.State.of(
        parameters,
        job.modules,
        element=shards.element,
        data=job.data * shards.context,
        distributed=job.distributed_optimizer,
    )
    asleep = cuda and job.rollout is not None and job.rollout.engine == "vllm"
    moving = None
    if job.trains:
        each = -(-job.micro_batches // job.data)
        moving = max(
            (
                memory.activations(dims, shards, pack, stage, job.modules, each)
                for pack in job.packing.largest
            ),
            key=lambda needed: needed.total,
        )
    return RankPlan(
        stage=stage,
        count=shards.tensor * shards.context * job.data,
        layers=shards.layers[stage],
        parameters=parameters,
        state=state,
        reference=state.weights if job.reference else 0.0,
        activations=moving,
        outside=memory.CUDA_AND_NCCL if cuda else 0.0,
        asleep=memory.VLLM_ASLEEP if asleep else 0.0,
        rollout=_rollout(job, dims, stage),
    )


def _rollout(job: Job, dims: Dimensions, stage: int) -> RolloutMemory | None:
    rollout, shards = job.rollout, job.shards
    if rollout is None:
        return None
    if rollout.engine == "vllm-server":
        return RolloutMemory(0.0, 0.0, 0.0, None)
    if rollout.engine == "vllm":
        reserved = rollout.memory_share * job.cluster.memory
        weights = sum(dims.parameters().values()) * shards.element / rollout.tensor
        cache = max(0.0, reserved - weights - memory.VLLM_WORKSPACE)
        kv = max(dims.kv_heads // rollout.tensor, 1) * dims.head_dim
        token = 2 * kv * shards.element * dims.layers
        shared = token * (job.pack.response_tokens + job.pack.prompt_tokens / job.group)
        return RolloutMemory(
            reserved,
            weights,
            cache,
            sequences=int(cache // (token * job.sequence_tokens)),
            sharing=int(cache // shared),
        )
    cache = job.rows * job.sequence_tokens * memory.cache_per_token(dims, shards, stage)
    logits = 2 * 4 * job.rows * shards.padded_vocab
    prompts = job.rows // job.group * job.pack.prompt_tokens
    prefill = prompts * shards.element * (5 * dims.ffn // shards.tensor + 4 * dims.hidden)
    return RolloutMemory(float(cache + max(logits, prefill)), 0.0, float(cache), job.rows)


def _problems(job: Job, dims: Dimensions, ranks: Sequence[RankPlan]) -> list[str]:
    """One sentence per reason why the plan does not fit."""
    found, limit = _refusals(job, dims), job.cluster.memory
    for rank in ranks:
        for name, needed in (("training", rank.training), ("sampling", rank.sampling)):
            if needed > limit:
                found.append(
                    f"stage {rank.stage}: {name} needs {needed / 1e9:.1f} GB of "
                    f"{limit / 1e9:.0f} GB"
                )
    rollout = ranks[0].rollout
    if rollout is not None and rollout.sequences == 0:
        found.append(
            f"vLLM's share of {rollout.reserved / 1e9:.1f} GB holds no sequence of "
            f"{job.sequence_tokens} tokens beside {rollout.weights / 1e9:.1f} GB of weights"
        )
    if job.trains and job.micro_batches < job.data:
        found.append(
            f"{job.micro_batches} micro-batches leave "
            f"{job.data - job.micro_batches} of {job.data} data-parallel ranks without work"
        )
    return found


def _refusals(job: Job, dims: Dimensions) -> list[str]:
    """Reasons for which vLLM would not start, however large the GPUs."""
    if job.rollout is None or job.rollout.engine != "vllm":
        return []
    found, tensor = [], job.rollout.tensor
    if job.cluster.gpus % tensor:
        found.append(f"{job.cluster.gpus} GPUs are no multiple of {tensor}")
    for count, name in ((dims.heads, "attention heads"), (dims.ffn, "columns of an MLP")):
        if count % tensor:
            found.append(f"rollout.tensor {tensor}: vLLM cannot divide {count:,} {name} by it")
    if dims.kv_heads % tensor and tensor % dims.kv_heads:
        found.append(
            f"rollout.tensor {tensor}: vLLM can neither divide nor repeat {dims.kv_heads} key and "
            "value heads"
        )
    return found
