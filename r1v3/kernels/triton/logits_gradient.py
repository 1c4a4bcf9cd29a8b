"""Triton kernel of the gradient with respect to the logits: one read, one write.

The cut into parts and the walk from the first 16-byte boundary are as in `logits_statistics`; a row
without upstream gradient is written without being read.
"""
# mypy: allow-untyped-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1v3.kernels import devices
from r1v3.kernels.row_labels import RowLabels
from r1v3.kernels.triton.logits_statistics import (
    FLOOR,
    LN_2,
    LOG2_E,
    Layout,
    row_offset,
    row_scale,
    temperature_arguments,
)

# Two 16-byte vectors per thread of 8 warps, and two such blocks per program.
VECTORS = 512
PART_BLOCKS = 2
WARPS = 8


@triton.jit
def _stream(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _gradient(
    x, column, token, m, log2_s, entropy, g_logp, g_entropy, scale, inverse_softcap, HAS_ENTROPY,
    HAS_SOFTCAP,
):  # fmt: skip
    log2_p = (x.to(tl.float32) - m) * scale - log2_s
    log2_p = tl.maximum(log2_p, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    pull = g_logp
    if HAS_ENTROPY:
        pull = g_logp + g_entropy * (log2_p * LN_2 + entropy)
    g = (tl.where(column == token, g_logp, 0.0) - tl.exp2(log2_p) * pull) * (scale * LN_2)
    if HAS_SOFTCAP:
        t = x.to(tl.float32) * inverse_softcap
        g = g * (1.0 - t * t)
    return g


@triton.jit(do_not_specialize=["inner", "stride_outer", "out_stride_outer"])
def _row_gradient_kernel(
    x_ptr,
    out_ptr,
    slots_ptr,
    ids_ptr,
    shard_ptr,
    temperatures_ptr,
    saved_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    base: tl.int64,
    out_base: tl.int64,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    out_stride_outer: tl.int64,
    out_stride_inner: tl.int64,
    vocab: tl.int64,
    width: tl.int64,
    temperature: tl.float32,
    inverse_softcap: tl.float32,
    parts,
    HAS_SLOTS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_SHARD: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_LOGPROBS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    VECTORS: tl.constexpr,
    PART_BLOCKS: tl.constexpr,
):
    BLOCK: tl.constexpr = VECTORS * ALIGN
    REST: tl.constexpr = 2 * VECTORS  # narrow loads: fewer at a time, or they take the registers
    pid = tl.program_id(0)
    row = (pid // parts).to(tl.int64)
    part = pid % parts
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + row)
    first_id = tl.zeros([], tl.int64)
    if HAS_SHARD:
        first_id = tl.load(shard_ptr)
        vocab = tl.minimum(vocab, tl.maximum(tl.load(shard_ptr + 1) - first_id, 0))
    active = slot >= 0
    # All that is known of the row at once: no load waits for another before the row's own.
    top = tl.load(saved_ptr + slot * 3, mask=active, other=-float("inf"))
    log_s = tl.load(saved_ptr + slot * 3 + 1, mask=active, other=0.0)
    entropy = tl.load(saved_ptr + slot * 3 + 2, mask=active, other=0.0)
    alive = active & (top != -float("inf"))
    token = tl.full([], -1, tl.int32)
    g_logp = tl.zeros([], tl.float32)
    g_entropy = tl.zeros([], tl.float32)
    if HAS_LOGPROBS:
        global_token = tl.load(ids_ptr + slot, mask=active, other=-100).to(tl.int64)
        g_logp = tl.load(grad_logprobs_ptr + slot, mask=active, other=0.0)
        g_logp = tl.where(alive & (global_token != -100), g_logp, 0.0)
        local = global_token - first_id
        here = (global_token >= 0) & (local >= 0) & (local < vocab)
        token = tl.where(here, local, -1).to(tl.int32)
    if HAS_ENTROPY:
        g_entropy = tl.load(grad_entropy_ptr + slot, mask=active, other=0.0)
        g_entropy = tl.where(alive, g_entropy, 0.0)
    if HAS_TEMPERATURES:
        own = tl.load(temperatures_ptr + slot, mask=active, other=0.0).to(tl.float32)
        g_logp = tl.where(own == 0, 0.0, g_logp)
        g_entropy = tl.where(own == 0, 0.0, g_entropy)
    # Where nothing is needed nothing is loaded, and the arithmetic below gives 0. (The interpreter
    # cannot combine comparisons of floats: an integer in between.)
    needed = ((g_logp != 0) | (g_entropy != 0)).to(tl.int32) != 0
    m = tl.where(needed, top, 0.0)
    log2_s = tl.where(needed, log_s, 0.0) * LOG2_E
    entropy = tl.where(needed, entropy, 0.0)
    offset = row_offset(row, base, inner, stride_outer, stride_inner)
    out = row_offset(row, out_base, inner, out_stride_outer, out_stride_inner)
    head = tl.minimum((ALIGN - offset % ALIGN) % ALIGN, vocab).to(tl.int32)
    full = ((vocab - head) // BLOCK).to(tl.int32)
    scale = LOG2_E / temperature
    if HAS_TEMPERATURES:
        scale = tl.where(needed, row_scale(LOG2_E, own), 0.0)
    lanes = tl.arange(0, BLOCK)
    dtype = out_ptr.dtype.element_ty
    first = part * PART_BLOCKS
    column = head + first * BLOCK
    at = tl.multiple_of(offset + column, ALIGN)
    to = tl.multiple_of(out + column, OUT_ALIGN)
    tl.static_assert(PART_BLOCKS == 2)
    x0 = _stream(x_ptr + at + lanes, needed & (first < full))
    x1 = _stream(x_ptr + tl.multiple_of(at + BLOCK, ALIGN) + lanes, needed & (first + 1 < full))
    g = _gradient(
        x0, column + lanes, token, m, log2_s, entropy, g_logp, g_entropy, scale, inverse_softcap,
        HAS_ENTROPY, HAS_SOFTCAP,
    )  # fmt: skip
    tl.store(out_ptr + to + lanes, g.to(dtype), mask=first < full)
    g = _gradient(
        x1, column + BLOCK + lanes, token, m, log2_s, entropy, g_logp, g_entropy, scale,
        inverse_softcap, HAS_ENTROPY, HAS_SOFTCAP,
    )  # fmt: skip
    to = tl.multiple_of(to + BLOCK, OUT_ALIGN)
    tl.store(out_ptr + to + lanes, g.to(dtype), mask=first + 1 < full)
    if part == parts - 1:
        done = full * BLOCK
        left = vocab.to(tl.int32) - done
        few = tl.arange(0, REST)
        for rest in range(0, left, REST):
            r = rest + few
            c = tl.where(r < head, r, done + r)
            x = tl.load(x_ptr + offset + c, mask=needed & (r < left), other=0.0)
            piece = _gradient(
                x, c, token, m, log2_s, entropy, g_logp, g_entropy, scale, inverse_softcap,
                HAS_ENTROPY, HAS_SOFTCAP,
            )  # fmt: skip
            tl.store(out_ptr + out + c, piece.to(dtype), mask=r < left)
        for padded in range(0, width - vocab, REST):
            c = vocab + padded + few
            zero = tl.zeros([REST], dtype)
            tl.store(out_ptr + out + c, zero, mask=c < width)


def row_gradient(
    logits: Tensor,
    out: Tensor,
    labels: RowLabels,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Write the gradient of every row into `out` (shaped like logits; may be logits).

    Rows that the labels do not name, rows without upstream gradient and columns outside the
    vocabulary get exactly 0. Rows must not repeat.
    """
    token_ids, rows, softcap = labels.token_ids, labels.rows, labels.softcap
    vocab, shard = labels.columns_on_device(logits.shape[-1])
    layout, out_layout = Layout(logits), Layout(out)
    n, width = logits.shape[:-1].numel(), logits.shape[-1]
    if n == 0 or width == 0:
        return
    slots = None
    if rows is not None:
        slots = torch.full((n,), -1, dtype=torch.int64, device=logits.device)
        slots[rows] = torch.arange(rows.shape[0], device=logits.device)
    parts = max(1, triton.cdiv(vocab // (VECTORS * layout.align), PART_BLOCKS))
    number, temperatures = temperature_arguments(labels.temperature)
    with devices.launching_on(logits):
        _row_gradient_kernel[(n * parts,)](
            layout.pointer, out_layout.pointer, slots, token_ids, shard, temperatures, saved,
            grad_logprobs, grad_entropy, layout.base, out_layout.base, layout.inner,
            layout.stride_outer, layout.stride_inner, out_layout.stride_outer,
            out_layout.stride_inner, vocab, width, number,
            1.0 / softcap if softcap else 0.0, parts, HAS_SLOTS=rows is not None,
            HAS_IDS=token_ids is not None, HAS_SHARD=shard is not None,
            HAS_TEMPERATURES=temperatures is not None, HAS_LOGPROBS=grad_logprobs is not None,
            HAS_ENTROPY=grad_entropy is not None, HAS_SOFTCAP=softcap != 0, ALIGN=layout.align,
            OUT_ALIGN=layout.align if layout.matches(out_layout) else 1, VECTORS=VECTORS,
            PART_BLOCKS=PART_BLOCKS, num_warps=WARPS,
        )  # fmt: skip
