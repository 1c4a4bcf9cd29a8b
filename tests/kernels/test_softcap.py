"""A scale and a soft cap on the logits of a language head, on every implementation here."""
# mypy: disable-error-code="arg-type,union-attr,index"

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.kernels import (
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs_and_entropy,
    logprobs_and_entropy,
    reference,
)
from r1v3.kernels.linear import tiles
from tests.kernels.budget import assert_within_budget
from tests.kernels.conftest import CPU_BACKENDS, INTERPRETED

pytestmark = pytest.mark.usefixtures("backend")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="not about the arithmetic of a kernel")
B, T, WIDTH, VOCAB = 2, 4, 24, 140 if INTERPRETED else 300
CAPPED = {"logit_scale": 0.8, "softcap": 5.0}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of several tiles of 128 columns and 3 rows, in chunks of 3 rows."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)
    monkeypatch.setattr(tiles, "CPU_BLOCK_ROWS", 3)
    monkeypatch.setattr(tiles, "CPU_WORKSPACE", 3 * VOCAB * 4)


def head(dtype: torch.dtype) -> list[Tensor]:
    """Hidden states, weight and bias with logits from nearly 0 to far beyond the cap."""
    spread = torch.tensor([0.01, 1.0, 3.0, 0.3])[:, None]
    tensors = spread * torch.randn(B, T, WIDTH), torch.randn(VOCAB, WIDTH), torch.randn(VOCAB)
    return [tensor.to(dtype) for tensor in tensors]


def run(function: Any, leaves: list[Tensor], ids: Tensor, **options: Any) -> list[Tensor]:
    """Both outputs, and the gradients of hidden, weight and bias."""
    hidden, weight, bias = (leaf.detach().clone().requires_grad_() for leaf in leaves)
    logprobs, entropy = function(hidden, weight, ids, bias=bias, **options)
    share = torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)
    ((share * logprobs).sum() + 0.3 * (entropy * torch.arange(T)).sum()).backward()
    return [logprobs.detach(), entropy.detach(), hidden.grad, weight.grad, bias.grad]


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_float64(dtype: torch.dtype, k: int | None) -> None:
    """Fails if the cap, its derivative or the scale is wrong, at the labels or elsewhere."""
    if INTERPRETED and (k is None or dtype == torch.float32):
        pytest.skip("the interpreter takes seconds")
    leaves = head(dtype)
    ids = torch.randint(0, VOCAB - 10, (B, T) if k is None else (B, T, k))
    ids[0, 1] = -100
    options = {**CAPPED, "temperature": 0.7, "vocab_size": VOCAB - 10}
    formula = reference.linear_logprobs_and_entropy
    truth = run(formula, [leaf.double() for leaf in leaves], ids, **options)
    baseline = run(formula, leaves, ids, **options)
    got = run(linear_logprobs_and_entropy, leaves, ids, **options)
    names = ("logprobs", "entropy", "hidden", "weight", "bias")
    for name, g, t, b in zip(names, got, truth, baseline, strict=True):
        rounding = 2.0**-8 * t.abs().max().item() if g.dtype == torch.bfloat16 else 0.0
        assert_within_budget(name, g, t, b, 2e-5 + rounding)


def test_the_loss_is_the_composition() -> None:
    """Fails if the one-pass loss leaves the cap or the scale out of its gradient."""
    hidden, weight, _ = head(torch.float32)
    ids, mask = torch.randint(0, VOCAB, (B, T)), torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0]])
    old, advantages = torch.full((B, T), -5.5), torch.tensor([1.0, -0.5])
    degrees, found = torch.rand(B, T) + 0.5, []
    for composed in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if composed:
            logprobs, _ = reference.linear_logprobs_and_entropy(
                h, w, ids, temperature=degrees, loss_mask=mask, **CAPPED
            )
            loss, _ = grpo_loss(logprobs, old, advantages, mask)
        else:
            loss, _ = linear_grpo_loss(
                h, w, ids, old, advantages, mask, temperature=degrees, **CAPPED
            )
        loss.backward()
        found.append((loss.detach(), h.grad, w.grad))
    for one, composition in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(one, composition, rtol=2e-5, atol=2e-6)


