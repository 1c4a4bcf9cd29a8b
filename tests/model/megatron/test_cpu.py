"""The CPU stand-ins refuse where there is CUDA, and change nothing before they are asked for."""

import subprocess
import sys
from pathlib import Path

from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import torch

def patched():
    return torch.empty, torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device

before = patched()
from r1v3.model.megatron import cpu
torch.cuda.is_available = lambda: True
try:
    cpu.enable()
except RuntimeError as error:
    print(error)
assert patched() == before

torch.cuda.is_available = lambda: False
cpu.enable()
once = patched()
cpu.enable()
assert patched() == once and not set(once) & set(before)
assert torch.zeros(2, device="cuda").cuda().device.type == "cpu"
assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
assert torch.zeros(2).type(torch.int64).dtype == torch.int64
assert torch.cuda.current_device() == torch.device("cpu")
with torch.device("meta"):
    made = torch.empty(2), torch.zeros(2), torch.tensor([2]), torch.nn.Linear(2, 2).weight
assert {tensor.device.type for tensor in made} == {"meta"}
"""


def test_stand_ins_are_refused_with_cuda_and_put_in_once_without() -> None:
    """Fails if a GPU machine could train on its CPU without a word, if an import patches torch, or
    if a model that is built for its shapes alone takes memory for its weights.

    In a process of its own, which the stand-ins change for good.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert "CUDA is available" in done.stdout
