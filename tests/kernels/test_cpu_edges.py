"""The compiled CPU kernels on masked, broken, empty and oddly placed logits."""

import pytest
import torch

from r1v3 import _C
from tests.kernels.compiled import (
    CAPABILITIES,
    backward,
    each_capability,
    each_dtype,
    eager,
    error,
    forward,
    make,
    results,
)


@each_capability
@each_dtype
def test_minus_infinity_is_a_masked_token(capability: str, dtype: torch.dtype) -> None:
    """Fails if -inf makes NaN: in the first chunk, in part of a chunk, or everywhere but one."""
    logits, token_ids = make(4, 9001, dtype)
    logits[0, :5000] = -torch.inf
    logits[1, 5000:] = -torch.inf
    logits[2, ::2] = -torch.inf
    logits[3] = -torch.inf
    logits[3, 8999] = 2.0
    token_ids[:] = torch.tensor([6000, 1, 7, 8999])
    stats = forward(logits, token_ids, capability=capability)
    for mine, exact in zip(
        results(stats), eager(logits, token_ids, 1.0, torch.float64), strict=True
    ):
        assert error(mine, exact) < 3e-6
    assert stats[3].tolist() == [2.0, 1.0, 0.0, 2.0]
    grads = torch.randn(4), torch.randn(4)
    out = torch.empty_like(logits)
    backward(logits, token_ids, stats, *grads, out=out, capability=capability)
    assert out.isfinite().all()
    assert (out[logits == -torch.inf] == 0).all()
    assert out[3, 8999] == 0


@each_capability
@each_dtype
def test_a_banned_label_keeps_its_gradient(capability: str, dtype: torch.dtype) -> None:
    """Fails if the label's 1 is lost, or turned into NaN, where the label's p is 0."""
    logits, token_ids = make(1, 100, dtype)
    logits[0, 5] = -torch.inf
    token_ids[0] = 5
    stats = forward(logits, token_ids, capability=capability)
    out = torch.empty_like(logits)
    grads = torch.tensor([0.5]), torch.tensor([1.0])
    backward(logits, token_ids, stats, *grads, out=out, capability=capability)
    assert stats[0, 3] == -torch.inf
    assert out[0, 5] == 0.5
    assert out.isfinite().all()


@each_capability
@each_dtype
def test_a_row_of_minus_infinity(capability: str, dtype: torch.dtype) -> None:
    """Fails if an all-masked row gives NaN statistics or a gradient."""
    logits = torch.full((2, 5000), -torch.inf, dtype=dtype)
    token_ids = torch.tensor([3, -100])
    stats = forward(logits, token_ids, capability=capability)
    assert stats[:, 0].tolist() == [-torch.inf, -torch.inf]
    assert stats[:, 1:3].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert stats[:, 3].tolist() == [-torch.inf, 0.0]
    out = torch.full_like(logits, 5.0)
    ones = torch.ones(2)
    backward(logits, token_ids, stats, ones, ones, out=out, capability=capability)
    assert (out == 0).all()


@each_capability
@each_dtype
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 4095, 4096, 9000])
def test_nan_and_plus_infinity_reach_the_result(
    capability: str, dtype: torch.dtype, poison: float, place: int
) -> None:
    """Fails if a maximum or a skipped chunk hides a broken logit."""
    logits, token_ids = make(2, 9001, dtype)
    logits[0, place] = poison
    masked = torch.full((1, 9001), -torch.inf, dtype=dtype)
    masked[0, place] = poison
    logits = torch.cat([logits, masked])
    token_ids = torch.tensor([5, 5, 5])
    stats = forward(logits, token_ids, capability=capability)
    assert stats[[0, 2], 1].isnan().all()
    assert stats[1].isfinite().all()
    out = torch.zeros_like(logits)
    ones = torch.ones(3)
    backward(logits, token_ids, stats, ones, ones, out=out, capability=capability)
    assert out[[0, 2]].isnan().all()
    assert out[1].isfinite().all()


@each_capability
@each_dtype
@pytest.mark.parametrize("label", [-100, -1, 50, 2**40])
def test_a_label_outside_the_row_adds_nothing(
    capability: str, dtype: torch.dtype, label: int
) -> None:
    """Fails if a label of another shard, or -100, is read or written out of bounds."""
    logits, _ = make(2, 50, dtype)
    token_ids = torch.tensor([label, 3])
    stats = forward(logits, token_ids, capability=capability)
    assert stats[0, 3] == 0.0
    assert torch.equal(stats[:, :3], forward(logits, capability=capability)[:, :3])
    grads = torch.ones(2), torch.zeros(2)
    out = torch.empty_like(logits)
    backward(logits, token_ids, stats, *grads, out=out, capability=capability)
    p = logits[0].double().softmax(-1)
    assert error(out[0], -p) <= torch.finfo(dtype).eps * p.max().item() + 5e-7


@each_capability
def test_temperature_zero_counts_the_maxima(capability: str) -> None:
    """Fails if temperature 0 gives NaN instead of its limit: uniform over the maxima."""
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf], [5.0, 1.0, 2.0, 3.0]])
    token_ids = torch.tensor([1, 2])
    stats = forward(logits, token_ids, temperature=0.0, capability=capability)
    assert stats.tolist() == [[3.0, 2.0, 0.0, 3.0], [5.0, 1.0, 0.0, 2.0]]
    out = torch.full_like(logits, 9.0)
    ones = torch.ones(2)
    backward(logits, token_ids, stats, ones, ones, out=out, temperature=0.0, capability=capability)
    assert (out == 0).all()


