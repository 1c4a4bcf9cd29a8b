"""The completions of one GRPO step, and the micro-batches they are trained in."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from r1v3.balance import pack_groups
from r1v3.data.batch import Batch
from r1v3.data.encoding import Example, collate
from r1v3.ranks import shard_range
from r1v3.rewards import Reward
from r1v3.rollout.contract import Rollout
from r1v3.rollout.repetition import repetition
from r1v3.trainer.policy_loss import Targets

MicroBatch = tuple[Batch, Targets]
# Prompts, and as many rows of each.
Pack = tuple[list[int], list[int]]


def has_signal(rewards: Sequence[Reward], of: Literal["reward", "accuracy"] = "reward") -> bool:
    """Whether the rewards of a group, or the accuracies alone, differ."""
    return len({one.total if of == "reward" else one.accuracy for one in rewards}) > 1


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
        kept: groups with a signal.
    """

    examples: list[Example]
    rollout: Rollout
    rewards: list[Reward]
    advantages: Tensor
    kept: int

    @property
    def group_size(self) -> int:
        """G, the completions of one prompt."""
        return len(self.rewards) // len(self.examples)

    def micro_batches(
        self,
        gradient_steps: int,
        size: int,
        pad_id: int,
        *,
        apart: bool = False,
        tokens: int | None = None,
        least: int = 1,
    ) -> list[list[MicroBatch]]:
        """Return the micro-batches of each gradient step.

        Without `tokens` groups stay whole, and prompts are divided evenly: among as many
        micro-batches as there would be full ones.

        Args:
            gradient_steps: equal parts that the prompts are divided into, in order; divides P.
            size: most prompts of a micro-batch.
            pad_id: token that prompts are padded with.
            apart: prompts whose advantages are all zero have micro-batches of their own.
            tokens: most tokens of a micro-batch; see `_packs`.
            least: micro-batches of a gradient step that are worth smaller ones than `tokens`.

        Raises:
            ValueError: a completion with its prompt has more than `tokens`.
        """
        whole = replace(
            collate(self.examples, pad_id),
            response_ids=self.rollout.response_ids,
            loss_mask=self.rollout.mask,
            group_size=self.group_size,
        )
        prompts = len(self.examples) // gradient_steps
        kinds = self.advantages.view(-1, self.group_size).any(1)
        if not apart:
            kinds = torch.ones_like(kinds)
        steps = []
        for first in range(0, len(self.examples), prompts):
            part = range(first, first + prompts)
            if tokens is None:
                packs = self._whole_groups(part, size, kinds)
            else:
                packs = self._packs(whole, part, size, kinds, tokens, least)
            steps.append([self._micro_batch(whole, *pack) for pack in packs])
        return steps

    def _whole_groups(self, part: range, size: int, kinds: Tensor) -> list[Pack]:
        """Neighbors of a kind, evenly divided."""
        packs, start, parts = [], part.start, -(-len(part) // size)
        for _, alike in itertools.groupby(kinds[part.start : part.stop].tolist()):
            count = len(list(alike))
            for i in range(min(parts, count)):
                share = shard_range(count, i, min(parts, count))
                packs.append(self._all_rows(range(start + share.start, start + share.stop)))
            start += count
        return packs

    def _all_rows(self, prompts: Sequence[int]) -> Pack:
        """These prompts with all their completions."""
        g = self.group_size
        return list(prompts), [row for p in prompts for row in range(p * g, p * g + g)]

    def _packs(
        self, whole: Batch, part: range, size: int, kinds: Tensor, tokens: int, least: int
    ) -> list[Pack]:
        """Groups of up to `tokens` together, up to `size` of them; larger ones divided.

        Counted are positions of the language model: a prompt once in every micro-batch that holds
        some of its completions, and a completion without its last token, which is never an input.
        """
        g, inputs = self.group_size, whole.input_lengths().view(-1, self.group_size)
        before = whole.prompt_mask.sum(1)
        packs: list[Pack] = []
        for kind in (True, False):
            chosen = [p for p in part if bool(kinds[p]) == kind]
            found = pack_groups(
                before[chosen].tolist(),
                inputs[chosen].tolist(),
                size=size,
                tokens=tokens,
                least=least,
            )
            for pack in found:
                rows = [chosen[p] * g + row for p, own in pack for row in own]
                packs.append(([chosen[p] for p, _ in pack], rows))
        return packs

    def _micro_batch(self, whole: Batch, prompts: list[int], rows: list[int]) -> MicroBatch:
        """These rows of these prompts, without the columns that are padding in all of them."""
        batch = whole.take(prompts, rows)
        chosen, width = torch.tensor(rows), batch.response_ids.shape[1]
        targets = Targets(
            loss_mask=batch.loss_mask,
            advantages=self.advantages[chosen],
            rollout_logprobs=self.rollout.logprobs[chosen, :width],
            sampled=batch.loss_mask & self.rollout.sampled[chosen, :width],
        )
        return batch, targets

    def metrics(self) -> dict[str, Any]:
        """Return mean rewards, mean length in tokens, mean repetition, and the shares refused and
        cut short."""
        rewards = self.rewards
        return {
            "reward": sum(reward.total for reward in rewards) / len(rewards),
            "accuracy": sum(reward.accuracy for reward in rewards) / len(rewards),
            "format": sum(reward.format for reward in rewards) / len(rewards),
            "reward_refused": sum(reward.refused for reward in rewards) / len(rewards),
            "response_length": float(self.rollout.mask.sum(1).float().mean()),
            "repetition": float(repetition(self.rollout.response_ids, self.rollout.mask).mean()),
            "truncated": float((~self.rollout.finished).float().mean()),
            "groups_kept": self.kept,
        }
