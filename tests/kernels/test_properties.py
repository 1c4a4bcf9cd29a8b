"""Properties of every row of logits: bounds, invariances, gradients that sum to zero."""
# mypy: disable-error-code="arg-type,union-attr,index"

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1v3.kernels import group_advantages, logprobs_and_entropy
from tests.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.usefixtures("backend")
# The backend is the same for all examples of a test.
often = settings(
    max_examples=3 if INTERPRETED else 60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    """Logits with bans and ties, one label per row and a temperature."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    n, vocab = draw(st.integers(1, 6)), draw(st.integers(1, 70))
    logits = draw(st.sampled_from([0.0, 0.1, 3.0, 40.0])) * torch.randn(n, vocab)
    logits[torch.rand(n, vocab) < draw(st.sampled_from([0.0, 0.3, 0.95]))] = -math.inf
    if draw(st.booleans()):
        logits = logits.round()
    ids = torch.randint(0, vocab, (n,))
    return logits, ids, draw(st.sampled_from([0.01, 0.7, 1.0, 3.0]))


@often
@given(rows())
def test_bounds(case: tuple[Tensor, Tensor, float]) -> None:
    """Fails if an entropy leaves [0, log V] or a log-probability is positive."""
    logits, ids, temperature = case
    logprobs, entropy = logprobs_and_entropy(logits, ids, temperature=temperature)
    legal = (logits > -math.inf).sum(-1).clamp(min=1)
    assert (logprobs <= 0).all()
    assert (entropy >= 0).all() and (entropy <= legal.log() + 2e-6).all()


@often
@given(rows())
def test_gradient_rows_sum_to_zero(case: tuple[Tensor, Tensor, float]) -> None:
    """Fails if a common shift of a row's logits would change the loss to first order."""
    logits, ids, temperature = case
    ids = logits.argmax(-1)  # a legal label: a banned one pulls with nothing to balance it
    logits.requires_grad_()
    logprobs, entropy = logprobs_and_entropy(logits, ids, temperature=temperature)
    (torch.where(logprobs.isfinite(), logprobs, 0.0).sum() + 0.3 * entropy.sum()).backward()
    assert logits.grad.isfinite().all()
    size = logits.grad.abs().sum(-1) + 1 / temperature
    assert (logits.grad.sum(-1).abs() <= 2e-6 * size).all()


@often
@given(rows(), st.sampled_from([-512.0, -1.0, 64.0, 1024.0]))
def test_shift_invariance(case: tuple[Tensor, Tensor, float], shift: float) -> None:
    """Fails if adding a number to a row changes its softmax."""
    logits, ids, _ = case
    logits = (logits * 64).round() / 64  # so that the shift itself is exact
    before = logprobs_and_entropy(logits, ids)
    after = logprobs_and_entropy(logits + shift, ids)
    for b, a in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@often
@given(rows())
def test_permutation_invariance(case: tuple[Tensor, Tensor, float]) -> None:
    """Fails if a token's place in the vocabulary matters."""
    logits, ids, temperature = case
    order = torch.randperm(logits.shape[1])
    before = logprobs_and_entropy(logits, ids, temperature=temperature)
    after = logprobs_and_entropy(logits[:, order], order.argsort()[ids], temperature=temperature)
    for b, a in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.skipif(INTERPRETED, reason="a row for every label takes the interpreter minutes")
@often
@given(rows())
def test_probabilities_sum_to_one(case: tuple[Tensor, Tensor, float]) -> None:
    """Fails if the normalizer misses or invents mass: sum over all labels of exp(logp) is 1."""
    logits, _, temperature = case
    vocab = logits.shape[1]
    every = logits[:, None].expand(-1, vocab, -1)
    labels = torch.arange(vocab).expand(logits.shape[0], -1)
    logprobs, entropy = logprobs_and_entropy(every, labels, temperature=temperature)
    alive = (logits > -math.inf).any(-1)
    total = logprobs.double().exp().sum(-1)
    torch.testing.assert_close(total, alive.double(), rtol=0, atol=1e-5)
    direct = -(logprobs.double().exp() * logprobs.clamp(min=-1e30)).sum(-1)
    torch.testing.assert_close(entropy[:, 0].double(), direct, rtol=0, atol=3e-5)


@often
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 2**31))
def test_advantages_are_centered_and_scaled(lengths: list[int], seed: int) -> None:
    """Fails if a group's advantages do not have mean 0 and std 1, or 0 where rewards tie."""
    torch.manual_seed(seed)
    rewards = torch.randint(0, 3, (sum(lengths),)).float()
    got = group_advantages(rewards, lengths)
    for part, r in zip(got.split(lengths), rewards.split(lengths), strict=True):
        if len(r) < 2 or bool((r == r[0]).all()):
            assert (part == 0).all()
        else:
            assert abs(part.mean()) < 1e-6 and abs(part.std() - 1) < 1e-5
