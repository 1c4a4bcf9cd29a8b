"""Sizes of the tiles and chunks in which logits are computed.

Sizes are chosen by bytes, never by how many rows there are. They depend on free memory only in
powers of two: the shape of a product, and with it the last bits of its result, must not change
with every allocation of the process.
"""

from collections.abc import Iterator

import torch

from r1v3.kernels.linear.head import TiledHead

# Whole rows of logits and their gradient, for the one-pass loss: on the CPU 96 rows of 151,936.
# On a GPU a product of fewer than about a thousand rows is bound by reading the weight, and every
# chunk reads it twice and its float32 gradient once, and writes that: of 152,064 x 5,120 numbers,
# 9.3 GB, as much as the logits of 3,400 rows. A shard of a group is narrow.
CPU_WORKSPACE = 56 * 2**20
SMALLEST_DEVICE_WORKSPACE = 160 * 2**20
DEVICE_WORKSPACE = 2**32
GROUP_WORKSPACE = 2**30
ROW_ALIGNMENT = 128
# Tiles of logits, cut into columns as well: rows of one product, and bytes.
CPU_BLOCK_ROWS = 1024
CPU_TILE = 16 * 2**20
DEVICE_BLOCK_ROWS = 8192
DEVICE_TILE = 288 * 2**20
# Columns of the weight as operands: few enough to stay in a processor's cache, and enough for a
# full-speed product.
TILE_BYTES = 8 * 2**20
COLUMN_ALIGNMENT = 128


def blocks(n: int, size: int) -> Iterator[slice]:
    """n rows in order, at most `size` at a time."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def tile_shape(head: TiledHead, n: int) -> tuple[int, int]:
    """Rows and columns of the tiles of n rows of logits."""
    rows = DEVICE_BLOCK_ROWS if head.weight.is_cuda else CPU_BLOCK_ROWS
    if head.row_tile:
        rows = max(rows // head.row_tile, 1) * head.row_tile
    # With a row_tile, the shape must not depend on how many rows there are.
    return rows, tile_columns(head, rows if head.row_tile else min(rows, n))


def tile_columns(head: TiledHead, rows: int) -> int:
    """Columns of a tile of so many rows of logits."""
    cuda = head.weight.is_cuda
    logit = head.result.itemsize + (head.operand.itemsize if head.operand != head.result else 0)
    columns = (DEVICE_TILE if cuda else CPU_TILE) // (logit * max(rows, ROW_ALIGNMENT))
    operands = TILE_BYTES // max(head.weight.shape[1] * head.operand.itemsize, 1)
    return _aligned(columns) if cuda else min(_aligned(columns), _aligned(operands))


def chunk_rows(head: TiledHead, n: int, *, sums: bool) -> int:
    """Whole rows of n at a time, in chunks of nearly equal size.

    Args:
        sums: several chunks would need a float32 [V, H] to add up a 16-bit weight's gradient. Its
            memory is then better spent on rows, if that makes them one chunk.
    """
    row = head.result.itemsize
    if head.whole_rows and head.operand != head.result:
        row += head.operand.itemsize  # the gradient of whole rows is copied to operands
    # The ranks of a group must choose alike, so free memory does not count.
    workspace = _workspace(head.weight.device, shared=bool(head.group))
    most = workspace // (row * max(head.common_width(), 1))
    if sums and n <= most + head.weight.shape[1] * head.result.itemsize // row:
        return max(n, 1)
    unit = head.row_tile or ROW_ALIGNMENT
    most = most // unit * unit or head.row_tile or max(most, 1)
    even = -(-n // max(-(-n // most), 1))
    return max(min(-(-even // unit) * unit, most), 1)


def _workspace(device: torch.device, *, shared: bool) -> int:
    if device.type != "cuda":
        return CPU_WORKSPACE
    if shared:
        return GROUP_WORKSPACE
    size = DEVICE_WORKSPACE
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    while size > free // 2 and size > SMALLEST_DEVICE_WORKSPACE:
        size //= 2
    return size


def _aligned(columns: int) -> int:
    """The largest multiple of `COLUMN_ALIGNMENT` up to columns, at least one."""
    return max(columns // COLUMN_ALIGNMENT, 1) * COLUMN_ALIGNMENT
