"""The compiled host kernels for log-probability and entropy, against float64."""

import numpy as np
import pytest
import torch

from tests.kernels.host import (
    backward,
    each_capability,
    each_dtype,
    eager,
    eager_gradient,
    error,
    forward,
    make,
    results,
)

# One element, less than a vector, one vector, around the block, and a real unaligned vocabulary.
SIZES = [1, 7, 8, 1023, 1025, 4097, 151674]


@each_capability
@each_dtype
@pytest.mark.parametrize("vocab", SIZES)
def test_forward_is_as_accurate_as_float32_pytorch(
    capability: str, dtype: torch.dtype, vocab: int
) -> None:
    """Fails if a tail, a chunk boundary or the rescaling of the running sums is wrong."""
    logits, token_ids = make(3, vocab, dtype)
    for temperature in (1.0, 0.7):
        stats = forward(logits, token_ids, temperature=temperature, capability=capability)
        truth = eager(logits, token_ids, temperature, torch.float64)
        baseline = eager(logits, token_ids, temperature, torch.float32)
        for mine, exact, torch32 in zip(results(stats, temperature), truth, baseline, strict=True):
            assert error(mine, exact) <= 2 * error(torch32, exact) + 2e-6


@each_capability
@each_dtype
@pytest.mark.parametrize("vocab", SIZES)
def test_backward_is_as_accurate_as_float32_pytorch(
    capability: str, dtype: torch.dtype, vocab: int
) -> None:
    """Fails if the gradient, the label's correction or the rounding to the dtype is wrong."""
    logits, token_ids = make(3, vocab, dtype)
    grads = torch.randn(3), torch.randn(3)
    stats = forward(logits, token_ids, temperature=0.7, capability=capability)
    truth = eager_gradient(logits, token_ids, 0.7, grads, torch.float64)
    baseline = eager_gradient(logits, token_ids, 0.7, grads, torch.float32).to(dtype)
    out = torch.empty_like(logits)
    backward(
        logits, token_ids, stats, *grads, out=out, temperature=0.7, capability=capability
    )  # fmt: skip
    assert error(out, truth) <= 2 * error(baseline, truth) + 1e-6


@each_capability
@each_dtype
def test_rounding_is_to_nearest_even_everywhere(capability: str, dtype: torch.dtype) -> None:
    """Fails if a conversion truncates, or treats halves, subnormals or overflow differently.

    With p = 1, g_lp = 0, H = 0 and one unmasked element, dx of a label outside the row is
    -g_lp * p / T, so the upstream gradient itself is converted to the dtype.
    """
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32)
    halfway = (patterns[:6000] & 0xFFFF0000) | np.uint32(0x8000)
    small = generator.uniform(-(2.0**-13), 2.0**-13, 6000).astype(np.float32).view(np.uint32)
    half_ties = (patterns[:6000] & np.uint32(0xFFFFE000)) | np.uint32(0x1000)
    values = np.concatenate([patterns, halfway, small, half_ties]).view(np.float32)
    upstream = torch.from_numpy(values[np.isfinite(values)].copy())
    upstream = upstream[upstream.abs() > torch.finfo(torch.float32).smallest_normal]
    n = upstream.shape[0]
    logits = torch.zeros(n, 1, dtype=dtype)
    stats = torch.tensor([[0.0, 1.0, 0.0, 0.0]]).repeat(n, 1)
    out = torch.empty_like(logits)
    backward(logits, None, stats, upstream, None, out=out, capability=capability)
    assert torch.equal(out.squeeze(1), (-upstream).to(dtype))


@each_capability
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversion_of_every_16_bit_pattern(capability: str, dtype: torch.dtype) -> None:
    """Fails if loading misreads a subnormal, an infinity or the sign of a half or bfloat16."""
    logits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[:, None]
    stats = forward(logits, torch.zeros(2**16, dtype=torch.int64), capability=capability)
    numbers = ~logits.squeeze(1).isnan()
    assert torch.equal(stats[numbers, 0], logits.squeeze(1)[numbers].float())
    assert torch.equal(stats[numbers, 3], logits.squeeze(1)[numbers].float())
    assert stats[~numbers, 1].isnan().all()


@each_capability
def test_large_offset_costs_no_precision(capability: str) -> None:
    """Fails if exp or the weighted sum uses unshifted logits: 1e-3 off at an offset of 3000."""
    logits, token_ids = make(4, 20000, torch.float32)
    logits = logits + 3000
    stats = forward(logits, token_ids, capability=capability)
    for mine, exact in zip(
        results(stats), eager(logits, token_ids, 1.0, torch.float64), strict=True
    ):
        assert error(mine, exact) < 3e-6
    grads = torch.ones(4), torch.ones(4)
    out = torch.empty_like(logits)
    backward(logits, token_ids, stats, *grads, out=out, capability=capability)
    assert error(out, eager_gradient(logits, token_ids, 1.0, grads, torch.float64)) < 5e-6


@each_capability
def test_very_negative_logits(capability: str) -> None:
    """Fails if the running maximum starts at 0 or at some finite number that logits fall below."""
    logits, token_ids = make(2, 5000, torch.float32)
    logits = logits - 1e30
    stats = forward(logits, token_ids, capability=capability)
    assert error(results(stats)[1], torch.full((2,), 5000.0).double().log()) < 1e-6


@each_capability
@each_dtype
def test_constant_and_one_hot_rows(capability: str, dtype: torch.dtype) -> None:
    """Fails if H is not log V for a constant row, or is below 0 for a certain one."""
    logits = torch.zeros(2, 151674, dtype=dtype)
    logits[1, 77] = 1000.0
    stats = forward(logits, torch.tensor([0, 77]), temperature=0.01, capability=capability)
    _, entropy = results(stats, 0.01)
    assert abs(entropy[0].item() - np.log(151674)) < 1e-6
    assert entropy[1].item() == 0.0