@each_capability
@each_dtype
def test_rows_strides_and_unaligned_bases(capability: str, dtype: torch.dtype) -> None:
    """Fails if rows, the row stride or the base address are assumed dense or aligned."""
    storage = torch.full((7 * 1111 + 5,), 50.0).to(dtype)
    logits = storage[3:].as_strided((7, 1025), (1111, 1))
    logits.copy_(torch.randn(7, 1025))
    rows = torch.tensor([6, 0, 3])
    token_ids = torch.tensor([1024, 0, 17])
    dense = logits[rows].clone()
    expected = forward(dense, token_ids, capability=capability)
    stats = forward(logits, token_ids, rows=rows, capability=capability)
    assert torch.equal(stats, expected)
    grads = torch.randn(3), torch.randn(3)
    out_storage = torch.full((7 * 1030 + 1,), 7.0).to(dtype)
    out = out_storage[1:].as_strided((7, 1025), (1030, 1))
    backward(logits, token_ids, stats, *grads, out=out, rows=rows, capability=capability)
    expected_out = torch.empty_like(dense)
    backward(dense, token_ids, stats, *grads, out=expected_out, capability=capability)
    assert torch.equal(out[rows], expected_out)
    untouched = torch.ones_like(out_storage, dtype=torch.bool)
    for row in rows.tolist():
        untouched[1 + row * 1030 : 1 + row * 1030 + 1025] = False
    assert (out_storage[untouched] == 7.0).all()


@each_capability
def test_padded_columns_are_not_read(capability: str) -> None:
    """Fails if columns beyond the true vocabulary take part: here they are NaN."""
    logits, token_ids = make(3, 1024, torch.bfloat16)
    padded = torch.full((3, 1100), torch.nan, dtype=torch.bfloat16)
    padded[:, :1024] = logits
    stats = forward(padded, token_ids, vocab=1024, capability=capability)
    assert torch.equal(stats, forward(logits, token_ids, capability=capability))


@each_capability
@each_dtype
@pytest.mark.parametrize("vocab", [1, 7, 1025])
def test_in_place_backward_equals_out_of_place(
    capability: str, dtype: torch.dtype, vocab: int
) -> None:
    """Fails if a logit, the label's above all, is read after its gradient was written there."""
    logits, token_ids = make(3, vocab, dtype)
    grads = torch.randn(3), torch.randn(3)
    stats = forward(logits, token_ids, capability=capability)
    expected = torch.empty_like(logits)
    backward(logits, token_ids, stats, *grads, out=expected, capability=capability)
    backward(logits, token_ids, stats, *grads, out=logits, capability=capability)
    assert torch.equal(logits, expected)


@each_capability
def test_rows_without_upstream_gradient_are_zero_unread(capability: str) -> None:
    """Fails if a row that no loss uses is read: its NaN would then reach the optimizer."""
    logits, token_ids = make(2, 100, torch.float32)
    stats = forward(logits, token_ids, capability=capability)
    logits[0] = torch.nan
    out = torch.full_like(logits, 3.0)
    grad = torch.tensor([0.0, 1.0])
    backward(logits, token_ids, stats, grad, grad, out=out, capability=capability)
    assert (out[0] == 0).all() and (out[1] != 0).any()
    backward(logits, token_ids, stats, None, None, out=out, capability=capability)
    assert (out == 0).all()


def test_a_row_does_not_depend_on_threads_or_on_the_other_rows() -> None:
    """Fails if work is split by the thread count, or a row by its place in the batch."""
    logits, token_ids = make(37, 60001, torch.bfloat16)
    grads = torch.randn(37), torch.randn(37)
    for capability in CAPABILITIES:
        stats = forward(logits, token_ids, capability=capability)
        out = torch.empty_like(logits)
        backward(logits, token_ids, stats, *grads, out=out, capability=capability)
        for threads in (2, 3, 8):
            again = forward(logits, token_ids, threads=threads, capability=capability)
            assert torch.equal(again, stats)
            other = torch.empty_like(logits)
            backward(
                logits,
                token_ids,
                stats,
                *grads,
                out=other,
                threads=threads,
                capability=capability,
            )
            assert torch.equal(other, out)
        for row in (0, 17, 36):
            alone = logits[row : row + 1].clone()
            one = forward(alone, token_ids[row : row + 1].clone(), capability=capability)
            assert torch.equal(one[0], stats[row])


def test_no_rows_and_no_columns() -> None:
    """Fails if an empty shard or an empty batch touches memory or divides by zero."""
    assert forward(torch.empty(0, 10)).shape == (0, 4)
    stats = forward(torch.empty(2, 0), torch.tensor([0, 1]))
    assert stats.tolist() == [[-torch.inf, 0.0, 0.0, 0.0]] * 2
    ones = torch.ones(2)
    backward(torch.empty(2, 0), None, stats, ones, ones, out=torch.empty(2, 0))


def test_bad_arguments_name_the_value() -> None:
    """Fails if a wrong code reaches the kernels, where it would be read as float16."""
    logits = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="temperature must be >= 0, got -1"):
        forward(logits, temperature=-1.0)
    with pytest.raises(ValueError, match="capability must be one of .*portable, got sse9"):
        forward(logits, capability="sse9")
    with pytest.raises(ValueError, match="dtype must be 0 .*got 7"):
        _C.row_statistics(logits.data_ptr(), 7, 1, 4, 4, 0, 0, 1.0, 0, 1)
