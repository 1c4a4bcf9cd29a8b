"""Ranks of a data-parallel HFEngine; each writes what it has learned."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from r1v3.data.batch import Batch
from r1v3.data.encoding import collate
from r1v3.engine.head import Head
from r1v3.engine.hf.engine import HFEngine
from r1v3.ranks import ALONE, Ranks, join_job
from tests import tiny
from tests.engine.replicas import everywhere, own_numbers
from tests.processes import PATIENCE

# Tiles of the prompts of each micro-batch: as many as ranks, fewer, more, and without pictures.
CASES = {"two": [[1, 2], [0, 1]], "one": [[1]], "three": [[1], [0, 1], [2]], "texts": [[0], [0]]}
CASES["balanced"] = [[2, 1], [0], [0], [0]]
MODULES = {
    "all": dict.fromkeys(("vision", "connector", "llm"), True),
    "connector": {"vision": False, "connector": True, "llm": False},
}


def micro_batches(case: str) -> list[Batch]:
    return [
        collate(
            [
                tiny.an_example(10 * i + j, tiles=tiles, words=2 + i, response=3 + i + 2 * j)
                for j, tiles in enumerate(prompts)
            ],
            0,
        )
        for i, prompts in enumerate(CASES[case])
    ]


def learn(ranks: Ranks, case: str, modules: str, folder: Path) -> dict[str, object]:
    """Three steps and what they leave: metrics, outputs, moments, log-probs and the weights."""
    net = tiny.model()
    tiny.sharpen(net)
    engine = HFEngine(
        net,
        tiny.tokenizer(),
        modules=MODULES[modules],
        weight_decay=0.1,
        ranks=ranks,
        balanced=case == "balanced",
    )
    batches, steps = micro_batches(case), []
    mine = own_numbers(engine, batches)
    own = [batches[i] for i in mine]

    def loss(head: Head, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs, entropy = head.logprobs_and_entropy()
        return -logprobs.sum() / 16, {"entropy": entropy, "index": torch.tensor(mine[index])}

    for _ in range(3):
        metrics, outputs = engine.train_step(own, loss, learning_rate=1e-2)
        steps.append((metrics, everywhere(engine, mine, outputs)))
    target = folder / f"{case}-{modules}-{ranks.size}"
    ranks.on_main(target.mkdir)
    engine.save(target)
    return {
        "mine": mine,
        "steps": steps,
        "moments": dict(engine.optimizer_tensors()),
        "evaluated": everywhere(engine, mine, engine.evaluate(own)),
        "weights": dict(engine.export_hf()),
    }


def everything(ranks: Ranks, folder: Path) -> dict[str, object]:
    return {
        f"{case} {modules}": learn(ranks, case, modules, folder)
        for case in CASES
        for modules in MODULES
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = join_job("cpu", PATIENCE)
    torch.save(everything(ranks, folder), folder / f"rank{os.environ['RANK']}.pt")
    if ranks.is_main:
        torch.save(everything(ALONE, folder), folder / "alone.pt")
    ranks.barrier()
    dist.destroy_process_group()
