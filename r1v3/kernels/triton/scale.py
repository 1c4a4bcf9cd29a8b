"""Triton kernel of a multiplication in place that costs nothing where the factor is 1."""
# mypy: allow-untyped-defs, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

from r1v3.kernels import devices

BLOCK = 4096


@triton.jit(do_not_specialize=["programs"])
def _scale_kernel(x_ptr, factor_ptr, n: tl.int64, programs: tl.int64, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, BLOCK), programs):
            at = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < n)
            scaled = x.to(tl.float32) * factor
            tl.store(x_ptr + at, scaled.to(x_ptr.dtype.element_ty), mask=at < n)


# Few enough that programs which find nothing to do end in microseconds, and enough to fill any GPU.
PROGRAMS = 2048


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor; tensor contiguous, factor one number on its device."""
    if tensor.numel():
        programs = min(PROGRAMS, triton.cdiv(tensor.numel(), BLOCK))
        with devices.launching_on(tensor):
            _scale_kernel[(programs,)](
                tensor, factor, tensor.numel(), programs, BLOCK=BLOCK, num_warps=8
            )
