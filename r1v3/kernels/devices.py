"""Where a tensor's kernels run, and what a launch needs to know of the device."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
_tickets: dict[tuple[torch.device, int], Tensor] = {}


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels take this tensor: on CUDA, and of up to 32 bits."""
    return tensor.is_cuda and tensor.dtype in HALF_OR_SINGLE


def launching_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device_of(tensor)


def ticket(device: torch.device) -> Tensor:
    """An int32 zero, by which the programs of one launch tell who is the last.

    The last program sets it back to zero, so launches on one stream share it. A graph gets its
    own, because its replays may overlap with anything.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _tickets[key]
