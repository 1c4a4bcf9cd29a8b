"""Megatron weights of this rank from an HF checkpoint, and HF tensors from the ranks' weights."""

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import InternVLConfig

from r1v3.model.conversion.match import Report, Source, require_match
from r1v3.model.conversion.reader import Checkpoint
from r1v3.model.conversion.slices import covered, shard_runs
from r1v3.model.conversion.table import Weight, weights

if TYPE_CHECKING:
    from r1v3.model.megatron.internvl import InternVL

BUCKET_BYTES = 512 << 20
# torch 2.13 deprecates the second name in favor of the first, which older versions lack.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_LAYER = re.compile(r"(.*\.decoder\.layers\.)(\d+)(\..*)")


def global_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names of the whole model: layers count from 0 over all pipeline stages."""
    modules = dict(model.named_modules())
    found = {}
    for name, parameter in model.named_parameters():
        if matched := _LAYER.fullmatch(name):
            layer = modules[matched[1] + matched[2]].layer_number - 1
            name = f"{matched[1]}{layer}{matched[3]}"
        found[name] = parameter
    return found


def _padded_size(weight: Weight, local: Sequence[int], tensor_parallel: int) -> int:
    """The split dimension over all ranks, once the local shape is known to fit the weight.

    Raises:
        ValueError: it does not.
    """
    split = weight.split
    assert split is not None
    expected = list(weight.shapes[0])
    if len(local) == len(expected):
        expected[split] = local[split]
    if list(local) != expected:
        raise ValueError(
            f"model parameter {weight.megatron} has shape {tuple(local)}; the configuration says "
            f"{weight.shapes[0]} per part, split along dimension {split}"
        )
    return local[split] * tensor_parallel


def fill(
    target: Tensor,
    weight: Weight,
    sources: Mapping[str, Source],
    checkpoint: Checkpoint,
    *,
    tensor_parallel: int,
    rank: int,
) -> None:
    """Fill one tensor-parallel shard of a Megatron weight from the slices of a checkpoint.

    Values are converted to the dtype and device of `target`; padding becomes zero.

    Raises:
        ValueError: the shape of `target` does not fit.
    """
    if weight.split is None:
        if tuple(target.shape) != weight.shapes[0]:
            raise ValueError(
                f"model parameter {weight.megatron} has shape {tuple(target.shape)}; the "
                f"configuration says {weight.shapes[0]}"
            )
        source = sources[weight.native[0]]
        checkpoint.copy_into(target, source.stored.name, start=source.row)
        return
    padded = _padded_size(weight, target.shape, tensor_parallel)
    runs = shard_runs(weight, tensor_parallel, rank, padded)
    if covered(runs) < target.shape[weight.split]:
        target.zero_()
    for run in runs:
        source = sources[weight.native[run.part]]
        # Stacked originals are split along dimension 0, which is where `source.row` counts.
        checkpoint.copy_into(
            target.narrow(weight.split, run.at, run.length),
            source.stored.name,
            dim=weight.split,
            start=run.start + source.row,
        )


def load_hf(model: "InternVL", folder: Path | str) -> Report:
    """Fill this rank's part of a Megatron InternVL from a folder of safetensors.

    Every rank calls it and reads only the rows and columns that it holds; nothing is communicated.
    The checkpoint may have original or native names, in one file or in shards. Values are converted
    to the parameters' dtype; padded heads and vocabulary rows become zero.

    Args:
        model: in any tensor and pipeline layout, unwrapped. The checkpoint is checked against its
            `hf_config` as a whole, on every rank alike.
    Returns:
        The report; only its `ignored` holds anything.
    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen; all are listed, and no
            parameter was changed.
        ValueError: a file is missing or damaged, or the model has other parameters than its
            configuration.
    """
    from megatron.core import parallel_state

    world = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    table = {weight.megatron: weight for weight in weights(model.hf_config)}
    parameters = global_parameters(model)
    _require_known(parameters, table)
    with Checkpoint(folder) as checkpoint, torch.no_grad():
        sources, report = require_match(checkpoint, list(table.values()))
        for name, parameter in parameters.items():
            fill(
                parameter,
                table[name],
                sources,
                checkpoint,
                tensor_parallel=world,
                rank=rank,
            )
    return report


def _require_known(parameters: Mapping[str, object], table: Mapping[str, Weight]) -> None:
    if unknown := sorted(set(parameters) - set(table)):
        raise ValueError(
            f"the model has {len(unknown)} parameters that its configuration has not, "
            f"such as {unknown[0]}"
        )


@dataclass(frozen=True)
class _Shard:
    """One rank's part of a weight that lives on pipeline stage `stage`."""

    weight: Weight
    stage: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def export_hf(
    model: "InternVL",
    *,
    to_all: bool = True,
    bucket_bytes: int = BUCKET_BYTES,
    names: Container[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(HF-native parameter name, full tensor) of every weight of a Megatron InternVL.

    Collective over the tensor- and pipeline-parallel group of a data-parallel replica: its ranks
    must all iterate to the end. Every rank yields the same names in the same order, those of
    `native_shapes(model.hf_config)`. Tensors are on the model's device and in its dtype, with heads
    and vocabulary unpadded, and bit for bit what `load_hf` would put back; they are the caller's
    until the next one is asked for (clone what you keep).

    Args:
        to_all: yield on every rank; otherwise on tensor rank 0 of pipeline stage 0 only, and
            nothing on the others, which still have to iterate.
        bucket_bytes: weights are sent together up to this many bytes of whole tensors. Beside the
            weights, a rank needs about twice the larger of this and the largest weight.
        names: HF-native names to yield, the same on the ranks of the replica; None for all.
    Raises:
        ValueError: the model has other parameters than its configuration.
    """
    from megatron.core import parallel_state as state

    world = state.get_tensor_model_parallel_world_size()
    here = state.get_pipeline_model_parallel_rank()
    wanted = to_all or (here == 0 and state.get_tensor_model_parallel_rank() == 0)
    parameters = global_parameters(model)
    shards = _where(parameters, model.hf_config)
    if names is not None:
        shards = [s for s in shards if any(name in names for name in s.weight.native)]
    device = next(model.parameters()).device
    for bucket in _buckets(shards, bucket_bytes // world):
        stage, dtype = bucket[0].stage, bucket[0].dtype
        local = torch.empty(sum(s.shape.numel() for s in bucket), dtype=dtype, device=device)
        if here == stage:
            held = [parameters[shard.weight.megatron].detach().flatten() for shard in bucket]
            torch.cat(held, out=local)
        pipeline = state.get_pipeline_model_parallel_group()
        dist.broadcast(local, dist.get_global_rank(pipeline, stage), group=pipeline)
        everyone = local
        if world > 1:
            everyone = local.new_empty(world * local.numel())
            group = state.get_tensor_model_parallel_group()
            _all_gather(everyone, local, group=group)
        if wanted:
            for name, tensor in _unpack(bucket, everyone.view(world, -1)):
                if names is None or name in names:
                    yield name, tensor


def _where(parameters: Mapping[str, nn.Parameter], config: InternVLConfig) -> list[_Shard]:
    """Every exported weight with the stage that holds it, in the table's order, on all ranks."""
    from megatron.core import parallel_state

    table = {weight.megatron: weight for weight in weights(config)}
    _require_known(parameters, table)
    mine = {name: (tuple(p.shape), str(p.dtype)) for name, p in parameters.items()}
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[dict[str, tuple[tuple[int, ...], str]]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(stages, mine, group=group)
    shards = []
    for name, weight in table.items():
        if weight.tied:
            continue
        stage = next((index for index, held in enumerate(stages) if name in held), None)
        if stage is None:
            raise ValueError(f"no pipeline stage of the model has {name}")
        shape, dtype = stages[stage][name]
        kind = getattr(torch, dtype.removeprefix("torch."))
        shards.append(_Shard(weight, stage, torch.Size(shape), kind))
    return shards


def _buckets(shards: Sequence[_Shard], limit: int) -> Iterator[list[_Shard]]:
    """Neighbors of one stage and dtype, together at most `limit` bytes, or one that is larger."""
    bucket: list[_Shard] = []
    for shard in shards:
        fits = sum(other.bytes for other in bucket) + shard.bytes <= limit
        same = not bucket or (shard.stage, shard.dtype) == (bucket[0].stage, bucket[0].dtype)
        if bucket and not (fits and same):
            yield bucket
            bucket = []
        bucket.append(shard)
    if bucket:
        yield bucket


def _unpack(bucket: Sequence[_Shard], everyone: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Native tensors of a bucket; `everyone` [ranks, elements] holds each rank's shards in turn."""
    at = 0
    for shard in bucket:
        ranks = everyone[:, at : at + shard.shape.numel()].unflatten(1, shard.shape)
        at += shard.shape.numel()
        yield from restore(shard.weight, ranks)


def restore(weight: Weight, ranks: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Native names and tensors of one weight from all its shards, stacked in dimension 0.

    Inverse of `fill` over the ranks.
    """
    if weight.split is None:
        yield weight.native[0], ranks[0]
        return
    world, split = len(ranks), weight.split
    padded = _padded_size(weight, ranks.shape[1:], world)
    parts = [ranks.new_empty(shape) for shape in weight.shapes]
    for rank, shard in enumerate(ranks):
        for run in shard_runs(weight, world, rank, padded):
            target = parts[run.part].narrow(split, run.start, run.length)
            target.copy_(shard.narrow(split, run.at, run.length))
    yield from zip(weight.native, parts, strict=True)
