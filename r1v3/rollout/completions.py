"""Completions of an engine that is not trusted: checked one by one, then made into tensors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from r1v3.data.tokenizer import THINK_CLOSE
from r1v3.rollout.contract import Rollout, Sampling, TokenRules

# A log-prob is at most 0; float32 rounding may leave it a little above.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Completion:
    """One checked completion.

    Attributes:
        token_ids: with the end-of-turn token, if it was sampled.
        logprobs: of every token, in nats, at the sampling temperature and after bans; zero for a
            forced token.
        finished: whether the last token ends the turn.
        forced: range [start, stop) of the tokens that were not sampled.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finished: bool = False
    forced: tuple[int, int] = (0, 0)

    def followed_by(self, later: "Completion") -> "Completion":
        """Return this completion with its continuation."""
        return Completion(
            self.token_ids + later.token_ids,
            self.logprobs + later.logprobs,
            later.finished,
            self.forced,
        )


def check_completion(
    token_ids: object,
    logprobs: object,
    finish_reason: object,
    *,
    rules: TokenRules,
    banned: frozenset[int],
    max_tokens: int,
) -> Completion:
    """Check an engine's completion and return it.

    Args:
        token_ids, logprobs: equally long lists.
        finish_reason: "stop" if the end-of-turn token was sampled, "length" at the limit.
        banned: ids that must not have been sampled.
    Raises:
        ValueError: it is impossible under these settings; gives the reason.
    """
    if not isinstance(token_ids, list) or not isinstance(logprobs, list):
        raise ValueError("token ids and log-probs are not lists")
    if not 0 < len(token_ids) <= max_tokens:
        raise ValueError(f"{len(token_ids)} tokens, at least 1 and at most {max_tokens} asked for")
    if len(token_ids) != len(logprobs):
        raise ValueError(f"{len(token_ids)} tokens and {len(logprobs)} log-probs")
    for token in token_ids:
        if type(token) is not int or not 0 <= token < rules.size:
            raise ValueError(f"token id {token!r:.40} is not in [0, {rules.size})")
        if token in banned:
            raise ValueError(f"token id {token} was sampled although it is banned")
    for value in logprobs:
        if type(value) not in (int, float) or not math.isfinite(value) or value > _ROUNDING:
            raise ValueError(f"log-prob {value!r:.40} is not a finite number of at most 0")
    finished = token_ids[-1] == rules.stop_id
    if rules.stop_id in token_ids[:-1]:
        raise ValueError("tokens go on after the end of the turn")
    if not finished and len(token_ids) < max_tokens:
        raise ValueError(f"ended after {len(token_ids)} tokens without the end of the turn")
    if finish_reason != ("stop" if finished else "length"):
        raise ValueError(f"finish reason {finish_reason!r:.40} does not fit its tokens")
    return Completion(tuple(token_ids), tuple(min(float(v), 0.0) for v in logprobs), finished)


def check_prompt(found: object, wanted: Sequence[int], origin: str) -> None:
    """Check that an engine completed the prompt that the trainer trains on.

    Raises:
        ValueError: it completed another one; names the first difference and the settings to check.
            Another engine of the same set-up would fail as well.
    """
    if not isinstance(found, list):
        raise ValueError(
            f"{origin} does not say which prompt tokens it used; it must be a vLLM that knows "
            "return_token_ids"
        )
    if found == list(wanted):
        return
    first = next(
        (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b),
        min(len(found), len(wanted)),
    )
    raise ValueError(
        f"{origin} completed another prompt than the trainer's: {len(found)} tokens instead of "
        f"{len(wanted)}, different from position {first} on ({found[first : first + 4]} instead "
        f"of {list(wanted[first : first + 4])}). Tokenizer, chat template, tile size, largest "
        "number of tiles and thumbnail must be those of the model folder that is trained"
    )


def ban_list(sampling: Sampling, rules: TokenRules) -> tuple[int, ...]:
    """Return the sorted ids that must not be sampled.

    Raises:
        ValueError: there are more than the 1,024 of vLLM's model runner V2.
    """
    banned = sorted({*rules.never, *sampling.banned})
    if len(banned) > 1024:
        raise ValueError(f"{len(banned)} banned tokens; vLLM takes at most 1024")
    return tuple(banned)


def close_thoughts(
    first: Sequence[Completion], sampling: Sampling, rules: TokenRules
) -> dict[int, Completion]:
    """Return the completions that continue after the thought budget, by row.

    Args:
        first: completions of at most `sampling.budget` tokens.
    Returns:
        Every row that has not ended, with the forced closing tag where its thought is still open:
        the whole tag, in place of the last tokens where it would not fit behind them.
    """
    going_on = {}
    for row, completion in enumerate(first):
        if completion.finished:
            continue
        length = len(completion.token_ids)
        texts = rules.closing.texts
        written = "".join(texts[i] for i in completion.token_ids if i < len(texts))
        tag: tuple[int, ...] = ()
        room = sampling.max_tokens - len(rules.closing.forced)
        if THINK_CLOSE not in written and room >= 0:
            tag, length = rules.closing.forced, min(length, room)
        going_on[row] = Completion(
            completion.token_ids[:length] + tag,
            completion.logprobs[:length] + (0.0,) * len(tag),
            False,
            (length, length + len(tag)),
        )
    return going_on


def assemble(completions: Sequence[Completion], pad_id: int) -> Rollout:
    """Collect completions in a `Rollout`, with NaN entropies: the engine reports none."""
    rows = len(completions)
    width = max([1, *(len(c.token_ids) for c in completions)])
    ids = torch.full((rows, width), pad_id)
    logprobs, entropy = torch.zeros(rows, width), torch.zeros(rows, width)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    sampled = torch.zeros(rows, width, dtype=torch.bool)
    for row, completion in enumerate(completions):
        length = len(completion.token_ids)
        ids[row, :length] = torch.tensor(completion.token_ids, dtype=torch.int64)
        logprobs[row, :length] = torch.tensor(completion.logprobs)
        entropy[row, :length] = math.nan
        mask[row, :length] = sampled[row, :length] = True
        sampled[row, slice(*completion.forced)] = False
    finished = torch.tensor([c.finished for c in completions], dtype=torch.bool)
    return Rollout(ids, mask, logprobs, entropy, sampled, finished)
