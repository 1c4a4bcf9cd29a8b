"""Softmax statistics of hidden @ weight.T in one persistent Triton kernel, for an H100.

A tile of logits is complete in the registers of one program, and leaves them as 16 bytes per row:
float32 (max, sum, weighted sum, target logit), as in `logits_statistics`. Logits are never
stored and never rounded to 16 bits; they are as exact as the sums of the tensor cores. Every tile
has its own statistics, so a row's result depends on that row, the weight and the bias alone: not
on other rows, how many there are, which program computes a tile or how many programs run. That is
as far as the tensor cores treat the 64 rows of an instruction alike.

What it costs, for H = 5,120, a tile of 128 x 256 logits and a multiprocessor that multiplies and
adds 2,048 pairs of 16-bit numbers per clock:

    products     80 steps of 128 x 256 x 64             81,920 clocks
    from L2      80 x 48 KiB                            85 FLOP per byte
    epilogue     10 instructions per logit, 8 warps     about 2,600 clocks to issue, 3 %
    stores       16 bytes per 256 logits                 1/16 byte per logit, where tiles of
                                                        float32 logits move 8

- 128 x 256: the widest WGMMA, 64 x 256 x 16, twice. 128 x 128 would take a third more bytes from
  L2, and both it and 256 x 128 a fifth more from shared memory. The accumulator is 128 of at most
  255 registers per thread, so one tile per multiprocessor is all that fits and nothing runs
  during its epilogue. Two of 128 x 128 would fit and hide each other's, 3 % against those bytes.
  Multiprocessors do not share a tile of the weight by multicast: Triton 3.7 does not compile
  this for clusters.
- 64 columns of H at a time, one swizzled 128-byte row of TMA; 4 stages of 48 KiB are 192 of 227
  KiB of shared memory.
- One loop over the steps of all tiles of a program, so that the first three steps of the next
  tile are loaded during the epilogue of this one.
- Sixteen tiles of rows, 2,048 of them and 21 MB, stay in L2 while the weight passes by once.
- Few rows are bound by reading the weight, which is cut into columns for every multiprocessor:
  593 tiles of 256 for V = 151,674.

Triton must keep one WGMMA in flight, not spill, and load ahead; the tests read the machine code,
because small changes here undo it. Compiled for a B200 this kernel spills: it is not for that.
"""
# mypy: allow-untyped-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from r1v3.kernels import devices
from r1v3.kernels.triton.logits_statistics import LN_2, LOG2_E, LOWEST, _accumulate, merge_parts

ROWS, COLUMNS, DEPTH = 128, 256, 64
STAGES = 4
WARPS = 8
GROUP = 16
# Statistics of the tiles of one launch take 78 MB for V = 151,674.
LAUNCH_ROWS = 8192
CAPABILITY = 9, 0
# Programs in Triton's interpreter, which runs one after the other.
INTERPRETED_PROGRAMS = 3


