"""Context parallelism: the rows of a packed micro-batch, divided among the ranks that share it.

Every segment is cut into 2 * C chunks of its rows, and rank r of C takes chunks r and
2 * C - 1 - r: an early chunk sees few keys and a late one many, so that all ranks have about the
same work. Each rank runs its rows through all layers, and only attention needs the others': keys
and values are gathered (`attention.PackedLayout`), and a chunk is then a segment like any other,
whose last query is at its last key. Nothing of the softmax is merged afterwards, as in a ring.

With grouped queries keys and values are few: of the 38B on 8 tensor-parallel ranks 512 bytes a
token and layer in bfloat16. Of 65,536 tokens over 2 ranks, a rank receives 17 MB for a layer's
forward, as much where it is recomputed, and sends 34 MB of float32 gradients. The layer's
operations are 2.7e13 with recomputation and backward: 67 ms at 400 TFLOP/s, beside 1.4 ms for
68 MB at 50 GB/s.
"""

from dataclasses import dataclass, fields
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from r1v3.model.megatron.packing import Packed


@dataclass(frozen=True)
class ContextPart(Packed):
    """The rows of one context-parallel rank, T of them on every rank.

    `key_index` counts the rows of all ranks, one rank's after the other's. Of the tokens that
    count, those are here whose predicting row is. `pixel_values` holds this rank's share of the
    tiles, filled up with empty ones so that all ranks have as many. `image_tokens`, `longest` and
    `shape` are those of the whole micro-batch.

    Attributes:
        feature_index: int64 [slots], the feature of all tiles' that goes into each image slot.
        tiles: of the whole micro-batch.
    """

    feature_index: Tensor
    tiles: int


def context_part(packed: Packed, rank: int, ranks: int, *, multiple_of: int = 1) -> ContextPart:
    """Return the part of rank `rank` of `ranks`.

    Args:
        packed: without padding, on the CPU.
        multiple_of: T is padded up to a multiple of it by tokens that form a last segment of their
            own.
    """
    chunks = _chunks([queries for queries, _ in packed.segments], ranks)
    none = torch.arange(0)  # the whole of a rank, where there are fewer rows than ranks
    rows = [torch.cat([none, *(torch.arange(a, b) for _, a, b in held)]) for held in chunks]
    length = -(-max(map(len, rows)) // multiple_of) * multiple_of
    place = torch.empty(len(packed.input_ids), dtype=torch.int64)
    for other, held in enumerate(rows):
        place[held] = other * length + torch.arange(len(held))
    own, first = rows[rank], rank * length
    padding = length - len(own)
    segments, keys = [], []
    for segment, a, b in chunks[rank]:
        # Its rows end `left` before the segment's last row and key.
        left = int(packed.query_starts[segment + 1]) - b
        start, stop = packed.key_starts[segment : segment + 2].tolist()
        segments.append((b - a, stop - left - start))
        keys.append(place[packed.key_index[start : stop - left]])
    if padding:
        segments.append((padding, padding))
        keys.append(torch.arange(first + len(own), first + length))
    slots = packed.image_slots[own]
    predictors = place[packed.hidden_rows] - first
    here = (predictors >= 0) & (predictors < length)
    kept = {field.name: getattr(packed, field.name) for field in fields(Packed)}
    tiles = 0 if packed.pixel_values is None else len(packed.pixel_values)
    return ContextPart(
        **kept
        | {
            "input_ids": _padded(packed.input_ids[own], padding),
            "position_ids": _padded(packed.position_ids[own], padding),
            "query_starts": _starts([queries for queries, _ in segments]),
            "key_starts": _starts([keys for _, keys in segments]),
            "key_index": torch.cat(keys),
            "image_slots": _padded(slots, padding),
            "pixel_values": _own_tiles(packed.pixel_values, rank, ranks),
            "hidden_rows": predictors[here],
            "token_ids": packed.token_ids[here],
            "places": packed.places[here],
            "segments": tuple(segments),
        },
        feature_index=(packed.image_slots.cumsum(0) - 1)[own][slots],
        tiles=tiles,
    )


def _chunks(lengths: list[int], ranks: int) -> list[list[tuple[int, int, int]]]:
    """(segment, first row, end) of the chunks of each rank, without those that have no row.

    Rows that are left when a segment is divided evenly go to the next chunks in turn, over all
    segments, so that short segments do not all fill the same rank.
    """
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    count, turn, first = 2 * ranks, 0, 0
    for segment, length in enumerate(lengths):
        each, left = divmod(length, count)
        sizes = [each + ((chunk - turn) % count < left) for chunk in range(count)]
        turn = (turn + left) % count
        for chunk, (a, b) in enumerate(pairwise(accumulate(sizes, initial=first))):
            if a < b:
                found[min(chunk, count - 1 - chunk)].append((segment, a, b))
        first += length
    return found


def _own_tiles(pixel_values: Tensor | None, rank: int, ranks: int) -> Tensor | None:
    """This rank's share of the tiles; the last ranks' is filled up with zeros."""
    if pixel_values is None:
        return None
    each = -(-len(pixel_values) // ranks)
    share = pixel_values[rank * each : (rank + 1) * each]
    return torch.cat([share, share.new_zeros(each - len(share), *share.shape[1:])])


def _padded(values: Tensor, padding: int) -> Tensor:
    return torch.cat([values, values.new_zeros(padding)])


def _starts(lengths: list[int]) -> Tensor:
    """int32 [0, l0, l0 + l1, ...]."""
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
