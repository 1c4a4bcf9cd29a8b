"""Even shares of work: nothing lost, nothing over the budget, the same on every rank."""

import random

import pytest

from r1v3.balance import even_packs, longest_first, pipeline_order, runs, shared_budget


def lengths(seed: int, count: int, largest: int = 100) -> list[int]:
    chosen = random.Random(seed)
    return [chosen.randint(0, largest) for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_longest_first_keeps_every_item_and_levels_the_parts(seed: int) -> None:
    """Fails if an item is lost or taken twice, or given to a part that had more than another."""
    costs, parts = lengths(seed, 5 * seed), 1 + seed % 7
    found = longest_first(costs, parts)
    assert len(found) == parts
    assert sorted(i for part in found for i in part) == list(range(len(costs)))
    assert all(part == sorted(part) for part in found)
    totals = [sum(costs[i] for i in part) for part in found]
    for part, total in zip(found, totals, strict=True):
        # The last and shortest item of a part went where least was.
        assert not part or total - min(costs[i] for i in part) <= min(totals)
    assert found == longest_first(list(costs), parts)


def test_longest_first_of_costs_that_are_known() -> None:
    """Fails if the longest does not come first, ties depend on chance, or `most` is passed."""
    assert longest_first([1, 9, 5, 3], 2) == [[1], [0, 2, 3]]
    assert longest_first([2, 2, 2, 2], 2) == [[0, 2], [1, 3]]
    assert longest_first([9, 1, 1, 1], 2, most=2) == [[0, 3], [1, 2]]
    assert longest_first([], 3) == [[], [], []]
    assert longest_first([0, 0, 0], 3) == [[0], [1], [2]]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("most", [None, 1, 3])
def test_packs_hold_the_budget_and_every_item(seed: int, most: int | None) -> None:
    """Fails if a pack would not fit the memory that was planned, or an item is lost."""
    sizes = lengths(seed, 3 * seed)
    budget = max([*sizes, 1]) + 13 * seed
    packs = even_packs(sizes, budget, most=most)
    assert sorted(i for pack in packs for i in pack) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in pack) <= budget for pack in packs)
    assert all(0 < len(pack) <= (most or len(sizes)) for pack in packs)
    consecutive = runs(sizes, budget, most=most or len(sizes) or 1)
    assert [i for run in consecutive for i in run] == list(range(len(sizes)))
    assert all(0 < len(run) <= (most or len(sizes)) for run in consecutive)
    assert all(sum(sizes[i] for i in run) <= budget for run in consecutive)


def test_packs_are_few_and_even() -> None:
    """Fails if a prompt is repeated for nothing, or one micro-batch waits for a full one."""
    assert even_packs([10] * 8, 50) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [len(pack) for pack in even_packs([10] * 7, 30)] == [3, 2, 2]
    assert even_packs([0, 0], 0) == [[0, 1]]
    assert runs([5, 5, 5], 10, most=9) == [range(2), range(2, 3)]
    for divide in (even_packs, lambda sizes, budget: runs(sizes, budget, most=2)):
        with pytest.raises(ValueError, match="11 does not fit a budget of 10"):
            divide([3, 11], 10)


def test_a_budget_is_lowered_for_replicas_and_never_below_a_sample() -> None:
    """Fails if replicas idle beside one full micro-batch, or a sample no longer fits."""
    assert shared_budget(1000, 30, 600, 1) == 600
    assert shared_budget(1000, 30, 600, 10) == 100
    assert shared_budget(1000, 300, 600, 10) == 300


def test_a_pipeline_is_filled_and_drained_by_small_micro_batches() -> None:
    """Fails if all stages wait for a long first or last one, or one is lost."""
    costs = [5.0, 1.0, 9.0, 3.0, 2.0, 7.0]
    assert pipeline_order(range(6), costs) == [1, 3, 5, 2, 0, 4]
    assert pipeline_order([2, 4], costs) == [4, 2]
    assert pipeline_order([], costs) == []
    assert pipeline_order([0, 1, 2], [1.0, 1.0, 1.0]) == [0, 2, 1]
