"""One row through the one-pass CUDA kernel, for compute-sanitizer to watch."""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.problem import VOCABULARY
from r1v3 import files
from r1v3.kernels import cuda, logits_grpo_loss


def main() -> int:
    """Run it; 1 if the kernel was not the one that ran, or gave NaN."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device.one_row", description=__doc__
    )
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    logits = torch.zeros(1, 1, VOCABULARY, dtype=torch.bfloat16, device="cuda").requires_grad_()
    ids, mask = (
        torch.ones(1, 1, dtype=dtype, device="cuda") for dtype in (torch.int64, torch.bool)
    )
    blocks = cuda.cluster(logits, VOCABULARY)
    loss, _ = logits_grpo_loss(
        logits, ids, None, torch.ones(1, device="cuda"), mask, normalizer=1.0
    )
    loss.backward()
    torch.cuda.synchronize()
    finite = bool(torch.isfinite(logits.grad).all()) if logits.grad is not None else False
    files.write_json(options.json, {"vocabulary": VOCABULARY, "blocks": blocks, "finite": finite})
    print(f"a row of {VOCABULARY:,} logits in {blocks} blocks, finite: {finite}")
    return 0 if blocks and finite else 1


if __name__ == "__main__":
    sys.exit(main())
