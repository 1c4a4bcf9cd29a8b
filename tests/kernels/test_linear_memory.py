"""Memory that a language head allocates, as the operating system sees it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import timing
from r1v3.kernels import cpu, linear_grpo_loss
from r1v3.kernels.linear import tiles
from tests.kernels.conftest import INTERPRETED
from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
VOCAB, WIDTH = 20_000, 32
FEW, MANY = 1024, 5120
MEBIBYTE = 2**20

# Peak resident memory grows only, so a call's part is what it adds to the peak so far.
PROGRAM = """
import json, resource, sys
import torch
from r1v3.kernels import linear_grpo_loss, linear_logprobs_and_entropy

torch.set_num_threads(1)
vocab, width, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def logprobs(h, w, ids):
    values = linear_logprobs_and_entropy(h, w, ids)
    return values[0].sum() + values[1].sum()

def loss(h, w, ids):
    ids = ids[None]
    return linear_grpo_loss(h[None], w, ids, None, torch.ones(1), torch.ones_like(ids))[0]

def step(function, rows):
    h = torch.zeros(rows, width, dtype=dtype, requires_grad=True)
    w = torch.zeros(vocab, width, dtype=dtype, requires_grad=True)
    function(h, w, torch.zeros(rows, dtype=torch.int64)).backward()

added = {}
for name in sys.argv[4].split():
    function = globals()[name]
    step(function, 8)
    before = peak()
    for rows in map(int, sys.argv[5:]):
        step(function, rows)
        added[f"{function.__name__} {rows}"] = peak() - before
        before = peak()
print(json.dumps(added))
"""


def added(vocab: int, width: int, dtype: str, functions: str, *rows: int) -> dict[str, int]:
    """Bytes that each function's steps of so many rows added to the peak, by function and rows.

    A step of 8 rows goes first, so that the hidden states, the weight and its gradient count once.
    """
    arguments = [str(x) for x in (vocab, width, dtype, functions, *rows)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's own memory is not the kernels'")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_rows_times_vocabulary(dtype: str) -> None:
    """Fails if more logits exist at a time than a tile, or a chunk of the one-pass loss.

    From 1,024 to 5,120 rows of 20,000 logits: all of them would be 390 MiB in float32.
    """
    found = added(VOCAB, WIDTH, dtype, "logprobs loss", FEW, MANY)
    assert found[f"logprobs {FEW}"] < 40 * MEBIBYTE
    assert found[f"logprobs {MANY}"] < 20 * MEBIBYTE
    # One workspace of 56 MiB, and the operands of a tile.
    assert found[f"loss {FEW}"] + found[f"loss {MANY}"] < 100 * MEBIBYTE


@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "converted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tenth_of_the_memory_of_all_logits(
    dtype: torch.dtype, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if, beside the gradients, more than a tenth of eager PyTorch's tensors are alive.

    In float32 the logits wait in the memory of the weight's gradient; in bfloat16, whose gradient
    has room for half of these rows, they are computed twice. Eager PyTorch, whose bfloat16 products
    are slow, is measured with narrower hidden states: its peak is that of the logits. Without
    instructions for pairs of bfloat16 they are converted in the product.
    """
    if not pairs:
        if dtype == torch.float32 or not cpu.has_bfloat16_dot():
            pytest.skip("this is what the other case runs")
        monkeypatch.setattr(cpu, "has_bfloat16_dot", lambda: False)
    hidden = torch.randn(1, 512, 512).to(dtype).requires_grad_()
    weight = torch.randn(2 * VOCAB, 512).to(dtype).requires_grad_()
    ids = torch.randint(0, 2 * VOCAB, (1, 512))

    def eager(h: Tensor, w: Tensor) -> Tensor:
        logp = torch.log_softmax((h @ w.T).float(), -1)
        return -logp.gather(-1, ids[..., None]).mean()

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return linear_grpo_loss(h, w, ids, None, torch.ones(1), torch.ones_like(ids))[0]

    def peak(function: Callable[[Tensor, Tensor], Tensor], *leaves: Tensor) -> int:
        task = timing.Task("step", lambda _: torch.autograd.grad(function(*leaves), leaves))
        return timing.peak_extra_bytes(task, "cpu")

    narrow = [x.detach()[..., :8].clone().requires_grad_() for x in (hidden, weight)]
    gradients = (hidden.numel() + weight.numel()) * dtype.itemsize
    assert peak(ours, hidden, weight) - gradients <= (peak(eager, *narrow) - gradients) / 10


@pytest.mark.parametrize(
    "rows,width,dtype",
    [
        (24, 24, torch.float32),
        (4, 9, torch.bfloat16),
        (5, 9, torch.bfloat16),
        (9, 9, torch.float16),
    ],
    ids=str,
)
def test_logits_in_the_memory_of_a_gradient(
    rows: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a tile's logits are overwritten before their last use.

    As many rows as just fit, one more, odd widths, and a last tile of 45 columns.
    """
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)
    monkeypatch.setattr(tiles, "CPU_WORKSPACE", 2 * 301 * 4)
    torch.manual_seed(0)
    ids = torch.randint(0, 301, (1, rows))
    given = [torch.randn(1, rows, width).to(dtype), torch.randn(301, width).to(dtype)]
    answers = []
    for kind in (dtype, torch.float64):
        leaves = [x.detach().clone().to(kind).requires_grad_() for x in given]
        loss, _ = linear_grpo_loss(
            *leaves, ids, None, torch.ones(1, dtype=kind), torch.ones_like(ids)
        )
        loss.backward()
        answers.append([loss.detach(), *(x.grad for x in leaves)])
    for got, want in zip(*answers, strict=True):
        near = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.double(), want.double(), rtol=8 * near, atol=2 * near)


@pytest.mark.parametrize(("group", "free", "chunks"), [("", 40, 2), ("", 3, 8), ("tp", 40, 8)])
def test_chunks_on_a_device(
    group: str, free: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a head's gradient is read and written more often than free memory asks for, or
    ranks of a group, whose free memory differs, choose their own chunks."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    weight = SimpleNamespace(device=device, shape=(151_674, 5120))
    head: Any = SimpleNamespace(
        weight=weight, group=group, row_tile=0, result=torch.float32, operand=torch.bfloat16,
        whole_rows=True, common_width=lambda: 151_674,
    )  # fmt: skip
    rows = tiles.chunk_rows(head, 8192, sums=True)
    assert rows == 8192 // chunks
