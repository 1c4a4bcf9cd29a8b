"""Completions of an engine that is not trusted: checked one by one, then made into tensors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from r1v3.data.thoughts import BudgetedThought, follow_tags, inside_tag
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
        forced: ranges [start, stop) of tokens that were not sampled.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finished: bool = False
    forced: tuple[tuple[int, int], ...] = ()

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


def complete_thoughts(
    found: Sequence[Completion],
    sampling: Sampling,
    rules: TokenRules,
    go_on: Callable[[dict[int, Completion], int], Sequence[Completion]],
) -> list[Completion]:
    """Return completions whose every thought is closed where its budget is spent.

    A completion is cut there, whatever followed, and goes on behind the forced tag: a thought that
    is opened again has its budget too.

    Args:
        found: completions of at most `sampling.budget` tokens.
        go_on: continues unfinished completions, by row, with all tokens that are left to each; its
            second argument counts the calls from 0.
    """
    rows, calls = list(found), 0
    while True:
        rows = [close_thought(row, sampling, rules) or row for row in rows]
        open_rows = {
            i: row
            for i, row in enumerate(rows)
            if not row.finished and len(row.token_ids) < sampling.max_tokens
        }
        if not open_rows:
            return rows
        later = go_on(open_rows, calls)
        for i, continuation in zip(open_rows, later, strict=True):
            rows[i] = rows[i].followed_by(continuation)
        calls += 1


def close_thought(
    completion: Completion, sampling: Sampling, rules: TokenRules
) -> Completion | None:
    """Return a completion cut where a thought has spent its budget, with the forced closing tag.

    None where no thought has. As in local sampling, a tag that is being written is not cut, and
    the forced one comes in time to be whole.
    """
    assert sampling.budget is not None
    texts, tag = rules.closing.texts, rules.closing.forced
    # The last place at which the tag still fits.
    last = sampling.max_tokens - len(tag)
    starts = {start for start, _ in completion.forced}
    due, closed, written = min(sampling.budget, last), False, ""
    for place in range(len(completion.token_ids) + (not completion.finished)):
        if place == due and not closed and place not in starts:
            if place == last or not inside_tag(written):
                return Completion(
                    completion.token_ids[:place] + tag,
                    completion.logprobs[:place] + (0.0,) * len(tag),
                    False,
                    (
                        *(part for part in completion.forced if part[0] < place),
                        (place, place + len(tag)),
                    ),
                )
            due += 1
        if place == len(completion.token_ids):
            break
        token = completion.token_ids[place]
        text = texts[token] if token < len(texts) else ""
        written, closed, reopened = follow_tags(written + text, closed)
        if reopened:
            due = min(place + 1 + sampling.budget, last)
    return None


def closed_by_server(
    completion: Completion, budget: int, max_tokens: int, rules: TokenRules
) -> Completion:
    """Return a completion with the ranges in which a server has closed its thoughts.

    Raises:
        ValueError: a thought went on beyond its budget; names the token.
    """
    thought = BudgetedThought(budget, rules.closing.forced, max_tokens)
    starts: list[int] = []
    forced = rules.closing.forced
    for place, token in enumerate(completion.token_ids):
        wanted = thought.forced_token()
        if wanted is not None:
            if token != wanted:
                raise ValueError(f"token {place} goes on with a thought of {budget} tokens")
            if not starts or place >= starts[-1] + len(forced):
                starts.append(place)
        thought.read(rules.closing.text(token))
    ranges = tuple((start, start + len(forced)) for start in starts)
    logprobs = list(completion.logprobs)
    for start, stop in ranges:
        logprobs[start:stop] = [0.0] * (stop - start)
    return replace(completion, logprobs=tuple(logprobs), forced=ranges)


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
        for start, stop in completion.forced:
            sampled[row, start:stop] = False
    finished = torch.tensor([c.finished for c in completions], dtype=torch.bool)
    return Rollout(ids, mask, logprobs, entropy, sampled, finished)
