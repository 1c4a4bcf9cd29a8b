"""Triton kernel of `ban_tokens_`: writes only, one launch, nothing allocated (graph-safe)."""
# mypy: allow-untyped-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1v3.kernels import devices

BLOCK = 128


@triton.jit(do_not_specialize=["inner", "stride_outer"])
def _ban_tokens_kernel(
    logits_ptr,
    ids_ptr,
    enabled_ptr,
    n_ids,
    blocks,
    vocab: tl.int64,
    vocab_start: tl.int64,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    stride_column: tl.int64,
    HAS_ENABLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    k = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(ids_ptr + k, mask=k < n_ids, other=-1).to(tl.int64) - vocab_start
    banned = (k < n_ids) & (column >= 0) & (column < vocab)
    if HAS_ENABLED:
        banned = banned & (tl.load(enabled_ptr + row) != 0)
    at = (row // inner) * stride_outer + (row % inner) * stride_inner + column * stride_column
    tl.store(logits_ptr + at, -float("inf"), mask=banned)


def ban_tokens(logits: Tensor, token_ids: Tensor, enabled: Tensor | None, vocab_start: int) -> None:
    """logits of 1 to 3 dimensions, any strides; token_ids [K]; enabled bool [...] or None."""
    view = logits[None] if logits.dim() < 2 else logits
    view = view[None] if view.dim() == 2 else view
    ids = token_ids.contiguous()
    flags = None if enabled is None else enabled.contiguous().view(torch.uint8)
    blocks = triton.cdiv(ids.shape[0], BLOCK)
    with devices.launching_on(logits):
        _ban_tokens_kernel[(view.shape[0] * view.shape[1] * blocks,)](
            logits, ids, flags, ids.shape[0], blocks, view.shape[2], vocab_start, view.shape[1],
            *view.stride(), HAS_ENABLED=enabled is not None, BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip
