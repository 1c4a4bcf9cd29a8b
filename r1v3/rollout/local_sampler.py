"""Completions by the training weights themselves: the sampler that always works."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from r1v3.data.encoding import collate
from r1v3.engine.contract import Decoder
from r1v3.engine.ranks import ALONE, Ranks
from r1v3.rollout.contract import Request, TokenRules
from r1v3.rollout.local import Rollout, Sampling, generate, join


class LocalSampler:
    """See `contract.Sampler`; the decoder's weights are used as they are at each call.

    Args:
        replicas: processes with a whole model each; every one completes its share of the prompts
            and all get all completions. A completion does not depend on how many there are.
    """

    def __init__(self, decoder: Decoder, rules: TokenRules, replicas: Ranks = ALONE) -> None:
        self.decoder, self.rules, self.replicas = decoder, rules, replicas

    def complete(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        group_size: int = 1,
        generator: torch.Generator,
    ) -> Rollout:
        """See `contract.Sampler.complete`."""
        uniforms = torch.rand(len(requests) * group_size, sampling.max_tokens, generator=generator)
        mine, rollout = self.replicas.share(len(requests)), None
        if len(mine):
            examples = [requests[i].example for i in mine]
            rollout = generate(
                self.decoder,
                collate(examples, self.rules.pad_id, responses=[()] * len(examples)),
                sampling=replace(sampling, banned=(*self.rules.never, *sampling.banned)),
                closing=self.rules.closing,
                stop_id=self.rules.stop_id,
                pad_id=self.rules.pad_id,
                group_size=group_size,
                uniforms=uniforms[mine.start * group_size : mine.stop * group_size],
            )
        everyone = self.replicas.gather(rollout)
        return join([found for found in everyone if found is not None], self.rules.pad_id)

    def update_weights(self, tensors: Iterator[tuple[str, Tensor]], step: int) -> None:
        """Nothing to do: the weights are the trainer's own."""

    def sleep(self) -> None:
        """Nothing to give up."""

    def wake(self) -> None:
        """Always ready."""

    def close(self) -> None:
        """Nothing is held."""
