"""The division of prompts and completions among the ranks that sample."""

from dataclasses import dataclass

from r1v3.ranks import ALONE, Ranks, shard_range


@dataclass(frozen=True)
class Copies:
    """The copies of a model that sample, each by one or more ranks.

    All ranks of a copy hold the completions of its prompts. Each answers for a part of their rows,
    so that every row has one rank that reads it and sends it on.

    Attributes:
        of: the copy of every rank.
        ranks: all of the job.
    """

    of: tuple[int, ...] = (0,)
    ranks: Ranks = ALONE

    @classmethod
    def over(cls, ranks: Ranks, copy: int) -> "Copies":
        """Ask every rank for its copy; collective."""
        return cls(tuple(ranks.gather(copy)), ranks)

    def prompts(self, count: int, rank: int | None = None) -> range:
        """Return the prompts, of `count`, that the copy of a rank completes; None: of this one."""
        copy = self.of[self.ranks.rank if rank is None else rank]
        return shard_range(count, copy, max(self.of) + 1)

    def rows(self, count: int, group_size: int, rank: int | None = None) -> range:
        """Return the completions of `count` prompts that a rank answers for; None: this one."""
        rank = self.ranks.rank if rank is None else rank
        together = [other for other, copy in enumerate(self.of) if copy == self.of[rank]]
        prompts = self.prompts(count, rank)
        first = prompts.start * group_size
        part = shard_range(len(prompts) * group_size, together.index(rank), len(together))
        return range(first + part.start, first + part.stop)


ONE_COPY = Copies()
