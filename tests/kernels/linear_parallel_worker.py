"""One of four processes that shard a language head, started by `test_linear_parallel.py`.

In groups of 4, 3 and 2 of the
processes, every rank compares its shard with the whole head and writes what must have the same
bits everywhere.
"""
# mypy: disable-error-code="arg-type,union-attr,index"

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r1v3.kernels import (
    linear_grpo_loss,
    linear_logprobs_and_entropy,
)
from r1v3.kernels.linear import tiles
from tests.processes import PATIENCE

VOCAB, PADDED, ROWS, WIDTH = 1001, 1024, 36, 16
# Members and their columns; among them a rank of padding only, and widths that differ much.
GROUPS = (
    ([0, 1, 2, 3], [256, 256, 256, 256]),
    ([0, 1, 2], [700, 301, 23]),
    ([1, 3], [512, 512]),
)


def problem(dtype: torch.dtype) -> dict[str, Any]:
    """The same on every rank."""
    mask = torch.rand(3, ROWS // 3) < 0.7
    ids = torch.randint(0, VOCAB, (3, ROWS // 3))
    ids[0, :4] = torch.tensor([0, 1000, 700, -100])
    return {
        "hidden": torch.randn(3, ROWS // 3, WIDTH).to(dtype),
        "weight": torch.randn(PADDED, WIDTH).to(dtype),
        "token_ids": ids,
        "loss_mask": mask,
    }


def logprobs_and_entropy(**inputs: Any) -> tuple[Tensor, list[Tensor]]:
    degrees = torch.linspace(0.5, 1.5, ROWS).view(3, -1)
    values = linear_logprobs_and_entropy(**inputs, vocab_size=VOCAB, temperature=degrees)
    upstream = torch.linspace(-1, 1, ROWS).view(3, -1)
    return sum((value * upstream).sum() for value in values), list(values)


def policy_loss(**inputs: Any) -> tuple[Tensor, list[Tensor]]:
    loss, metrics = linear_grpo_loss(
        **inputs, old_logprobs=-6 + torch.linspace(-1, 1, ROWS).view(3, -1),
        advantages=torch.tensor([1.0, -2.0, 0.5]), vocab_size=VOCAB, temperature=0.7,
    )  # fmt: skip
    return loss, [loss, metrics["token_logprobs"], metrics["token_entropy"]]


def run(function: Any, inputs: dict[str, Any], **options: Any) -> tuple[list[Tensor], ...]:
    """Outputs, and the gradients of hidden and weight."""
    leaves = {k: inputs[k].clone().requires_grad_() for k in ("hidden", "weight")}
    total, outputs = function(**{**inputs, **leaves}, **options)
    total.backward()
    return [x.detach() for x in outputs], [leaf.grad for leaf in leaves.values()]


def check(function: Any, dtype: torch.dtype, mine: slice, group: dist.ProcessGroup) -> list[Tensor]:
    """Compares every way to split the head; returns the results of this rank."""
    inputs = problem(dtype)
    outputs, (grad_hidden, grad_weight) = run(function, inputs)
    close = dict(rtol=1e-4, atol=1e-5) if dtype != torch.bfloat16 else dict(rtol=2e-2, atol=2e-2)
    sharded = {**inputs, "weight": inputs["weight"][mine]}
    got, (shard_hidden, shard_weight) = run(function, sharded, group=group)
    for a, b in zip(outputs, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shard_hidden, grad_hidden, **close)
    torch.testing.assert_close(shard_weight, grad_weight[mine], **close)
    assert (shard_weight[max(VOCAB - mine.start, 0) :] == 0).all(), "padded rows of the weight"
    results = [*got, shard_hidden]

    _, (partial, _) = run(function, sharded, group=group, reduce_hidden_grad=False)
    partial = partial.float()
    dist.all_reduce(partial, group=group)
    torch.testing.assert_close(partial.to(dtype), shard_hidden, **close)

    rows = (inputs["loss_mask"] & (inputs["token_ids"] != -100)).flatten().nonzero().squeeze(-1)
    none = {**sharded, "loss_mask": torch.zeros_like(inputs["loss_mask"])}
    _, (nothing, _) = run(function, none, group=group)
    assert (nothing == 0).all() and rows.numel() > 12, "several chunks"
    return results


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4,
        timeout=timedelta(seconds=PATIENCE),
    )  # fmt: skip
    tiles.TILE_BYTES = 1
    tiles.CPU_BLOCK_ROWS = 9
    groups = [dist.new_group(members) for members, _ in GROUPS]
    for group, (members, widths) in zip(groups, GROUPS, strict=True):
        if rank not in members:
            continue
        tiles.CPU_WORKSPACE = 8 * 4 * -(-VOCAB // len(members))
        place = members.index(rank)
        mine = slice(sum(widths[:place]), sum(widths[: place + 1]))
        results = []
        for dtype in (torch.float32, torch.bfloat16):
            for function in (logprobs_and_entropy, policy_loss):
                torch.manual_seed(0)
                results += check(function, dtype, mine, group)
        torch.save(results, folder / f"{len(members)} {place}.pt")
    dist.barrier()
    dist.destroy_process_group()
