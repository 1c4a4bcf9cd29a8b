"""Where a tensor's kernels run, and what a launch needs to know of the device."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels take this tensor: on CUDA, and of up to 32 bits."""
    return tensor.is_cuda and tensor.dtype in HALF_OR_SINGLE


def launching_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device_of(tensor)
