"""Triton kernels over rows of logits: statistics of parts or shards, and their merge.

A row is cut into parts of 40 KiB, one program each, which reads its part four blocks at a time and
asks for the next four while it sums these. A shard of 18,976 logits is one part, 17 rows of a whole
vocabulary fill an H100, and how a row is summed never depends on how many rows there are. Between
the first load and the end of a part no thread waits for another: every thread has a state of its
own, raised once for 32 logits, and states are reduced once.

V = 151,674 makes most rows start off a 16-byte boundary: each row skips to the first aligned
element, streams unmasked vectors from there, and the last part collects the skipped head and the
tail. The order of summation therefore depends on a row's address modulo 16 bytes, and on nothing
else. (To sum in an order counted from the row's start, every thread would have to read across two
of the aligned vectors: twice the load instructions, for rows that are aligned alike anyway where V
is a multiple of 8.)

Numbers that change from batch to batch are not specialized on: no batch waits for a compilation.
"""
# mypy: allow-untyped-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1v3.kernels import devices

# A 16-byte vector per thread of 4 warps, and twenty such blocks per program: what a thread does
# once, before its loads and when states are reduced, is shared by 160 logits, and registers are few
# enough for ten programs per multiprocessor.
VECTORS = 128
PART_BLOCKS = 20
WARPS = 4
MERGE_ELEMENTS = 512
LOWEST = tl.constexpr(-3.4028234e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# exp2 of this is 0, and 0 times it is 0: what -inf becomes, so that 0 * -inf never appears.
FLOOR = tl.constexpr(-1.0e4)
HIGHEST = tl.constexpr(3.4028234e38)


@triton.jit
def _distance(x, top, scale):
    return tl.maximum((x - top) * scale, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_scale(unit: tl.constexpr, temperature):
    """unit / temperature of a row's own: the largest number at 0, NaN for no temperature.

    The largest number sends every distance but 0 below `FLOOR`.
    """
    # The interpreter divides no number that is known at compilation.
    scale = tl.minimum(tl.full([], unit, tl.float32) / tl.abs(temperature), HIGHEST)
    scale = tl.where(temperature >= 0, scale, float("nan"))
    return tl.where(temperature < float("inf"), scale, float("nan"))


@triton.jit
def _raised(m, s, w, top, scale):
    """(max, sum e, sum e d) for the maximum `top` instead of m, d = (x - max) * scale."""
    gap = _distance(m, top, scale)
    shrink = tl.exp2(gap)
    return top, shrink * s, shrink * (w + gap * s)


@triton.jit
def _added(x, m, s, w, scale):
    """The same with x [*, k], of which nothing is above m."""
    d = _distance(x, m[:, None], scale)
    e = tl.exp2(d)
    return m, s + tl.sum(e, axis=1), w + tl.sum(e * d, axis=1)


@triton.jit
def _accumulate(x, m, s, w, scale):
    m, s, w = _raised(m, s, w, tl.maximum(m, tl.max(x, axis=1)), scale)
    return _added(x, m, s, w, scale)


@triton.jit
def _accumulate_four(x0, x1, x2, x3, m, s, w, scale):
    x0, x1, x2, x3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
    low = tl.maximum(tl.max(x0, axis=1), tl.max(x1, axis=1))
    high = tl.maximum(tl.max(x2, axis=1), tl.max(x3, axis=1))
    m, s, w = _raised(m, s, w, tl.maximum(m, tl.maximum(low, high)), scale)
    m, s, w = _added(x0, m, s, w, scale)
    m, s, w = _added(x1, m, s, w, scale)
    m, s, w = _added(x2, m, s, w, scale)
    return _added(x3, m, s, w, scale)


@triton.jit
def row_offset(row, base, inner, stride_outer, stride_inner):
    return base + (row // inner) * stride_outer + (row % inner) * stride_inner


@triton.jit
def _stream(pointers, inside):
    return tl.load(pointers, mask=inside, other=-float("inf"), eviction_policy="evict_first")


@triton.jit
def _four_blocks(pointers, block, end, BLOCK: tl.constexpr):
    """Blocks from this one on, -inf from `end` on; `pointers` are those of block 0."""
    pointers += block * BLOCK
    return (
        _stream(pointers, block < end),
        _stream(pointers + BLOCK, block + 1 < end),
        _stream(pointers + 2 * BLOCK, block + 2 < end),
        _stream(pointers + 3 * BLOCK, block + 3 < end),
    )


@triton.jit(do_not_specialize=["n_rows", "inner", "stride_outer"])
def _row_statistics_kernel(
    x_ptr,
    rows_ptr,
    ids_ptr,
    keep_ptr,
    shard_ptr,
    temperatures_ptr,
    stats_ptr,
    n_rows: tl.int64,
    base: tl.int64,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    vocab: tl.int64,
    temperature: tl.float32,
    parts,
    HAS_ROWS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_SHARD: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    ALIGN: tl.constexpr,
    VECTORS: tl.constexpr,
    PART_BLOCKS: tl.constexpr,
):
    BLOCK: tl.constexpr = VECTORS * ALIGN
    selected = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = selected
    if HAS_ROWS:
        row = tl.load(rows_ptr + selected).to(tl.int64)
    first_id = tl.zeros([], tl.int64)
    if HAS_SHARD:
        first_id = tl.load(shard_ptr)
        vocab = tl.minimum(vocab, tl.maximum(tl.load(shard_ptr + 1) - first_id, 0))
    if HAS_KEEP:
        vocab = tl.where(tl.load(keep_ptr + selected) != 0, vocab, 0)
    offset = row_offset(row, base, inner, stride_outer, stride_inner)
    head = tl.minimum((ALIGN - offset % ALIGN) % ALIGN, vocab)
    full = ((vocab - head) // BLOCK).to(tl.int32)
    scale = LOG2_E / temperature
    if HAS_TEMPERATURES:
        own = tl.load(temperatures_ptr + selected).to(tl.float32)
        scale = row_scale(LOG2_E, own)
    lanes = tl.arange(0, VECTORS)[:, None] * ALIGN + tl.arange(0, ALIGN)[None, :]
    m = tl.full([VECTORS], LOWEST, tl.float32)
    s = tl.zeros([VECTORS], tl.float32)
    w = tl.zeros([VECTORS], tl.float32)
    first = part * PART_BLOCKS
    end = tl.minimum(first + PART_BLOCKS, full)
    row_ptr = x_ptr + tl.multiple_of(offset + head, ALIGN) + lanes
    x0, x1, x2, x3 = _four_blocks(row_ptr, first, end, BLOCK)
    for block in range(first, end, 4):
        y0, y1, y2, y3 = _four_blocks(row_ptr, block + 4, end, BLOCK)
        m, s, w = _accumulate_four(x0, x1, x2, x3, m, s, w, scale)
        x0, x1, x2, x3 = y0, y1, y2, y3
    if part == parts - 1:
        done = full.to(tl.int64) * BLOCK
        for rest in range(0, vocab - done, BLOCK):
            r = rest + lanes
            column = tl.where(r < head, r, done + r)
            x = tl.load(x_ptr + offset + column, mask=r < vocab - done, other=-float("inf"))
            m, s, w = _accumulate(x.to(tl.float32), m, s, w, scale)
    target = tl.zeros([], tl.float32)
    if HAS_IDS:
        token = tl.load(ids_ptr + selected).to(tl.int64) - first_id
        here = (part == 0) & (token >= 0) & (token < vocab)
        target = tl.load(x_ptr + offset + token, mask=here, other=0.0).to(tl.float32)
    top = tl.max(m, axis=0)
    gap = _distance(m, top, scale)
    shrink = tl.exp2(gap)
    out = stats_ptr + (part * n_rows + selected) * 4
    tl.store(out, top)
    tl.store(out + 1, tl.sum(shrink * s, axis=0))
    tl.store(out + 2, tl.sum(shrink * (w + gap * s), axis=0) * LN_2)
    tl.store(out + 3, target)


@triton.jit(do_not_specialize=["n_rows"])
def _merge_kernel(
    stats_ptr,
    ids_ptr,
    shard_ptr,
    temperatures_ptr,
    merged_ptr,
    logprobs_ptr,
    entropy_ptr,
    saved_ptr,
    n_rows: tl.int64,
    vocab: tl.int64,
    temperature: tl.float32,
    parts,
    FINAL: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_SHARD: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n_rows
    part = tl.arange(0, PARTS)
    at = stats_ptr + (part[None, :] * n_rows + row[:, None]) * 4
    there = inside[:, None] & (part < parts)[None, :]
    part_m = tl.load(at, mask=there, other=LOWEST)
    part_s = tl.load(at + 1, mask=there, other=0.0)
    part_w = tl.load(at + 2, mask=there, other=0.0)
    t = tl.sum(tl.load(at + 3, mask=there, other=0.0), axis=1)
    m = tl.max(part_m, axis=1)
    if HAS_TEMPERATURES:
        own = tl.load(temperatures_ptr + row, mask=inside, other=1.0).to(tl.float32)
        gap = _distance(part_m, m[:, None], row_scale(1.0, own)[:, None])
    else:
        gap = _distance(part_m, m[:, None], 1.0 / temperature)
    shrink = tl.exp(gap)
    s = tl.sum(shrink * part_s, axis=1)
    w = tl.sum(shrink * (part_w + gap * part_s), axis=1)
    if FINAL:
        dead = s == 0
        log_s = tl.log(tl.where(dead, 1.0, s))
        entropy = tl.where(dead, 0.0, log_s - w / tl.where(dead, 1.0, s))
        tl.store(entropy_ptr + row, entropy, mask=inside)
        tl.store(saved_ptr + row * 3, tl.where(dead, -float("inf"), m), mask=inside)
        tl.store(saved_ptr + row * 3 + 1, log_s, mask=inside)
        tl.store(saved_ptr + row * 3 + 2, entropy, mask=inside)
        logprobs = tl.zeros([ROWS], tl.float32)
        if HAS_IDS:
            if HAS_SHARD:
                vocab = tl.load(shard_ptr + 1)
            token = tl.load(ids_ptr + row, mask=inside, other=0).to(tl.int64)
            if HAS_TEMPERATURES:
                greedy = tl.where(t < m, -float("inf"), t - m)
                logprobs = tl.where(own == 0, greedy, (t - m) / own) - log_s
                logprobs = tl.where(dead, -float("inf"), logprobs)
            else:
                logprobs = tl.where(dead, -float("inf"), (t - m) / temperature - log_s)
            logprobs = tl.where((token < 0) | (token >= vocab), float("nan"), logprobs)
            logprobs = tl.where(token == -100, 0.0, logprobs)
        tl.store(logprobs_ptr + row, logprobs, mask=inside)
    else:
        at = merged_ptr + row * 4
        tl.store(at, m, mask=inside)
        tl.store(at + 1, s, mask=inside)
        tl.store(at + 2, w, mask=inside)
        tl.store(at + 3, t, mask=inside)


class Layout:
    """Rows of [..., V] logits as the kernels address them, from a 16-byte aligned pointer."""

    def __init__(self, tensor: Tensor) -> None:
        view = tensor[None, None] if tensor.dim() == 1 else tensor
        view = view[None] if view.dim() == 2 else view
        assert view.dim() == 3
        self.inner = max(view.shape[1], 1)
        self.stride_outer, self.stride_inner = view.stride(0), view.stride(1)
        size = tensor.element_size()
        self.align = 16 // size
        skew = tensor.data_ptr() % 16 // size
        reachable = skew <= tensor.storage_offset() and tensor.numel() > 0
        self.base = skew if reachable else 0
        self.pointer = (
            tensor.as_strided((1,), (1,), tensor.storage_offset() - skew)
            if reachable and skew
            else tensor
        )

    def matches(self, other: "Layout") -> bool:
        """Whether every row starts at the same offset modulo 16 bytes in both."""
        return all(
            (a - b) % self.align == 0
            for a, b in (
                (self.base, other.base),
                (self.stride_inner, other.stride_inner),
                (self.stride_outer, other.stride_outer),
            )
        )


def as_rows(logits: Tensor) -> Tensor:
    """logits as 1, 2 or 3 dimensions, contiguous in the last: a view wherever one exists."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    return logits if logits.dim() <= 3 else logits.reshape(-1, *logits.shape[-2:])


def _flags(keep: Tensor | None) -> Tensor | None:
    return None if keep is None else keep.view(torch.uint8)


def temperature_arguments(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """The number of all rows and no tensor, or a tensor [n] of one for each row."""
    return (1.0, temperature) if isinstance(temperature, Tensor) else (float(temperature), None)


def _merge_grid(stats: Tensor) -> tuple[int, int, int]:
    """Programs, and the shape [rows, parts] that each one merges."""
    parts = triton.next_power_of_2(stats.shape[0])
    rows = max(1, MERGE_ELEMENTS // parts)
    return triton.cdiv(stats.shape[1], rows), rows, parts


def row_statistics(
    logits: Tensor,
    token_ids: Tensor | None,
    rows: Tensor | None,
    temperature: float | Tensor,
    vocab: int,
    shard: Tensor | None,
    keep: Tensor | None = None,
) -> Tensor:
    """Statistics [parts, n, 4] of the selected rows; m and t in logits, not divided by T.

    Args:
        logits: from `as_rows`; token_ids: [n] global ids; rows: int64 [n] or None.
        temperature: a number, or [n] with one for each selected row.
        vocab: columns to read; shard: int64 [2] on the device, (first id, true vocabulary), which
            bounds them further, or None.
        keep: bool [n] or None; a row that is not kept is not read: it counts as all -inf.
    """
    layout = Layout(logits)
    n = logits.shape[:-1].numel() if rows is None else rows.shape[0]
    parts = max(1, triton.cdiv(vocab // (VECTORS * layout.align), PART_BLOCKS))
    stats = torch.empty(parts, n, 4, dtype=torch.float32, device=logits.device)
    number, temperatures = temperature_arguments(temperature)
    if n:
        with devices.launching_on(logits):
            _row_statistics_kernel[(n, parts)](
                layout.pointer, rows, token_ids, _flags(keep), shard, temperatures, stats, n,
                layout.base, layout.inner, layout.stride_outer, layout.stride_inner, vocab, number,
                parts, HAS_ROWS=rows is not None, HAS_IDS=token_ids is not None,
                HAS_KEEP=keep is not None, HAS_SHARD=shard is not None,
                HAS_TEMPERATURES=temperatures is not None, ALIGN=layout.align, VECTORS=VECTORS,
                PART_BLOCKS=PART_BLOCKS, num_warps=WARPS,
            )  # fmt: skip
    return stats


def merge_parts(stats: Tensor, temperature: float | Tensor) -> Tensor:
    """[parts, n, 4] -> [n, 4], in an order that depends on the number of parts alone."""
    n = stats.shape[1]
    merged = torch.empty(n, 4, dtype=torch.float32, device=stats.device)
    number, temperatures = temperature_arguments(temperature)
    if n:
        programs, rows, parts = _merge_grid(stats)
        with devices.launching_on(stats):
            _merge_kernel[(programs,)](
                stats, None, None, temperatures, merged, None, None, None, n, 0, number,
                stats.shape[0], FINAL=False, HAS_IDS=False, HAS_SHARD=False,
                HAS_TEMPERATURES=temperatures is not None, PARTS=parts, ROWS=rows,
            )  # fmt: skip
    return merged


def finalize(
    stats: Tensor,
    token_ids: Tensor | None,
    temperature: float | Tensor,
    vocab: int,
    shard: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[parts, n, 4] -> logprobs [n], entropy [n], saved [n, 3] = (m, log s, entropy).

    A label outside the vocabulary gives NaN, -100 gives 0.
    """
    n = stats.shape[1]
    logprobs = torch.empty(n, dtype=torch.float32, device=stats.device)
    entropy, saved = torch.empty_like(logprobs), stats.new_empty(n, 3)
    number, temperatures = temperature_arguments(temperature)
    if n:
        programs, rows, parts = _merge_grid(stats)
        with devices.launching_on(stats):
            _merge_kernel[(programs,)](
                stats, token_ids, shard, temperatures, None, logprobs, entropy, saved, n, vocab,
                number, stats.shape[0], FINAL=True, HAS_IDS=token_ids is not None,
                HAS_SHARD=shard is not None, HAS_TEMPERATURES=temperatures is not None,
                PARTS=parts, ROWS=rows,
            )  # fmt: skip
    return logprobs, entropy, saved
