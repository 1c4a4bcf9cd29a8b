"""Multiplication in place that costs nothing where the factor is 1, as an upstream gradient is."""

from torch import Tensor

from r1v3.kernels import devices
from r1v3.kernels.registration import register_op


def _scale(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor [], without touching the tensor where factor is 1, and without waiting."""
    if devices.runs_triton(tensor) and tensor.is_contiguous():
        from r1v3.kernels.triton import scale as triton

        triton.scale_(tensor, factor)
    elif tensor.device.type != "cpu" or float(factor) != 1:
        tensor.mul_(factor)


scale_ = register_op("scale_", _scale, fake=lambda *_: None, mutates_args=("tensor",))