@not_interpreted
def test_a_scale_alone_is_a_temperature_and_a_wide_cap_is_none() -> None:
    """Fails if the named way around, a temperature, or the limit of a cap is something else."""
    leaves, ids = head(torch.float32), torch.randint(0, VOCAB, (B, T))
    plain = run(linear_logprobs_and_entropy, leaves, ids, temperature=2.0)
    scaled = run(linear_logprobs_and_entropy, leaves, ids, temperature=0.5, logit_scale=0.25)
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))
    wide = run(linear_logprobs_and_entropy, leaves, ids, temperature=2.0, softcap=1e5)
    for a, b in zip(wide, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@not_interpreted
def test_logits_are_capped_by_the_caller() -> None:
    """Fails if what the documentation tells for the ops on logits is another softmax."""
    hidden, weight, _ = head(torch.float32)
    ids = torch.randint(0, VOCAB, (B, T))
    logits = 5 * torch.tanh(0.8 * (hidden @ weight.T) / 5)
    want = linear_logprobs_and_entropy(hidden, weight, ids, temperature=0.7, **CAPPED)
    for a, b in zip(logprobs_and_entropy(logits, ids, temperature=0.7), want, strict=True):
        torch.testing.assert_close(a, b)


@not_interpreted
@pytest.mark.parametrize("k", [None, 3])
def test_gradcheck(backend: str, k: int | None) -> None:
    """Fails if a gradient in closed form is not the derivative."""
    if backend not in CPU_BACKENDS[:1]:
        pytest.skip("float64 is the reference's")
    hidden = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 7, (3,) if k is None else (3, k))
    degrees = torch.tensor([0.4, 2.0, 1.0])

    def of_head(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        options = {"logit_scale": 1.5, "softcap": 1.2, "temperature": degrees}
        return linear_logprobs_and_entropy(h, w, ids, **options)

    assert torch.autograd.gradcheck(of_head, (hidden, weight))


@not_interpreted
def test_rows_do_not_depend_on_each_other() -> None:
    """Fails if a row's cap has other bits at another place of a tile."""
    hidden, weight, _ = head(torch.float32)
    hidden, ids = hidden.view(-1, WIDTH), torch.randint(0, VOCAB, (B * T,))
    hidden[5], ids[5] = hidden[2], ids[2]
    logprobs, entropy = linear_logprobs_and_entropy(hidden, weight, ids, row_tile=4, softcap=3.0)
    assert logprobs[5] == logprobs[2] and entropy[5] == entropy[2]
    alone = linear_logprobs_and_entropy(hidden[5:6], weight, ids[5:6], row_tile=4, softcap=3.0)
    assert torch.equal(alone[0], logprobs[5:6]) and torch.equal(alone[1], entropy[5:6])


def test_extremes() -> None:
    """Fails if logits at the cap, NaN or temperature 0 give something that is not their limit."""
    hidden = torch.tensor([[1.0], [-1.0], [math.nan]], requires_grad=True)
    weight, ids = torch.tensor([[1e30], [1.0], [-1e30]]), torch.tensor([0, 0, 0])
    logprobs, entropy = linear_logprobs_and_entropy(hidden, weight, ids, softcap=2.0)
    y = torch.tensor([[2.0, 2 * math.tanh(0.5), -2.0], [-2.0, -2 * math.tanh(0.5), 2.0]])
    torch.testing.assert_close(logprobs[:2], y.log_softmax(-1)[:, 0])
    assert logprobs[2].isnan() and entropy[2].isnan()
    logprobs[:2].sum().backward()
    assert hidden.grad[:2].isfinite().all() and hidden.grad[2] == 0
    coldest, _ = linear_logprobs_and_entropy(hidden[:2], weight, ids[:2], softcap=2, temperature=0)
    assert coldest.tolist() == [0.0, -math.inf]


def test_wrong_values_raise() -> None:
    """Fails if a cap or scale without meaning goes through, or the message does not name it."""
    h, w, ids = torch.randn(1, 3, 6), torch.randn(9, 6), torch.zeros(1, 3, dtype=torch.int64)
    for name in ("logit_scale", "softcap"):
        for value in (0.0, -1.0, math.inf, math.nan):
            message = f"{name} must be positive and finite, got {value}"
            with pytest.raises(ValueError, match=message):
                linear_logprobs_and_entropy(h, w, ids, **{name: value})
            with pytest.raises(ValueError, match=message):
                linear_grpo_loss(h, w, ids, None, torch.ones(1), torch.ones(1, 3), **{name: value})
