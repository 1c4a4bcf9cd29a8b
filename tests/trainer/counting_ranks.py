"""Ranks that take a GRPO step and count the bytes that reach them between the processes."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

# What the ranks share, as in `forked_rank`.
import r1v3.engine.megatron.engine  # noqa: F401
import r1v3.rollout.local  # noqa: F401
from r1v3.config import GRPO, load
from r1v3.ranks import Ranks
from r1v3.trainer.division import divide
from r1v3.trainer.grpo import GRPOTrainer


def count_into(received: dict[str, int]) -> None:
    """Count what the messages of `Ranks` bring from other ranks, by their kind."""

    def counting(name: str, size: Callable[[Ranks, Any], int]) -> None:
        method = getattr(Ranks, name)

        def counted(self: Ranks, *arguments: Any, **options: Any) -> Any:
            found = method(self, *arguments, **options)
            if self.size > 1:
                received[name] = received.get(name, 0) + size(self, found)
            return found

        setattr(Ranks, name, counted)

    def from_others(ranks: Ranks, values: list[Any]) -> int:
        return sum(len(pickle.dumps(one)) for i, one in enumerate(values) if i != ranks.rank)

    counting("gather", from_others)
    counting("call_all", from_others)
    counting("_broadcast", lambda ranks, value: 0 if ranks.is_main else len(pickle.dumps(value)))
    counting("sum", lambda ranks, values: values.nbytes)
    counting("exchange", lambda ranks, parts: sum(map(len, parts)) - len(parts[ranks.rank]))


def main(folder: Path, *arguments: str) -> None:
    torch.set_num_threads(1)
    made = GRPOTrainer(load(GRPO, folder / "configs/grpo.yaml", list(arguments)), resuming=False)
    received: dict[str, int] = {}
    count_into(received)
    with made.sampling():
        episode = made.with_advantages(made.sample_groups())
    # Every group teaches.
    episode = replace(episode, advantages=torch.tensor([1.0, -1.0] * (len(episode.facts) // 2)))
    metrics = made.update(episode)
    counted = dict(received)
    packs = episode.packs(1, made.config.micro_batch_prompts)
    [part], _ = divide(episode, packs, made.engine, made.replica_of, made.config)
    rows = [row for number in part.numbers for row in packs[0][number][1]]
    report = {
        "received": counted,
        "own": list(episode.own),
        "rows": rows,
        "lengths": [one.length for one in episode.facts],
        "tokens": metrics["tokens"],
        "entropy": metrics["entropy"],
    }
    (folder / f"counted{made.engine.ranks.rank}.json").write_text(json.dumps(report))
    made.engine.ranks.barrier()
