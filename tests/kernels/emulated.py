"""The CUDA kernel of `logits_grpo_loss` on CPU tensors, executed by `emulator/`.

What it proves: on the executed inputs and orders of threads, the kernel's source gives the right
results, touches only the memory it may, and has a barrier wherever two threads meet in memory. What
it does not: anything about the machine code that nvcc makes of the source, a GPU's approximate
instructions (exp2 is exact here), memory order weaker than barriers, or time.
"""

import contextlib
import shutil
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.kernels import cpu, cuda, devices

SEED = 1


@cache
def emulated() -> Any:
    """The module of `emulator/`; skips the test that asks where it cannot be built."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler: the emulator executes csrc/cuda compiled by one")
    pytest.importorskip("pybind11")
    from tests.kernels.emulator import build

    return build.load()


def take_the_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let CPU tensors take the way of CUDA tensors that have the kernel."""
    module = emulated()
    module.configure(seed=SEED)
    compiled = SimpleNamespace(
        _C=module,
        DTYPE_CODES=cpu.DTYPE_CODES,
        temperature_arguments=cpu.temperature_arguments,
    )
    monkeypatch.setattr(cuda, "cpu", compiled)

    def cluster(logits: Tensor, vocab: int) -> int:
        if logits.dtype not in cuda.SUPPORTED:
            return 0
        return int(module.logits_grpo_loss_cluster(cpu.DTYPE_CODES[logits.dtype], vocab))

    monkeypatch.setattr(cuda, "cluster", cluster)
    monkeypatch.setattr(devices, "launching_on", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return module
