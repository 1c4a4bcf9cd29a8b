"""Prompts in batches of about equal length, for engines that complete a batch as a whole."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch

from r1v3.rollout.contract import Request, Rollout, Sampler, Sampling
from r1v3.rollout.exchange import everywhere

WINDOW_BATCHES = 4


class Batched:
    """The `stream` of a sampler that waits for all of a batch.

    A few batches are drawn at a time and divided in order of the prompts' lengths.
    """

    def stream(
        self: Sampler,
        requests: Iterable[Request],
        sampling: Sampling,
        *,
        group_size: int = 1,
        generator: torch.Generator,
        batch_prompts: int,
    ) -> Iterator[tuple[list[int], Rollout]]:
        """See `contract.Sampler.stream`."""
        numbered = enumerate(requests)
        while window := list(islice(numbered, WINDOW_BATCHES * batch_prompts)):
            window.sort(key=lambda pair: len(pair[1].example.prompt_ids))
            for start in range(0, len(window), batch_prompts):
                batch = window[start : start + batch_prompts]
                rollout = self.complete(
                    [request for _, request in batch],
                    sampling,
                    group_size=group_size,
                    generator=generator,
                )
                pad_id = self.rules.pad_id
                whole = everywhere(rollout, self.copies, len(batch), group_size, pad_id)
                yield [number for number, _ in batch], whole
