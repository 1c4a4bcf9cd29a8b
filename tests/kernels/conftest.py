"""Which implementation of the kernels a test runs.

In a plain run `backend` is the compiled host kernels, then the reference that stands in for them.
With TRITON_INTERPRET=1 (`test_triton_interpreter.py` starts such a process) it is the Triton
kernels, on CPU tensors through the same public functions.
"""

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

from r1v3.kernels import devices, host

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ("triton",) if INTERPRETED else ("compiled", "reference")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "triton":
        monkeypatch.setattr(
            devices, "runs_triton", lambda tensor: tensor.dtype in devices.HALF_OR_SINGLE
        )
    elif request.param == "reference":
        monkeypatch.setattr(host, "supports", lambda tensor: False)
    elif not host.supports(torch.zeros(1)):
        pytest.skip("r1v3._C is not built")
    with warnings.catch_warnings():
        if request.param == "triton":
            # The interpreter computes exp2(-inf) and inf - inf with numpy, which comments on it.
            warnings.simplefilter("ignore", RuntimeWarning)
        yield request.param
