"""What a language head allocates, as the operating system sees it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import INTERPRETED

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
for function in (logprobs, loss):
    step(function, 8)
    before = peak()
    for rows in map(int, sys.argv[4:]):
        step(function, rows)
        added[f"{function.__name__} {rows}"] = peak() - before
        before = peak()
print(json.dumps(added))
"""


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's own memory is not the kernels'")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_rows_times_vocabulary(dtype: str) -> None:
    """Fails if more logits exist at a time than a tile, or a chunk of the one-pass loss.

    From 1,024 to 5,120 rows of 20,000 logits: all of them would be 390 MiB in float32.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(VOCAB), str(WIDTH), dtype, str(FEW), str(MANY)],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    added = json.loads(done.stdout)
    assert added[f"logprobs {FEW}"] < 40 * MEBIBYTE
    assert added[f"logprobs {MANY}"] < 20 * MEBIBYTE
    # One workspace of 160 MiB, and the operands of a tile.
    assert added[f"loss {FEW}"] + added[f"loss {MANY}"] < 220 * MEBIBYTE
