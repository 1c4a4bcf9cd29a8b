"""A stage's configuration laid out on a cluster.

The worst case is planned for: every prompt has all its tiles and every response its full length.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from r1v3.config import GRPO, Evaluate, RolloutEngine, Stage, Supervised
from r1v3.model.flops import Dimensions, Work
from r1v3.plan import memory
from r1v3.plan.build import RankLayout
from r1v3.plan.host import Kept
from r1v3.plan.packing import LongestSample, Packing, packing_of

TEXT_TOKENS = 512
HEAD_MULTIPLE, VOCAB_MULTIPLE = 8, 128  # ModelOptions' own, checked by a test


@dataclass(frozen=True)
class Cluster:
    """The machines. memory: bytes of one device. flops: sustained operations a second of one."""

    gpus: int
    memory: float = 80e9
    flops: float = 400e12


@dataclass(frozen=True)
class Job:
    """One stage laid out on a cluster.

    packing: the micro-batches of a step. prompts, group: sampled prompts of a step, and completions
    of each. rows: sequences that one copy of the model decodes at a time with `local` rollouts;
    context-parallel ranks are a copy each. kept: what of it stays on disk.
    """

    cluster: Cluster
    layout: RankLayout
    shards: memory.Shards
    data: int
    modules: Mapping[str, bool]
    trains: bool
    distributed_optimizer: bool
    packing: Packing
    prompts: int
    group: int
    rows: int
    rollout: RolloutEngine | None
    reference: bool
    kept: Kept

    @property
    def pack(self) -> memory.Pack:
        """The largest micro-batch of a step at full length."""
        return max(self.packing.packs, key=lambda pack: pack.tokens)

    @property
    def micro_batches(self) -> int:
        """Of a step, all data-parallel ranks together."""
        return sum(self.packing.packs.values())

    @property
    def work(self) -> Work:
        """Of one training step."""
        return sum((pack.work() * n for pack, n in self.packing.packs.items()), Work())

    @property
    def sequence_tokens(self) -> int:
        """Tokens of a prompt with its response."""
        return self.pack.prompt_tokens + self.pack.response_tokens


def stage_layers(total: int, stages: int, first: int | None, last: int | None) -> tuple[int, ...]:
    """Language layers of every pipeline stage; the rest is divided evenly among the middle ones.

    Raises:
        ValueError: the layers do not divide.
    """
    ends = [count for count in (first, last) if count is not None]
    middle, rest = stages - len(ends), total - sum(ends)
    if (
        rest < 0
        or (middle and rest % middle)
        or (middle and rest < middle)
        or (not middle and rest)
    ):
        raise ValueError(
            f"{total} language layers cannot be {stages} stages with first_stage_layers={first} "
            f"and last_stage_layers={last}: {rest} layers are left for {middle} stages"
        )
    layers = [rest // middle] * middle if middle else []
    return tuple(
        ([first] if first is not None else []) + layers + ([last] if last is not None else [])
    )


def job_of(
    config: Stage,
    dims: Dimensions,
    cluster: Cluster,
    *,
    sequence_length: int | None = None,
    text_tokens: int = TEXT_TOKENS,
) -> Job:
    """Lay a stage out on a cluster.

    Args:
        sequence_length: tokens of a prompt with its response, instead of the configured ones.
        text_tokens: of a prompt besides its image tokens.

    Raises:
        ValueError: the layout does not fit the model or the number of GPUs.
    """
    if config.engine != "megatron":
        raise ValueError(f"engine {config.engine} is one process; the plan needs engine=megatron")
    parallel = config.parallel
    if cluster.gpus % parallel.model_ranks:
        context = f" x context {parallel.context}" if parallel.context > 1 else ""
        raise ValueError(
            f"{cluster.gpus} GPUs are not a multiple of tensor {parallel.tensor} x pipeline "
            f"{parallel.pipeline}{context} = {parallel.model_ranks}"
        )
    data = cluster.gpus // parallel.model_ranks
    # Context-parallel ranks share what one replica trains on, and sample for themselves.
    samplers = data * parallel.context
    trains = isinstance(config, Supervised | GRPO)
    sequence = _sequence(config, dims, sequence_length, text_tokens)
    prompts, group, rows = _samples(config, samplers)
    layout = RankLayout(
        world=cluster.gpus,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        sequence=parallel.sequence,
        first_stage_layers=parallel.first_stage_layers,
        last_stage_layers=parallel.last_stage_layers,
        dtype=config.dtype,
    )
    shards = _shards(config, dims)
    modules = config.modules.model_dump() if isinstance(config, Supervised | GRPO) else {}
    rollout = config.rollout if isinstance(config, GRPO | Evaluate) else None
    return Job(
        cluster=cluster,
        layout=layout,
        shards=shards,
        data=data,
        modules=modules,
        trains=trains,
        distributed_optimizer=parallel.distributed_optimizer,
        packing=packing_of(config, data if trains else samplers, sequence),
        prompts=prompts,
        group=group,
        rows=rows,
        rollout=rollout,
        reference=isinstance(config, GRPO) and config.loss.kl_coef > 0,
        kept=Kept.of(config),
    )


def _shards(config: Stage, dims: Dimensions) -> memory.Shards:
    parallel = config.parallel
    return memory.Shards(
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        layers=stage_layers(
            dims.layers,
            parallel.pipeline,
            parallel.first_stage_layers,
            parallel.last_stage_layers,
        ),
        recompute=parallel.recompute == "full",
        element=4 if config.dtype == "float32" else 2,
        padded_heads=-(-dims.vision_heads // HEAD_MULTIPLE) * HEAD_MULTIPLE,
        padded_vocab=-(-dims.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        cuda=config.device != "cpu",
        context=parallel.context,
    )


def _sequence(
    config: Stage, dims: Dimensions, sequence_length: int | None, text_tokens: int
) -> LongestSample:
    """The longest prompt and response of a stage."""
    tiles = config.max_tiles or 1
    tiles += tiles > 1  # and the thumbnail
    prompt = tiles * dims.image_tokens + text_tokens
    if isinstance(config, Supervised):
        length = sequence_length or config.max_length
        if length is None:
            raise ValueError("set max_length, or give --sequence-length, to plan for")
    elif isinstance(config, GRPO):
        length = sequence_length or prompt + config.longest_response
    elif isinstance(config, Evaluate):
        length = sequence_length or prompt + config.decoding.max_tokens
    else:
        raise ValueError(f"there is no plan of a {type(config).__name__} stage")
    if length <= prompt:
        raise ValueError(
            f"a prompt of {tiles} tiles and {text_tokens} words has {prompt} tokens, which leaves "
            f"no room for a response in {length}; lower max_tiles or raise the length"
        )
    if length > dims.positions:
        raise ValueError(
            f"a sequence of {length:,} tokens, {prompt:,} of them the prompt of {tiles} tiles and "
            f"{text_tokens} words, exceeds the model's {dims.positions:,} positions "
            "(max_position_embeddings), which no number of GPUs changes: shorten the response, or "
            "lower max_tiles"
        )
    return LongestSample(prompt, length - prompt, tiles)


def _samples(config: Stage, samplers: int) -> tuple[int, int, int]:
    """(prompts sampled in a step, completions of each, rows that one of the samplers decodes at a
    time)."""
    if isinstance(config, GRPO):
        rows = -(-config.prompts_per_step // samplers) * config.group_size
        return config.prompts_per_step // config.gradient_steps, config.group_size, rows
    if isinstance(config, Evaluate):
        prompts = -(-config.batch_prompts // samplers)
        return prompts * samplers, config.samples, prompts * config.samples
    return 0, 1, 0


def model_folder(config: Stage, config_file: Path) -> Path:
    """The folder whose config.json describes the model: the configured one, or, before it was
    downloaded, `model/` beside the configuration.

    Raises:
        ValueError: neither is there.
    """
    beside = config_file.parent / "model"
    for folder in (config.model, beside):
        if folder is not None and (folder / "config.json").is_file():
            return folder
    raise ValueError(f"neither {config.model} nor {beside} holds a config.json")
