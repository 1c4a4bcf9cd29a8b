"""Multiplication in place that costs nothing where the factor is 1, as an upstream gradient is."""

import torch
from torch import Tensor

from r1v3.kernels import devices


@torch.library.custom_op("r1v3::scale_", mutates_args=("tensor",))
def scale_(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor [], without touching the tensor where factor is 1, and without waiting."""
    if devices.runs_triton(tensor) and tensor.is_contiguous():
        from r1v3.kernels import scale_triton

        scale_triton.scale_(tensor, factor)
    elif tensor.device.type != "cpu" or float(factor) != 1:
        tensor.mul_(factor)
