import json
import math

import pytest
import torch
from torch import Tensor

from r1v3.trainer.critical_tokens import ENTROPY_BIN_EDGES, CriticalTokenMonitor

WAIT, HMM, OTHER = 7, 9, 3


def tensors(
    ids: list[list[int]], entropy: list[list[float]], mask: list[list[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor(ids), torch.tensor(entropy), torch.tensor(mask)


def test_means_at_and_after_critical_tokens_by_hand() -> None:
    """Entropy taken one position off would give other numbers for both means."""
    monitor = CriticalTokenMonitor([WAIT, HMM])
    monitor.update(
        *tensors(
            [[OTHER, WAIT, OTHER, HMM], [WAIT, WAIT, OTHER, OTHER]],
            [[0.5, 2.0, 1.0, 4.0], [0.25, 0.75, 7.0, 1.5]],
            [[1, 1, 1, 1], [1, 1, 1, 0]],
        )
    )
    result = monitor.result()
    assert result["critical_tokens"] == 4
    assert result["critical_entropy"] == (2.0 + 4.0 + 0.25 + 0.75) / 4
    # The last HMM has nothing after it: it counts at the token and not after it.
    assert result["critical_entropy_after"] == (1.0 + 0.75 + 7.0) / 3
    assert result["entropy"] == (0.5 + 2 + 1 + 4 + 0.25 + 0.75 + 7) / 7
    assert result["high_entropy_share"] == 1 / 7
    assert sum(result["entropy_histogram"]) == 7


def test_the_token_after_is_the_next_one_that_counts() -> None:
    """Masked positions between (a tool's answer, say) were not drawn from the model."""
    monitor = CriticalTokenMonitor([WAIT])
    monitor.update(*tensors([[WAIT, OTHER, WAIT, OTHER]], [[1.0, 50.0, 60.0, 3.0]], [[1, 0, 0, 1]]))
    result = monitor.result()
    assert (result["critical_tokens"], result["critical_entropy"]) == (1, 1.0)
    assert result["critical_entropy_after"] == 3.0


def test_what_is_masked_is_never_read() -> None:
    """Multiplying by the mask would turn NaN in padding into NaN for the whole step."""
    monitor = CriticalTokenMonitor([WAIT])
    nan = math.nan
    monitor.update(*tensors([[WAIT, OTHER, -100]], [[1.0, 2.0, nan]], [[1, 1, 0]]))
    monitor.update(*tensors([[WAIT, OTHER, -100]], [[nan, math.inf, nan]], [[0, 0, 0]]))
    result = monitor.result()
    assert result["entropy"] == 1.5 and result["critical_entropy_after"] == 2.0
    assert sum(result["entropy_histogram"]) == 2


def test_a_broken_entropy_at_a_counted_token_shows() -> None:
    monitor = CriticalTokenMonitor([WAIT])
    monitor.update(*tensors([[WAIT, OTHER]], [[1.0, math.nan]], [[1, 1]]))
    result = monitor.result()
    assert math.isnan(result["entropy"]) and math.isnan(result["critical_entropy_after"])
    assert result["critical_entropy"] == 1.0
    assert sum(result["entropy_histogram"]) == 1 and result["high_entropy_share"] == 0.0


def test_nothing_seen_is_none_and_not_zero() -> None:
    """0.0 would read as certainty, and such a checkpoint would enter the selection."""
    empty = {
        "critical_entropy": None,
        "critical_entropy_after": None,
        "critical_tokens": 0,
        "entropy": None,
        "high_entropy_share": None,
        "entropy_histogram": [0] * (len(ENTROPY_BIN_EDGES) - 1),
    }
    monitor = CriticalTokenMonitor([WAIT])
    assert monitor.result() == empty
    monitor.update(torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5), torch.zeros(0, 5))
    monitor.update(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0), torch.zeros(2, 0))
    assert monitor.result() == empty
    monitor.update(*tensors([[OTHER]], [[1.0]], [[1]]))
    assert monitor.result()["critical_entropy"] is None and monitor.result()["entropy"] == 1.0
    monitor.reset()
    assert monitor.result() == empty
    none_critical = CriticalTokenMonitor([])
    none_critical.update(*tensors([[WAIT]], [[1.0]], [[1]]))
    assert none_critical.result()["critical_tokens"] == 0


def random_batch(seed: int, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 12, (rows, length), generator=generator)
    entropy = torch.rand(rows, length, generator=generator).mul(4).pow(2)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    return ids, entropy, mask


def by_loops(ids: Tensor, entropy: Tensor, mask: Tensor) -> dict[str, object]:
    at, after, everything = [], [], []
    histogram = [0] * (len(ENTROPY_BIN_EDGES) - 1)
    for row in range(ids.shape[0]):
        kept = [t for t in range(ids.shape[1]) if mask[row, t]]
        for place, t in enumerate(kept):
            value = float(entropy[row, t])
            everything.append(value)
            index = sum(edge <= value for edge in ENTROPY_BIN_EDGES) - 1
            histogram[min(index, len(histogram) - 1)] += 1
            if int(ids[row, t]) in (WAIT, HMM):
                at.append(value)
                if place + 1 < len(kept):
                    after.append(float(entropy[row, kept[place + 1]]))
    return {
        "critical_entropy": pytest.approx(math.fsum(at) / len(at), rel=1e-14),
        "critical_entropy_after": pytest.approx(math.fsum(after) / len(after), rel=1e-14),
        "critical_tokens": len(at),
        "entropy": pytest.approx(math.fsum(everything) / len(everything), rel=1e-14),
        "high_entropy_share": sum(value > 6.8 for value in everything) / len(everything),
        "entropy_histogram": histogram,
    }


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.int64])
def test_agrees_with_plain_loops_however_the_batch_is_split(mask_dtype: torch.dtype) -> None:
    """float32 sums over micro-batches would differ in the seventh digit."""
    ids, entropy, mask = random_batch(0, 40, 33)
    expected = by_loops(ids, entropy, mask)
    for sizes in ([40], [1] * 40, [7, 30, 3]):
        monitor = CriticalTokenMonitor([WAIT, HMM, HMM])
        start = 0
        for size in sizes:
            rows = slice(start, start + size)
            monitor.update(ids[rows], entropy[rows], mask[rows].to(mask_dtype))
            start += size
        assert monitor.result() == expected


