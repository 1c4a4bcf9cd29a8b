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
from r1v3.model.flops import Work
from r1v3.ranks import Ranks, shard_range
from r1v3.rewards import Reward
from r1v3.rollout.contract import Rollout
from r1v3.rollout.exchange import exchange_rows
from r1v3.rollout.repetition import repetition
from r1v3.trainer.policy_loss import Targets

MicroBatch = tuple[Batch, Targets]
# Prompts, and as many rows of each.
Pack = tuple[list[int], list[int]]


def has_signal(rewards: Sequence[Reward], of: Literal["reward", "accuracy"] = "reward") -> bool:
    """Whether the rewards of a group, or the accuracies alone, differ."""
    return len({one.total if of == "reward" else one.accuracy for one in rewards}) > 1


@dataclass(frozen=True)
class Facts:
    """The part of a completion that every rank knows; its tokens are on one rank alone.

    Attributes:
        length: in tokens.
        finished: whether its turn ended within the limit.
        repetition: see `r1v3.rollout.repetition`.
    """

    length: int
    finished: bool
    repetition: float


def rollout_facts(rollout: Rollout) -> list[Facts]:
    """Return the facts of completions."""
    repeated = repetition(rollout.response_ids, rollout.mask).tolist()
    columns = rollout.mask.sum(1).tolist(), rollout.finished.tolist(), repeated
    return [Facts(*row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Group:
    """The prompt at `index` of the training data, with G completions and their rewards.

    Attributes:
        rollout: the completions that this rank answers for.
        own: which of the G they are.
    """

    index: int
    example: Example
    rewards: list[Reward]
    facts: list[Facts]
    rollout: Rollout
    own: range


@dataclass(frozen=True)
class Part:
    """The micro-batches of one gradient step that are this replica's.

    Attributes:
        learned: those with a gradient, in the order in which the engine takes them.
        measured: those without, of which only metrics are wanted.
        numbers: of the learned and the measured ones, among those of the episode.
        learns, measures: whether some replica has such micro-batches.
        normalizer: divisor of the summed loss of all replicas.
    """

    learned: list[MicroBatch]
    measured: list[MicroBatch]
    numbers: list[int]
    learns: bool
    measures: bool
    normalizer: float


@dataclass(frozen=True)
class Episode:
    """P groups of G completions: row p * G + g belongs to prompt p.

    Every rank has all of it but the tokens, of which it has some rows.

    Attributes:
        examples: the P prompts.
        rewards, facts: P * G.
        advantages: float32 [P * G].
        kept: groups with a signal.
        rollout: the rows that are here.
        own: which of the P * G they are.
    """

    examples: list[Example]
    rewards: list[Reward]
    facts: list[Facts]
    advantages: Tensor
    kept: int
    rollout: Rollout
    own: Sequence[int]

    @property
    def group_size(self) -> int:
        """G, the completions of one prompt."""
        return len(self.rewards) // len(self.examples)

    def fetch(
        self,
        wanted: Sequence[Sequence[int]],
        ranks: Ranks,
        pad_id: int,
        *,
        entropy: bool = False,
    ) -> "Episode":
        """Return the same episode with the rows that this rank needs; see `exchange_rows`."""
        rollout = exchange_rows(
            self.rollout, self.own, wanted, ranks, pad_id=pad_id, entropy=entropy
        )
        return replace(self, rollout=rollout, own=wanted[ranks.rank])

    def packs(
        self,
        gradient_steps: int,
        size: int,
        *,
        apart: bool = False,
        tokens: int | None = None,
        least: int = 1,
    ) -> list[list[Pack]]:
        """Return the prompts and rows of the micro-batches of each gradient step.

        Without `tokens` groups stay whole, and prompts are divided evenly: among as many
        micro-batches as there would be full ones.

        Args:
            gradient_steps: equal parts that the prompts are divided into, in order; divides P.
            size: most prompts of a micro-batch.
            apart: prompts whose advantages are all zero have micro-batches of their own.
            tokens: most tokens of a micro-batch; see `_packs`.
            least: micro-batches of a gradient step that are worth smaller ones than `tokens`.

        Raises:
            ValueError: a completion with its prompt has more than `tokens`.
        """
        prompts = len(self.examples) // gradient_steps
        kinds = self.advantages.view(-1, self.group_size).any(1)
        if not apart:
            kinds = torch.ones_like(kinds)
        steps = []
        for first in range(0, len(self.examples), prompts):
            part = range(first, first + prompts)
            if tokens is None:
                steps.append(self._whole_groups(part, size, kinds))
            else:
                steps.append(self._packs(part, size, kinds, tokens, least))
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

    def _packs(self, part: range, size: int, kinds: Tensor, tokens: int, least: int) -> list[Pack]:
        """Groups of up to `tokens` together, up to `size` of them; larger ones divided.

        Counted are positions of the language model: a prompt once in every micro-batch that holds
        some of its completions, and a completion without its last token, which is never an input.
        """
        g = self.group_size
        packs: list[Pack] = []
        for kind in (True, False):
            chosen = [p for p in part if bool(kinds[p]) == kind]
            found = pack_groups(
                [len(self.examples[p].prompt_ids) for p in chosen],
                [[max(0, one.length - 1) for one in self.facts[p * g : p * g + g]] for p in chosen],
                size=size,
                tokens=tokens,
                least=least,
            )
            for pack in found:
                rows = [chosen[p] * g + row for p, own in pack for row in own]
                packs.append(([chosen[p] for p, _ in pack], rows))
        return packs

    def work(self, pack: Pack) -> Work:
        """Return the work of a micro-batch."""
        prompts, rows = pack
        lengths = [self.facts[row].length for row in rows]
        return Work.of(
            [len(self.examples[p].prompt_ids) for p in prompts],
            lengths,
            sum(lengths),
            sum(len(self.examples[p].tiles) for p in prompts),
        )

    def micro_batch(self, pack: Pack, pad_id: int) -> MicroBatch:
        """Return these rows of these prompts, all of which are here."""
        prompts, rows = pack
        places = {row: i for i, row in enumerate(self.own)}
        rollout = self.rollout.take([places[row] for row in rows])
        width = max(self.facts[row].length for row in rows)
        mask = rollout.mask[:, :width]
        batch = replace(
            collate([self.examples[p] for p in prompts], pad_id),
            response_ids=rollout.response_ids[:, :width],
            loss_mask=mask,
            group_size=len(rows) // len(prompts),
        )
        targets = Targets(
            loss_mask=mask,
            advantages=self.advantages[torch.tensor(rows)],
            rollout_logprobs=rollout.logprobs[:, :width],
            sampled=mask & rollout.sampled[:, :width],
        )
        return batch, targets

    def metrics(self) -> dict[str, Any]:
        """Return mean rewards, mean length in tokens, mean repetition, and the shares refused and
        cut short."""
        rewards, facts = self.rewards, self.facts
        lengths = torch.tensor([one.length for one in facts])
        finished = torch.tensor([one.finished for one in facts])
        repeated = torch.tensor([one.repetition for one in facts], dtype=torch.float64)
        return {
            "reward": sum(reward.total for reward in rewards) / len(rewards),
            "accuracy": sum(reward.accuracy for reward in rewards) / len(rewards),
            "format": sum(reward.format for reward in rewards) / len(rewards),
            "reward_refused": sum(reward.refused for reward in rewards) / len(rewards),
            "response_length": float(lengths.float().mean()),
            "repetition": float(repeated.mean()),
            "truncated": float((~finished).float().mean()),
            "groups_kept": self.kept,
        }