@triton.jit
def _tile_place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles go through all columns together."""
    in_group = GROUP * column_tiles
    first = tile // in_group * GROUP
    rows = tl.minimum(row_tiles - first, GROUP)
    return first + tile % in_group % rows, tile % in_group // rows


@triton.jit
def _store_statistics(
    x,
    row,
    column,
    ids_ptr,
    first_id,
    bound,
    stats_ptr,
    n_rows,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(max, sum, weighted sum, target) of the tile of logits x that starts at row, column."""
    rows = row + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = rows < n_rows
    width = bound - column
    if width < COLUMNS:
        x = tl.where((columns < width)[None, :], x, -float("inf"))
    label = tl.load(ids_ptr + rows, mask=inside, other=-1).to(tl.int64) - first_id - column
    here = (label >= 0) & (label < tl.minimum(width, COLUMNS))
    label = tl.where(here, label, -1).to(tl.int32)
    target = tl.zeros([ROWS], tl.float32)
    if tl.max(label, axis=0) >= 0:
        target = tl.sum(tl.where(columns[None, :] == label[:, None], x, 0.0), axis=1)
    zero = tl.zeros([ROWS], tl.float32)
    m, s, w = _accumulate(x, tl.full([ROWS], LOWEST, tl.float32), zero, zero, scale)
    out = stats_ptr + ((column // COLUMNS).to(tl.int64) * n_rows + rows) * 4
    tl.store(out, m, mask=inside)
    tl.store(out + 1, s, mask=inside)
    tl.store(out + 2, w * LN_2, mask=inside)
    tl.store(out + 3, target, mask=inside)


@triton.jit(do_not_specialize=["n_rows", "vocab", "width", "programs"])
def _linear_statistics_kernel(
    hidden,
    weight,
    bias_ptr,
    ids_ptr,
    shard_ptr,
    stats_ptr,
    n_rows: tl.int32,
    vocab: tl.int32,
    width: tl.int32,
    temperature: tl.float32,
    nothing: tl.float32,
    programs: tl.int32,
    HAS_BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    row_tiles = tl.cdiv(n_rows, ROWS)
    column_tiles = tl.cdiv(vocab, COLUMNS)
    depth_steps = tl.cdiv(width, DEPTH)
    first_id = tl.load(shard_ptr)
    bound = tl.minimum(tl.maximum(tl.load(shard_ptr + 1) - first_id, 0), vocab).to(tl.int32)
    scale = LOG2_E / temperature
    tile = tl.program_id(0) - programs
    steps = tl.cdiv(row_tiles * column_tiles - tl.program_id(0), programs) * depth_steps
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    step = -1
    row = 0
    column = 0
    # Where the next loads are must not depend on the epilogue, or none of them is early.
    for _ in tl.range(0, steps, num_stages=STAGES):
        step = tl.where(step == depth_steps - 1, 0, step + 1)
        if step == 0:
            tile += programs
            row, column = _tile_place(tile, row_tiles, column_tiles, GROUP)
            row *= ROWS
            column *= COLUMNS
        a = hidden.load([row, step * DEPTH])
        b = weight.load([column, step * DEPTH])
        if INTERPRETED:
            # The interpreter multiplies the bits of bfloat16 as integers.
            a, b = a.to(tl.float32), b.to(tl.float32)
        x = tl.dot(a, b.T, x)
        if step == depth_steps - 1:
            if HAS_BIAS:
                columns = column + tl.arange(0, COLUMNS)
                bias = tl.load(bias_ptr + columns, mask=columns < vocab, other=0.0)
                logits = x + bias.to(tl.float32)[None, :]
            else:
                # Adds 0. If only a branch read the accumulator, ptxas would wait for each WGMMA.
                logits = x + nothing
            _store_statistics(
                logits, row, column, ids_ptr, first_id, bound, stats_ptr, n_rows, scale,
                ROWS, COLUMNS,
            )  # fmt: skip
            x = tl.zeros([ROWS, COLUMNS], tl.float32)


def supports(hidden: Tensor, weight: Tensor, temperature: float) -> bool:
    """Whether `row_statistics` takes them.

    It does on an H100, for bfloat16 or float16 in both, a temperature above 0, and rows that TMA
    loads: dense, and starting on multiples of 16 bytes.
    """
    return (
        devices.runs_triton(weight)
        and weight.dtype == hidden.dtype != torch.float32
        and temperature > 0
        and _tma_loads(hidden)
        and _tma_loads(weight)
        and (not weight.is_cuda or torch.cuda.get_device_capability(weight.device) == CAPABILITY)
    )


def _tma_loads(matrix: Tensor) -> bool:
    rows, columns = matrix.shape
    return (
        rows > 0
        and columns > 0
        and matrix.stride(1) == 1
        and matrix.stride(0) >= columns
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def row_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float,
    bounds: Tensor,
) -> Tensor:
    """Statistics [n, 4] of the rows hidden @ weight.T + bias: what `logits_statistics` merges.

    Allocates 16 bytes per row and tile of 256 columns, for `LAUNCH_ROWS` rows at a time.

    Args:
        hidden: [n, H]; weight: [V, H]: `supports` must hold for them.
        bias: [V] or None.
        token_ids: [n] global ids; one that is not among this shard's columns gives target 0.
        bounds: int64 [2] on the device, (id of the first row of weight, true vocabulary size).
    """
    parts = [
        merge_parts(_tile_statistics(rows, weight, bias, ids, temperature, bounds), temperature)
        for rows, ids in zip(hidden.split(LAUNCH_ROWS), token_ids.split(LAUNCH_ROWS), strict=True)
    ]
    return torch.cat(parts)


def _tile_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float,
    bounds: Tensor,
) -> Tensor:
    """[tiles of columns, n, 4]."""
    n, vocab = hidden.shape[0], weight.shape[0]
    columns = triton.cdiv(vocab, COLUMNS)
    stats = torch.empty(columns, n, 4, dtype=torch.float32, device=hidden.device)
    programs = min(_most_programs(hidden), triton.cdiv(n, ROWS) * columns)
    with devices.launching_on(hidden):
        _linear_statistics_kernel[(programs,)](
            TensorDescriptor.from_tensor(hidden, [ROWS, DEPTH]),
            TensorDescriptor.from_tensor(weight, [COLUMNS, DEPTH]),
            bias, token_ids, bounds, stats, n, vocab, hidden.shape[1], float(temperature), 0.0,
            programs, HAS_BIAS=bias is not None, INTERPRETED=not hidden.is_cuda, ROWS=ROWS,
            COLUMNS=COLUMNS, DEPTH=DEPTH, GROUP=GROUP, STAGES=STAGES, num_warps=WARPS,
        )  # fmt: skip
    return stats


def _most_programs(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
