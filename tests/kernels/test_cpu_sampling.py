"""The compiled CPU kernels that draw tokens, on every instruction set, whole and in shards."""

import math

import pytest
import torch
from torch import Tensor

from r1v3 import _C
from r1v3.kernels import cpu, reference
from tests.kernels.compiled import DTYPES, each_capability, each_dtype

Results = tuple[Tensor, Tensor, Tensor]


def sampled(x: Tensor, uniforms: Tensor, temperature: Tensor, capability: str) -> Results:
    n = x.shape[0]
    tokens, logprobs, entropy = torch.full((n,), -7), torch.full((n,), 7.0), torch.full((n,), 7.0)
    _C.sample_tokens(
        logits=x.data_ptr(), dtype=DTYPES[x.dtype], n_rows=n, row_stride=x.stride(0),
        vocab=x.shape[1], first_id=0, temperature=temperature.data_ptr(), banned=0, n_banned=0,
        enabled=0, floor=0, num_threads=1, uniforms=uniforms.data_ptr(), forced=0,
        tokens=tokens.data_ptr(), logprobs=logprobs.data_ptr(), entropy=entropy.data_ptr(),
        capability=capability,
    )  # fmt: skip
    return tokens, logprobs, entropy


def a_batch(vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows at many offsets, one of them dead, one with NaN and one greedy."""
    x = 4 * torch.randn(24, vocab)
    x += torch.linspace(-300, 300, 24)[:, None]
    x[:, ::3] = -math.inf
    x[3] = -math.inf
    x[4, vocab // 2] = math.nan
    x[5, : vocab // 2] -= 40  # its second half alone is drawn from
    x[6, : vocab // 2] -= 1e4
    temperature = torch.linspace(0.3, 2.0, 24, dtype=torch.float64)
    temperature[7] = 0
    return x, torch.rand(24).double(), temperature


@each_capability
@each_dtype
def test_every_instruction_set_draws_the_same(dtype: torch.dtype, capability: str) -> None:
    """Fails if the vectors of one of them lose, repeat or reorder a logit."""
    for vocab in (1, 5, 16, 33, 511, 513, 2100):
        x, uniforms, temperature = a_batch(vocab)
        x = x.to(dtype)
        got = sampled(x, uniforms, temperature, capability)
        scale = reference.sample_scale(temperature)
        rows = reference.sample_statistics(x, scale, 0)[None]
        wanted = reference.sample_choose(x, scale, temperature == 0, 0, rows, 0, uniforms, None)
        assert torch.equal(got[0], wanted[0])
        for value, exact in zip(got[1:], wanted[1:], strict=True):
            torch.testing.assert_close(value, exact.float(), equal_nan=True, rtol=1e-6, atol=1e-7)


def in_shards(x: Tensor, bounds: list[int], draw: tuple[Tensor, ...], compiled: bool) -> Results:
    """The results of shards that begin at these columns, joined as the ranks join them."""
    uniforms, temperature, banned, forced = draw
    scale, greedy = reference.sample_scale(temperature), temperature == 0
    ends = [*bounds[1:], x.shape[1]]
    shards = [x[:, start:end] for start, end in zip(bounds, ends, strict=True)]
    kept = []
    for first, shard in zip(bounds, shards, strict=True):
        if compiled:
            kept.append(cpu.sample_statistics(shard, first, temperature, banned, None))
        else:
            legal = reference.sampled_logits(shard, first, banned, None)
            kept.append((legal, reference.sample_statistics(legal, scale, first)))
    rows = torch.stack([mine for _, mine in kept])
    found = []
    for rank, first in enumerate(bounds):
        if compiled:
            found.append(cpu.sample_choose(
                shards[rank], first, temperature, banned, None, kept[rank][0], rows, rank, uniforms,
                forced,
            ))  # fmt: skip
        else:
            found.append(reference.sample_choose(
                kept[rank][0], scale, greedy, first, rows, rank, uniforms, forced
            ))  # fmt: skip
    tokens, logprobs, entropy = (torch.stack(part) for part in zip(*found, strict=True))
    assert ((tokens >= 0).sum(0) == 1).all(), "a token has one owner"
    owner = tokens.argmax(0)[None]
    assert all(torch.equal(entropy[0].nan_to_num(9), other.nan_to_num(9)) for other in entropy)
    return tokens.gather(0, owner)[0], logprobs.gather(0, owner)[0], entropy[0]


@pytest.mark.parametrize("compiled", [True, False])
@each_dtype
def test_shards_change_no_bit(dtype: torch.dtype, compiled: bool) -> None:
    """Fails if a token or its log-probability depends on how the vocabulary is cut."""
    vocab = 1501
    x, uniforms, temperature = a_batch(vocab)
    x = x.to(dtype)
    banned = torch.cat([torch.randint(0, vocab, (40,)), torch.tensor([-1, vocab, 2**40])])
    forced = torch.full((24,), -1)
    forced[[8, 9, 10]] = torch.tensor([0, 750, 1500])
    draw = uniforms, temperature, banned, forced
    tokens, logprobs, entropy = in_shards(x, [0], draw, compiled)
    cuts = [sorted({0, *torch.randint(1, vocab, (k,)).tolist()}) for k in range(1, 9)]
    for bounds in ([0, 750], [0, 700, 1001], [0, 0, 1, 1501], [0, 376, 752, 1128], *cuts):
        got = in_shards(x, bounds, draw, compiled)
        assert torch.equal(got[0], tokens)
        assert torch.equal(got[1].nan_to_num(9), logprobs.nan_to_num(9))
        torch.testing.assert_close(got[2], entropy, equal_nan=True, rtol=1e-6, atol=1e-7)


@each_dtype
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    """Fails if a row is computed in another way by two threads, or one of them skips it."""
    threads = torch.get_num_threads()
    x, uniforms = torch.randn(9, 152_064).to(dtype), torch.rand(9).double()
    draw = torch.ones(9).double(), None, None, None, uniforms, None
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(cpu.sample_tokens(x, *draw))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
