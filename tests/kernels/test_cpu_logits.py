"""The compiled CPU kernels for log-probability and entropy, against float64."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from r1v3 import _C
from tests.kernels.compiled import (
    backward,
    each_capability,
    each_dtype,
    eager,
    eager_gradient,
    error,
    forward,
    make,
    outputs,
    results,
)

# One element, less than a vector, one vector, around the block, and real vocabularies.
SIZES = [1, 7, 8, 1023, 1025, 4097, 151674, 152064]


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


@each_capability
@each_dtype
@pytest.mark.parametrize("vocab", [1, 7, 1025, 20000])
def test_results_are_those_of_the_statistics(
    capability: str, dtype: torch.dtype, vocab: int
) -> None:
    """Fails if the finished results, or the cheaper sums without entropy, part from the sums."""
    logits, token_ids = make(4, vocab, dtype)
    logits[2] = -torch.inf
    token_ids[1] = -100
    stats = forward(logits, token_ids, temperature=0.7, capability=capability)
    logprobs, entropy = results(stats, 0.7)
    logprobs[1], logprobs[2], entropy[2] = 0.0, -torch.inf, 0.0
    got = outputs(logits, token_ids, temperature=0.7, capability=capability)
    torch.testing.assert_close(got[0], logprobs.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1], entropy.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(got[2][:, 0], stats[:, 0]) and torch.equal(got[2][:, 2], got[1])
    few = outputs(
        logits, token_ids, temperature=0.7, capability=capability, with_entropy=False
    )  # fmt: skip
    torch.testing.assert_close(few[0], got[0], rtol=0, atol=1e-6)
    assert (few[1] == 7.0).all()  # an absent entropy is not written


@each_capability
def test_a_large_offset_and_a_small_temperature(capability: str) -> None:
    """Fails if m or t are stored divided by T: 0.02 nats off at an offset of 3000 and T = 0.01."""
    logits, token_ids = make(4, 5000, torch.float32)
    logits = (logits * 0.01 * 64).round() / 64 + 3000
    token_ids = logits.argmax(-1)
    got = outputs(logits, token_ids, temperature=0.01, capability=capability)
    exact = eager(logits, token_ids, 0.01, torch.float64)
    assert error(got[0], exact[0]) < 2e-6 and error(got[1], exact[1]) < 2e-6
    stats = forward(logits, token_ids, temperature=0.01, capability=capability)
    grads = torch.ones(4), torch.ones(4)
    out = torch.empty_like(logits)
    backward(
        logits, token_ids, stats, *grads, out=out, temperature=0.01, capability=capability
    )  # fmt: skip
    truth = eager_gradient(logits, token_ids, 0.01, grads, torch.float64)
    assert error(out, truth) < 3e-6 * truth.abs().max().item()


@each_capability
@each_dtype
def test_gradients_past_the_caches_have_the_same_bits(capability: str, dtype: torch.dtype) -> None:
    """Fails if a large gradient, written by streaming stores from odd addresses, differs.

    8 MiB is where they begin; the rows of 1,048,579 start at every offset from a cache line.
    """
    logits, _ = make(5, 1_048_579, dtype)
    token_ids = torch.tensor([0, 1, 1_048_578, 31, -100])
    grads = torch.randn(5), torch.randn(5)
    stats = forward(logits, token_ids, capability=capability)
    storage = torch.full((5 * 1_048_583 + 4,), 7.0, dtype=dtype)
    large = storage[3:].as_strided((5, 1_048_579), (1_048_583, 1))
    backward(logits, token_ids, stats, *grads, out=large, capability=capability)
    for row in range(5):
        part = slice(row, row + 1)
        small = torch.empty_like(logits[part])
        given = (g[part].clone() for g in grads)
        backward(
            logits[part], token_ids[part].clone(), stats[part], *given, out=small,
            capability=capability,
        )  # fmt: skip
        assert torch.equal(large[part], small)
    between = torch.ones_like(storage, dtype=torch.bool)
    between[3:].as_strided((5, 1_048_579), (1_048_583, 1)).fill_(False)
    assert (storage[between] == 7.0).all()


@each_capability
@each_dtype
def test_a_far_logit_does_not_spoil_its_block(capability: str, dtype: torch.dtype) -> None:
    """Fails if z = -1e30, whose fraction is noise, gives a power of two that is not 0."""
    logits, token_ids = make(3, 9000, dtype)
    logits[0, 5000] = torch.finfo(dtype).min
    logits[1, 0] = torch.finfo(dtype).min
    logits[2, 1:] = torch.finfo(dtype).min
    for temperature in (50.0, 1.0, 1e-4):
        got = outputs(logits, token_ids, temperature=temperature, capability=capability)
        exact = eager(logits, token_ids, temperature, torch.float64)
        for mine, truth in zip(got[:2], exact, strict=True):
            torch.testing.assert_close(mine, truth.float(), rtol=1e-6, atol=6e-6)


@each_capability
def test_more_than_two_to_the_31_elements(capability: str) -> None:
    """Fails if the offset of a row or of its gradient wraps; untouched rows take no memory."""
    n, vocab = 14_200, 151_674
    logits = torch.empty(n, vocab, dtype=torch.bfloat16)
    out = torch.empty(n, vocab, dtype=torch.bfloat16)
    rows, token_ids = torch.tensor([n - 1]), torch.tensor([vocab - 1])
    logits[rows] = torch.randn(1, vocab).bfloat16()
    dense = logits[rows]
    stats = forward(logits, token_ids, rows=rows, capability=capability)
    assert torch.equal(stats, forward(dense, token_ids, capability=capability))
    one = torch.ones(1)
    backward(logits, token_ids, stats, one, one, out=out, rows=rows, capability=capability)
    expected = torch.empty_like(dense)
    backward(dense, token_ids, stats, one, one, out=expected, capability=capability)
    assert torch.equal(out[rows], expected)


@each_capability
@pytest.mark.parametrize("n", [0, 1, 127, 2**18, 2**18 + 129])
def test_the_probe_of_bandwidth_reads_everything(capability: str, n: int) -> None:
    """Fails if the yardstick of the benchmarks skips memory, and so flatters nobody but itself."""
    values = torch.randint(0, 9, (n,)).float()
    for threads in (1, 2):
        got = _C.read_sum(values.data_ptr(), n, threads, capability)
        assert got == values.double().sum().item()


def test_a_gradient_of_a_vector_is_no_call() -> None:
    """Fails if the compiler's limit of a file's growth takes the gradient out of the row's loop."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    command = ["nm", "-C", _C.__file__]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "row_gradient<" not in names:
        pytest.skip("the compiled kernels carry no names")
    source = Path(__file__).resolve().parents[2] / "csrc/cpu/rows_impl.h"
    if Path(_C.__file__).stat().st_mtime < source.stat().st_mtime:
        pytest.skip("the kernels were compiled before their source was changed")
    assert "GradientOf<1>::operator()(float __vector" not in names
