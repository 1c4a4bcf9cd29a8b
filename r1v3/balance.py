"""Even shares of work: samples among micro-batches, micro-batches among replicas.

Everything here is a function of its arguments alone, so that every rank finds the same.
"""

import itertools
from collections.abc import Sequence

from r1v3.config import Stage

# Micro-batches of a replica for each stage of its pipeline; more repeat prompts for little.
PER_STAGE = 3

# Prompts of a micro-batch, each with its responses in it, by position.
Pack = list[tuple[int, list[int]]]


def longest_first(
    costs: Sequence[float], parts: int, *, most: int | None = None
) -> list[list[int]]:
    """Divide items among `parts`, the costliest first and each to the part with the least so far.

    Graham's LPT rule: the fullest part has at most 4/3 of what the best division gives it.

    Args:
        most: items of a part; None for any number. parts * most must be enough.

    Returns:
        The positions of each part's items, ascending; a part may be empty.
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    totals = [0.0] * parts
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        open_parts = [p for p in range(parts) if most is None or len(found[p]) < most]
        chosen = min(open_parts, key=lambda p: (totals[p], len(found[p]), p))
        found[chosen].append(item)
        totals[chosen] += costs[item]
    return [sorted(part) for part in found]


def pipeline_order(items: Sequence[int], costs: Sequence[float]) -> list[int]:
    """Order micro-batches for a 1F1B pipeline: the smallest at both ends, the largest between.

    The first fill the pipeline and the last drain it while stages wait; neighbors are alike, so
    that a stage's forward takes about as long as the backward it alternates with.
    """
    ascending = sorted(items, key=lambda i: (costs[i], i))
    return ascending[::2] + ascending[1::2][::-1]


def even_packs(sizes: Sequence[int], budget: int, *, most: int | None = None) -> list[list[int]]:
    """Divide items among few packs of at most `budget` each, as evenly as `longest_first` does.

    Args:
        most: items of a pack; None for any number.

    Raises:
        ValueError: one item alone is larger than the budget.
    """
    if not sizes:
        return []
    if max(sizes) > budget:
        raise ValueError(f"an item of {max(sizes)} does not fit a budget of {budget}")
    least = max(1, -(-sum(sizes) // max(1, budget)), -(-len(sizes) // (most or len(sizes))))
    # One item a pack always fits.
    for count in itertools.count(least):
        packs = longest_first(sizes, count, most=most)
        if all(sum(sizes[i] for i in pack) <= budget for pack in packs):
            return packs
    raise AssertionError("unreachable")


def runs(sizes: Sequence[int], budget: int, *, most: int) -> list[range]:
    """Divide items in their order: each run takes what fits `budget`, up to `most` items.

    Raises:
        ValueError: one item alone is larger than the budget.
    """
    if sizes and max(sizes) > budget:
        raise ValueError(f"an item of {max(sizes)} does not fit a budget of {budget}")
    found, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and (total + size > budget or i - start == most):
            found.append(range(start, i))
            start, total = i, 0
        total += size
    return [*found, range(start, len(sizes))] if sizes else []


def shared_budget(total: int, longest: int, budget: int, parts: int) -> int:
    """Return the budget of a pack with which `total` makes about `parts` packs, or more.

    Args:
        longest: the largest item, which a pack must hold.
        budget: most that a pack may hold.
    """
    return min(budget, max(longest, total // parts))


def pack_groups(
    prompts: Sequence[int],
    responses: Sequence[Sequence[int]],
    *,
    size: int,
    tokens: int,
    least: int = 1,
) -> list[Pack]:
    """Divide groups among micro-batches: small ones together, large ones each among several.

    Args:
        prompts: tokens of each prompt, which stand once in every micro-batch that holds some of its
            responses.
        responses: tokens of each prompt's responses, as inputs of the model.
        size: most prompts of a micro-batch; only whole groups stand together.
        tokens: most tokens of a micro-batch.
        least: micro-batches that are worth smaller ones than `tokens`.

    Raises:
        ValueError: a prompt with one of its responses has more than `tokens`.
    """
    if not prompts:
        return []
    totals = [prompt + sum(rows) for prompt, rows in zip(prompts, responses, strict=True)]
    longest = max(prompt + max(rows) for prompt, rows in zip(prompts, responses, strict=True))
    budget = shared_budget(sum(totals), longest, tokens, least)
    short = [p for p, total in enumerate(totals) if total <= budget]
    packs: list[Pack] = [
        [(short[i], list(range(len(responses[short[i]])))) for i in together]
        for together in even_packs([totals[p] for p in short], budget, most=size)
    ]
    for p, total in enumerate(totals):
        if total > budget:
            packs += [[(p, rows)] for rows in even_packs(responses[p], budget - prompts[p])]
    return packs


def worthwhile(config: Stage, replicas: int) -> int:
    """Return how many micro-batches a step should have, though fewer would hold its tokens.

    Every replica needs one, and a pipeline several, to fill and to even out.
    """
    stages = config.parallel.pipeline
    return replicas * (1 if stages == 1 else PER_STAGE * stages)
