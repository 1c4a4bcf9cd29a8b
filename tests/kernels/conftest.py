"""Which implementation of the kernels a test runs, and on which device.

In a plain run `backend` is the compiled CPU kernels, then the reference that stands in for them,
then what a CUDA device runs, where there is one. With TRITON_INTERPRET=1
(`test_triton_interpreter.py` starts such a process) it is the Triton kernels, on CPU tensors
through the same public functions. "emulated", which a test of
`logits_grpo_loss` asks for, is its CUDA kernel on CPU tensors. Tensors that a test creates without
naming a device are on the device of its backend.
"""

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from r1v3.kernels import cpu, devices
from tests.kernels.emulated import take_the_cuda_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# On a test, or as the marks of a parameter: left to `make test-all` by the interpreter, which takes
# seconds for each row, because another test runs the same lines of the kernel there.
slow_interpreted = pytest.mark.slow if INTERPRETED else pytest.mark.skipif(False, reason="")
ON_DEVICE = pytest.param("cuda", marks=pytest.mark.gpu)
BACKENDS = ("triton",) if INTERPRETED else ("compiled", "reference", ON_DEVICE)
# Where arguments can be looked at without waiting for a device, so that wrong ones raise.
CPU_BACKENDS = ("compiled", "reference")


if INTERPRETED:
    from triton.language import standard
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, *rest: Any) -> None:
        """Let a number be the bound of a range: before 3.7 it is an array, which numpy refuses."""
        patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    def call_device_function(function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call it in the language as it is patched already: by its kernel's launch, and below.

        Triton patches it again at each of these calls, which is half of the interpreter's time.
        """
        return function.rewrite()(*args, **kwargs)

    interpreter._patch_lang_tensor = patch_index
    # The language's own functions, like `tl.sum`, know it by another module than kernels do.
    interpreter._patch_lang(standard.sum.fn)
    interpreter.InterpretedFunction.__call__ = call_device_function


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "triton":
        monkeypatch.setattr(
            devices, "runs_triton", lambda tensor: tensor.dtype in devices.HALF_OR_SINGLE
        )
    if request.param in ("triton", "reference"):
        monkeypatch.setattr(cpu, "supports", lambda tensor: False)
    elif request.param == "emulated":
        take_the_cuda_kernel(monkeypatch)
    elif request.param == "compiled" and not cpu.supports(torch.zeros(1)):
        pytest.skip("r1v3._C is not built")
    with warnings.catch_warnings(), torch.device(_device_of(request.param)):
        if request.param == "triton":
            # The interpreter computes exp2(-inf) and inf - inf with numpy, which comments on it.
            warnings.simplefilter("ignore", RuntimeWarning)
        yield request.param


@pytest.fixture(params=["cpu", ON_DEVICE])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a test runs that is not about one implementation."""
    with torch.device(request.param):
        yield request.param


def _device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"
