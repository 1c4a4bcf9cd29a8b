"""Sampling from the training weights themselves, with a KV cache over prompts x group."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from r1v3.data.batch import Batch, cut_ahead
from r1v3.data.encoding import collate
from r1v3.data.thoughts import BudgetedThought
from r1v3.engine.contract import Decoder
from r1v3.kernels import sample_tokens
from r1v3.rollout.batches import Batched
from r1v3.rollout.contract import Request, Rollout, Sampling, TokenRules, nothing
from r1v3.rollout.copies import ONE_COPY, Copies


class LocalSampler(Batched):
    """A `contract.Sampler` over live weights, which every call uses as they are then.

    Args:
        copies: whole models, of one or more ranks each; a completion does not depend on their
            number.
    """

    def __init__(self, decoder: Decoder, rules: TokenRules, copies: Copies = ONE_COPY) -> None:
        self.decoder, self.rules, self.copies = decoder, rules, copies

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
        for i, request in enumerate(requests):
            for sample in range(group_size):
                if (own := request.own_generator(sample)) is not None:
                    row = uniforms[i * group_size + sample]
                    torch.rand(len(row), generator=own, out=row)
        mine = self.copies.prompts(len(requests))
        if not mine:
            return nothing()
        prompts = collate([requests[i].example for i in mine], self.rules.pad_id)
        cut_ahead([prompts])
        return generate(
            self.decoder,
            prompts,
            sampling=replace(sampling, banned=(*self.rules.never, *sampling.banned)),
            rules=self.rules,
            group_size=group_size,
            uniforms=uniforms[mine.start * group_size : mine.stop * group_size],
        )

    def update_weights(self, tensors: Iterator[tuple[str, Tensor]], step: int) -> None:
        """Do nothing: the weights are the trainer's own."""

    def sleep(self) -> None:
        """Do nothing: the memory is the trainer's."""

    def wake(self) -> None:
        """Do nothing: it is always ready."""

    def close(self) -> None:
        """Do nothing: nothing is held."""


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: Batch,
    *,
    sampling: Sampling,
    rules: TokenRules,
    group_size: int = 1,
    uniforms: Tensor,
) -> Rollout:
    """Sample `group_size` completions of every prompt.

    Args:
        prompts: a batch whose responses are ignored.
        sampling: its `banned` tokens alone are never sampled, `rules.never` is not read.
        rules: the end-of-turn token among them is kept as a completion's last token.
        uniforms: float32 [P * group_size, max_tokens] in [0, 1), one random number per token.
    """
    logits = decoder.prefill(prompts, group_size, sampling.max_tokens)
    uniforms = uniforms.to(logits.device)
    state = _State(len(logits), sampling, rules, uniforms)
    banned = torch.tensor(sorted(set(sampling.banned)), dtype=torch.int64, device=logits.device)
    for step in range(sampling.max_tokens):
        tokens = _emit(logits, state, step, sampling, rules, banned)
        live = ~state.finished[state.active]
        if not live.any() or step + 1 == sampling.max_tokens:
            break
        if live.sum() <= 0.8 * len(live):
            keep = live.nonzero().squeeze(1)
            decoder.select(keep)
            state.active, tokens = state.active[keep], tokens[keep]
        logits = decoder.step(tokens)
    width = max(1, int(state.mask.sum(1).amax()) if len(state.mask) else 1)
    return Rollout(
        state.ids[:, :width].cpu(),
        state.mask[:, :width].cpu(),
        state.logprobs[:, :width].cpu(),
        state.entropy[:, :width].cpu(),
        state.sampled[:, :width].cpu(),
        state.finished.cpu(),
    )


class _State:
    """The completions so far, all rows of them; `active` are those that are still decoded."""

    def __init__(self, rows: int, sampling: Sampling, rules: TokenRules, uniforms: Tensor) -> None:
        shape, device = (rows, sampling.max_tokens), uniforms.device
        self.ids = torch.full(shape, rules.pad_id, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.entropy = torch.zeros(shape, device=device)
        self.mask = torch.zeros(shape, dtype=torch.bool, device=device)
        self.sampled = torch.zeros(shape, dtype=torch.bool, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.uniforms = uniforms
        self.thoughts: list[BudgetedThought] | None = None
        if sampling.budget is not None:
            settings = sampling.budget, rules.closing.forced, sampling.max_tokens
            self.thoughts = [BudgetedThought(*settings) for _ in range(rows)]
        self.active = torch.arange(rows, device=device)


def _emit(
    logits: Tensor,
    state: _State,
    step: int,
    sampling: Sampling,
    rules: TokenRules,
    banned: Tensor,
) -> Tensor:
    """Choose, record and return the next token of every active row."""
    rows = state.active
    forced = _forced_tokens(state)
    tokens, logprobs, entropy = sample_tokens(
        logits, state.uniforms[rows, step], temperature=sampling.temperature, banned=banned,
        forced=forced,
    )  # fmt: skip
    fresh = ~state.finished[rows]
    state.ids[rows, step] = torch.where(fresh, tokens, state.ids[rows, step])
    state.mask[rows, step] = fresh
    state.sampled[rows, step] = fresh if forced is None else fresh & (forced < 0)
    state.logprobs[rows, step] = torch.where(fresh, logprobs, 0.0)
    state.entropy[rows, step] = torch.where(fresh, entropy, 0.0)
    if state.thoughts is not None:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            state.thoughts[row].read(rules.closing.text(token))
    state.finished[rows] |= tokens == rules.stop_id
    return tokens


def _forced_tokens(state: _State) -> Tensor | None:
    """The token of every active row whose thought is being closed, -1 elsewhere; None: nowhere."""
    if state.thoughts is None:
        return None
    forced = [state.thoughts[row].forced_token() for row in state.active.tolist()]
    given = [-1 if token is None else token for token in forced]
    return torch.tensor(given, device=state.active.device)
