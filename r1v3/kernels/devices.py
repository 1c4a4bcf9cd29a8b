"""Where a tensor's kernels run."""

import torch
from torch import Tensor

HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def runs_triton(tensor: Tensor) -> bool:
    """CUDA tensors of up to 32 bits run Triton; everything else the host kernels or reference."""
    return tensor.is_cuda and tensor.dtype in HALF_OR_SINGLE
