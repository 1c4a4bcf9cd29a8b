"""The completions of one GRPO step, and the micro-batches they are trained in."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from r1v3.data.batch import Batch
from r1v3.data.encoding import Example, collate
from r1v3.ranks import shard_range
from r1v3.rewards import Reward
from r1v3.rollout.contract import Rollout
from r1v3.trainer.policy_loss import Targets

MicroBatch = tuple[Batch, Targets]


def has_signal(rewards: Sequence[Reward]) -> bool:
    """Whether the rewards of a group differ; where they are equal, advantages are zero."""
    return len({reward.total for reward in rewards}) > 1


@dataclass(frozen=True)
class Group:
    """The prompt at `index` of the training data, with G completions and their rewards."""

    index: int
    example: Example
    rollout: Rollout
    rewards: list[Reward]


@dataclass(frozen=True)
class Episode:
    """P groups of G completions: row p * G + g belongs to prompt p.

    Attributes:
        examples: the P prompts.
        rollout: the P * G completions.
        rewards: P * G.
        advantages: float32 [P * G].
    """

    examples: list[Example]
    rollout: Rollout
    rewards: list[Reward]
    advantages: Tensor

    @property
    def group_size(self) -> int:
        """G, the completions of one prompt."""
        return len(self.rewards) // len(self.examples)

    def micro_batches(
        self, gradient_steps: int, size: int, pad_id: int, *, apart: bool = False
    ) -> list[list[MicroBatch]]:
        """Return the micro-batches of each gradient step.

        Prompts are divided evenly: among as many micro-batches as there would be full ones.

        Args:
            gradient_steps: equal parts that the prompts are divided into, in order; divides P.
            size: most prompts of a micro-batch, each with all its completions.
            pad_id: token that prompts are padded with.
            apart: prompts whose advantages are all zero have micro-batches of their own.
        """
        whole = replace(
            collate(self.examples, pad_id),
            response_ids=self.rollout.response_ids,
            loss_mask=self.rollout.mask,
            group_size=self.group_size,
        )
        prompts = len(self.examples) // gradient_steps
        parts, kinds = -(-prompts // size), self.advantages.view(-1, self.group_size).any(1)
        if not apart:
            kinds = torch.ones_like(kinds)
        steps = []
        for first in range(0, len(self.examples), prompts):
            ranges, start = [], first
            for _, alike in itertools.groupby(kinds[first : first + prompts].tolist()):
                count = len(list(alike))
                shares = [
                    shard_range(count, i, min(parts, count)) for i in range(min(parts, count))
                ]
                ranges += [(start + share.start, start + share.stop) for share in shares]
                start += count
            steps.append([self._micro_batch(whole, *bounds) for bounds in ranges])
        return steps

    def _micro_batch(self, whole: Batch, start: int, stop: int) -> MicroBatch:
        """Prompts `start` to `stop`, without the columns that are padding in all their rows."""
        batch = whole.slice(start, stop)
        rows = slice(start * self.group_size, stop * self.group_size)
        width = batch.response_ids.shape[1]
        targets = Targets(
            loss_mask=batch.loss_mask,
            advantages=self.advantages[rows],
            rollout_logprobs=self.rollout.logprobs[rows, :width],
            sampled=batch.loss_mask & self.rollout.sampled[rows, :width],
        )
        return batch, targets

    def metrics(self) -> dict[str, Any]:
        """Return mean rewards, mean length in tokens, and the shares refused and cut short."""
        rewards, g = self.rewards, self.group_size
        groups = [rewards[i : i + g] for i in range(0, len(rewards), g)]
        return {
            "reward": sum(reward.total for reward in rewards) / len(rewards),
            "accuracy": sum(reward.accuracy for reward in rewards) / len(rewards),
            "format": sum(reward.format for reward in rewards) / len(rewards),
            "reward_refused": sum(reward.refused for reward in rewards) / len(rewards),
            "response_length": float(self.rollout.mask.sum(1).float().mean()),
            "truncated": float((~self.rollout.finished).float().mean()),
            "groups_kept": sum(has_signal(group) for group in groups),
        }