def test_many_small_micro_batches_lose_no_precision() -> None:
    """A running float32 sum of 0.1 has lost the third digit after a few million tokens."""
    monitor = CriticalTokenMonitor([WAIT])
    ids = torch.full((1000, 1000), WAIT)
    entropy = torch.full((1000, 1000), 0.1)
    for _ in range(5):
        monitor.update(ids, entropy, torch.ones(1000, 1000))
    exact = float(torch.tensor(0.1))
    assert monitor.result()["critical_entropy"] == pytest.approx(exact, rel=1e-13)
    assert monitor.result()["critical_tokens"] == 5_000_000


def test_histogram_edges_and_outliers() -> None:
    """A bin takes its lower edge; rounding below 0 and a huge vocabulary fall in the outer bins."""
    monitor = CriticalTokenMonitor([], bin_edges=[0.0, 1.0, 2.0, 4.0])
    monitor.update(*tensors([[0] * 7], [[-1e-7, 0.0, 1.0, 1.999, 2.0, 4.0, 99.0]], [[1] * 7]))
    assert monitor.result()["entropy_histogram"] == [2, 2, 3]
    assert monitor.bin_edges == (0.0, 1.0, 2.0, 4.0)


def test_default_edges_cover_the_vocabulary_and_the_report_threshold() -> None:
    assert ENTROPY_BIN_EDGES[0] == 0.0 and ENTROPY_BIN_EDGES[-1] >= math.log(152_064)
    assert 6.8 in ENTROPY_BIN_EDGES
    assert list(ENTROPY_BIN_EDGES) == sorted(set(ENTROPY_BIN_EDGES))


def test_the_threshold_can_be_changed() -> None:
    monitor = CriticalTokenMonitor([], high_entropy_nats=1.0)
    monitor.update(*tensors([[0, 0, 0]], [[0.5, 1.0, 1.5]], [[1, 1, 1]]))
    assert monitor.result()["high_entropy_share"] == 1 / 3


def test_works_on_what_training_has_and_keeps_no_graph() -> None:
    """int32 ids, and bfloat16 entropies that are part of the loss."""
    monitor = CriticalTokenMonitor([WAIT])
    entropy = torch.tensor([[0.5, 1.5]], dtype=torch.bfloat16, requires_grad=True)
    monitor.update(torch.tensor([[WAIT, OTHER]], dtype=torch.int32), entropy, torch.ones(1, 2))
    assert monitor.result()["critical_entropy"] == 0.5
    assert monitor._total is not None and not monitor._total.requires_grad
    json.dumps(monitor.result(), allow_nan=False)


def test_inputs_are_not_changed() -> None:
    ids, entropy, mask = random_batch(1, 3, 5)
    copies = [ids.clone(), entropy.clone(), mask.clone()]
    CriticalTokenMonitor([WAIT]).update(ids, entropy, mask)
    assert all(torch.equal(a, b) for a, b in zip((ids, entropy, mask), copies, strict=True))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="token_ids must be >= 0, got -100"):
        CriticalTokenMonitor([3, -100])
    for edges in ([0.0], [0.0, 0.0], [1.0, 0.5]):
        with pytest.raises(ValueError, match="bin_edges must be at least two increasing"):
            CriticalTokenMonitor([], bin_edges=edges)
    monitor = CriticalTokenMonitor([])
    long = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\[2, 3\], \[2, 4\] and \[2, 3\]"):
        monitor.update(long, torch.zeros(2, 4), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"one shape \[B, T\]"):
        monitor.update(long[0], torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="response_ids must be integers"):
        monitor.update(long.float(), torch.zeros(2, 3), torch.ones(2, 3))


def test_seeds_of_the_loop_comparison_hit_every_case() -> None:
    """The comparison above means little unless some critical tokens are last in their row."""
    ids, _, mask = random_batch(0, 40, 33)
    last = [max(t for t in range(33) if mask[row, t]) for row in range(40)]
    critical_last = [int(ids[row, t]) in (WAIT, HMM) for row, t in enumerate(last)]
    assert any(critical_last) and not all(critical_last)
