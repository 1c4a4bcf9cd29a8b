"""Triton kernel of the soft cap on logits, in place: one read and one write."""
# mypy: allow-untyped-defs, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

from r1v3.kernels import devices

BLOCK = 4096


@triton.jit(do_not_specialize=["columns"])
def _softcap_kernel(
    x_ptr, stride: tl.int64, columns: tl.int64, blocks, softcap: tl.float32, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    at = x_ptr + row * stride + column
    x = tl.load(at, mask=column < columns, other=0.0) / softcap
    # Near 0 by the polynomial of Cephes' tanhf: 1 - 2 / (e^2x + 1) would lose x's digits there.
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = series * square * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    tl.store(at, tl.where(square < 0.390625, near, far) * softcap, mask=column < columns)


def softcap_(logits: Tensor, softcap: float) -> None:
    """logits = softcap * tanh(logits / softcap), float32 [n, columns] with contiguous rows."""
    n, columns = logits.shape
    if logits.numel():
        blocks = triton.cdiv(columns, BLOCK)
        with devices.launching_on(logits):
            _softcap_kernel[(n * blocks,)](
                logits, logits.stride(0), columns, blocks, softcap, BLOCK=BLOCK, num_warps=8
            )
