"""A rank's part of the distributed optimizer's state, as blocks of the whole model's tensors.

megatron-core shards main parameters and moments over the data-parallel ranks by position in a flat
buffer: a rank holds the elements from one position to another of some parameters. As blocks with a
place in the whole tensor, every layout can read them, and nothing has to be gathered to write them.
The names are those of megatron-core's `fully_reshardable` format, which stores whole tensors.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

Shape = tuple[int, ...]


def blocks(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """(offset, shape) of the fewest blocks that are elements `start` to `stop` of a tensor.

    The tensor is counted row by row; the blocks come in that order, each one contiguous.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # both within one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * row < stop:
        yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Shape, row: int, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    for offset, size in blocks(shape[1:], start, stop):
        yield (row, *offset), (1, *size)


def optimizer_blocks(
    optimizer: DistributedOptimizer, weights: Mapping[str, Any]
) -> dict[int, ShardedTensor]:
    """This rank's main parameters and moments, as views: what is loaded into them is loaded.

    Args:
        weights: the model's `sharded_state_dict`, which says where its parameters belong.
    """
    places = {one.data: one for one in nested_values(weights) if hasattr(one, "data")}
    found: list[ShardedTensor] = []
    for parameter in optimizer.model_param_gbuf_map:
        span = optimizer._get_model_param_range_map(parameter)["param"]
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        for name, state in states.items():
            if name != "step":
                found += _blocks_of(places[parameter], parameter, state.detach(), name, span.start)
    return dict(enumerate(found))


def _blocks_of(
    place: ShardedTensor | ShardedTensorFactory,
    parameter: nn.Parameter,
    state: Tensor,
    name: str,
    first: int,
) -> Iterator[ShardedTensor]:
    """Blocks of a flat state tensor that belongs to the parameter's elements from `first` on."""
    built = place.build() if isinstance(place, ShardedTensorFactory) else place
    for piece in nested_values({"pieces": built}):
        begin = piece.data.storage_offset() - parameter.storage_offset()
        start = max(0, first - begin)
        stop = min(piece.data.numel(), first + state.numel() - begin)
        at, lead = begin + start - first, piece.prepend_axis_num
        for offset, size in blocks(tuple(piece.data.shape), start, stop):
            count = math.prod(size)
            values = state[at : at + count].view((1,) * lead + size)
            at += count
            yield ShardedTensor(
                key=f"optimizer.state.{name}.{piece.key}",
                data=values,
                dtype=values.dtype,
                local_shape=tuple(values.shape),
                global_shape=piece.global_shape,
                global_offset=tuple(
                    whole + own
                    for whole, own in zip(piece.global_offset, (0,) * lead + offset, strict=True)
                ),
                axis_fragmentations=None,
                # Replicas over data-parallel ranks hold other blocks.
                replica_id=(*piece.replica_id[:2], 0),
            )
