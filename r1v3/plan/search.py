"""Which settings make a plan fit: changes of one setting, then of several."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from r1v3.config import GRPO, Stage, Supervised
from r1v3.model.flops import Dimensions
from r1v3.plan.job import Cluster, job_of
from r1v3.plan.plan import Plan, make_plan

Loader = Callable[[Sequence[str]], Stage]
MOST_CHANGES = 4
MORE_GPUS = (2, 4, 8, 16)
_SPLITS = (1, 2, 4, 8)
# Limits of a micro-batch in tokens: from what keeps a GPU busy to what fits none.
_BUDGETS = tuple(2**n for n in range(13, 19))


@dataclass(frozen=True)
class Proposal:
    """Overrides of the configuration, and the plan they give."""

    overrides: tuple[str, ...]
    plan: Plan


def propose(
    load: Loader,
    dims: Dimensions,
    cluster: Cluster,
    *,
    sequence_length: int | None = None,
    text_tokens: int,
    most: int = 3,
) -> list[Proposal]:
    """Changes under which the stage fits, cheapest step first; empty when none was found.

    Single changes are tried first. If none is enough, the best of them is kept and further ones
    are added, up to four. Settings that change what is learned, batch, group and model, stay.

    Args:
        load: the configuration under a list of `key=value` overrides; ConfigError (a ValueError)
            for settings that exclude each other.
        most: proposals to return.
    """

    def plan(overrides: tuple[str, ...]) -> Plan | None:
        try:
            job = job_of(
                load(overrides),
                dims,
                cluster,
                sequence_length=sequence_length,
                text_tokens=text_tokens,
            )
        except ValueError:
            return None
        return make_plan(job, dims)

    kept: tuple[str, ...] = ()
    for _ in range(MOST_CHANGES):
        config = load(kept)
        tried = [
            Proposal(overrides, found)
            for change in neighbors(config, dims)
            if (found := plan(overrides := _merge(kept, change))) is not None
        ]
        fitting = [proposal for proposal in tried if proposal.plan.fits]
        if fitting:
            return sorted(fitting, key=_cost)[:most]
        if not tried:
            return []
        best = min(tried, key=lambda proposal: (proposal.plan.overflow, _cost(proposal)))
        kept = best.overrides
    return []


def on_more_gpus(
    load: Loader,
    dims: Dimensions,
    cluster: Cluster,
    *,
    sequence_length: int | None = None,
    text_tokens: int,
) -> tuple[int, Proposal] | None:
    """Return the next of 2, 4, 8 and 16 times the GPUs on which the stage fits, and how.

    None where it fits none of them: memory that more GPUs do not divide is too small.
    """
    for factor in MORE_GPUS:
        larger = replace(cluster, gpus=cluster.gpus * factor)
        lengths: dict[str, Any] = {
            "sequence_length": sequence_length,
            "text_tokens": text_tokens,
        }
        with suppress(ValueError):  # the layout may not divide this cluster either
            plan = make_plan(job_of(load(()), dims, larger, **lengths), dims)
            if plan.fits:
                return larger.gpus, Proposal((), plan)
        if found := propose(load, dims, larger, most=1, **lengths):
            return larger.gpus, found[0]
    return None


def _cost(proposal: Proposal) -> tuple[float, int]:
    return proposal.plan.seconds, len(proposal.overrides)


def _merge(kept: tuple[str, ...], change: Sequence[str]) -> tuple[str, ...]:
    """Later settings of a key replace earlier ones."""
    settings = dict(override.split("=", 1) for override in (*kept, *change))
    return tuple(f"{key}={value}" for key, value in settings.items())


def neighbors(config: Stage, dims: Dimensions) -> Iterator[tuple[str, ...]]:
    """Changes of one setting, with what must change along with it."""
    parallel = config.parallel
    if parallel.recompute == "none":
        yield ("parallel.recompute=full",)
    if parallel.tensor > 1 and not parallel.sequence:
        yield ("parallel.sequence=true",)
    for tensor in _SPLITS:
        if tensor != parallel.tensor:
            yield (f"parallel.tensor={tensor}", f"parallel.sequence={str(tensor > 1).lower()}")
    for context in _SPLITS:
        if context != parallel.context:
            yield (f"parallel.context={context}",)
    for stages in _SPLITS:
        if stages != parallel.pipeline:
            first = "null" if stages == 1 else str(balanced_first(dims, stages))
            yield (
                f"parallel.pipeline={stages}",
                f"parallel.first_stage_layers={first}",
                "parallel.last_stage_layers=null",
            )
    if parallel.pipeline > 1:
        for first_layers in range(1, dims.layers - parallel.pipeline + 2):
            if first_layers != parallel.first_stage_layers:
                yield (
                    f"parallel.first_stage_layers={first_layers}",
                    "parallel.last_stage_layers=null",
                )
    for key in ("micro_batch_size", "micro_batch_prompts"):
        size = getattr(config, key, 1)
        while size > 1:
            size //= 2
            yield (f"{key}={size}",)
    for tokens in _BUDGETS if isinstance(config, GRPO | Supervised) else ():
        yield (f"micro_batch_tokens={tokens}",)
    rollout = getattr(config, "rollout", None)
    if rollout is not None and rollout.engine != "vllm-server":
        if rollout.engine == "local":
            yield ("rollout.engine=vllm", f"rollout.tensor={parallel.tensor}")
        else:
            for percent in range(20, 91, 5):
                yield (f"rollout.memory_share={percent / 100}",)
            for tensor in _SPLITS:
                if tensor != rollout.tensor:
                    yield (f"rollout.tensor={tensor}",)


def balanced_first(dims: Dimensions, stages: int) -> int:
    """Language layers of the first of `stages` stages that give all about the same parameters.

    The rest is divided evenly among the other stages.
    """
    others = stages - 1
    extra = (
        dims.vision_embeddings
        + dims.vision_layers * dims.vision_layer
        + dims.connector
        + dims.embedding
    )
    total = extra + dims.layers * dims.layer + (0 if dims.tied else dims.embedding)
    wanted = (total / stages - extra) / dims.layer
    allowed = [n for n in range(1, dims.layers) if (dims.layers - n) % others == 0]
    return min(allowed, key=lambda n: abs(n - wanted), default=1)
