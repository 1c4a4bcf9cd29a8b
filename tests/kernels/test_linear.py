"""lm_head to log-probability, entropy and loss, on every implementation this process can run."""
# mypy: disable-error-code="arg-type,union-attr,index"

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.kernels import (
    grpo_loss,
    linear,
    linear_grpo_loss,
    linear_logprobs_and_entropy,
    logprobs_and_entropy,
)
from tests.kernels.budget import assert_within_budget

pytestmark = pytest.mark.usefixtures("backend")


def make(dtype: torch.dtype = torch.float32, vocab: int = 211) -> dict[str, Any]:
    ids = torch.randint(0, 200, (3, 8))
    ids[0, 2] = -100
    return {
        "hidden": torch.randn(3, 8, 24).to(dtype),
        "weight": torch.randn(vocab, 24).to(dtype),
        "bias": torch.randn(vocab).to(dtype),
        "token_ids": ids,
        "loss_mask": torch.rand(3, 8) < 0.7,
    }


def run(
    function: Any, inputs: dict[str, Any], dtype: torch.dtype, upstream: Tensor
) -> list[Tensor]:
    leaves = {
        name: inputs[name].to(dtype).clone().requires_grad_()
        for name in ("hidden", "weight", "bias")
    }
    outputs = function(**{**inputs, **leaves}, temperature=0.8, vocab_size=200)
    sum((value * u).sum() for value, u in zip(outputs, upstream, strict=True)).backward()
    return [*(value.detach() for value in outputs), *(leaf.grad for leaf in leaves.values())]


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    token_ids: Tensor,
    loss_mask: Tensor,
    temperature: float,
    vocab_size: int,
) -> list[Tensor]:
    """All logits in the weight's dtype, then log_softmax: what is usually written."""
    log_p = ((hidden @ weight.T + bias)[..., :vocab_size] / temperature).log_softmax(-1)
    keep = loss_mask & (token_ids != -100)
    picked = log_p.gather(-1, token_ids.clamp(min=0)[..., None]).squeeze(-1)
    return [torch.where(keep, v, 0.0) for v in (picked, -(log_p.exp() * log_p).sum(-1))]


@pytest.mark.parametrize("rows_per_chunk", [1, 5, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_float64(
    dtype: torch.dtype, rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if an output or one of three gradients is worse than the usual computation's."""
    monkeypatch.setattr(linear, "CHUNK_ELEMENTS", 211 * rows_per_chunk)
    inputs, upstream = make(dtype), torch.randn(2, 3, 8)
    truth = run(plain, inputs, torch.float64, upstream)
    baseline = run(plain, inputs, dtype, upstream)
    got = run(linear_logprobs_and_entropy, inputs, dtype, upstream)
    names = ("logprobs", "entropy", "hidden", "weight", "bias")
    for name, g, t, b in zip(names, got, truth, baseline, strict=True):
        assert g.dtype == (dtype if name in ("hidden", "weight", "bias") else torch.float32)
        assert_within_budget(name, g, t, b, 2e-5)


def test_half_precision_does_not_touch_the_ratio() -> None:
    """Fails if logits pass through bfloat16: then log-probabilities are off by more than 1e-2."""
    inputs = make(torch.bfloat16)
    inputs["hidden"] = inputs["hidden"] * 4
    exact = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    options = dict(temperature=1.0, vocab_size=200)
    got = linear_logprobs_and_entropy(**inputs, **options)
    want = plain(**exact, **options)
    rounded = plain(**inputs, **options)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-4)
    assert (rounded[0] - want[0]).abs().max() > 1e-2


def test_gradcheck() -> None:
    """Fails if the recomputed backward is not the derivative."""
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in make().items()}
    leaves = [inputs.pop(k)[..., :5].clone().requires_grad_() for k in ("hidden", "weight")]
    leaves.append(inputs.pop("bias").requires_grad_())

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprobs_and_entropy(
            hidden, weight, bias=bias, temperature=0.7, vocab_size=200, **inputs
        )

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_dropped_rows_never_reach_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if rows with loss_mask 0 or label -100 cost anything, or their NaN gets through."""
    seen = []
    logits = linear._Product.logits

    def watch(self: Any, hidden: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(hidden.shape[0])
        assert hidden.isfinite().all()
        return logits(self, hidden, bias)

    monkeypatch.setattr(linear._Product, "logits", watch)
    inputs = make()
    kept = inputs["loss_mask"] & (inputs["token_ids"] != -100)
    inputs["hidden"][~kept] = math.nan
    inputs["token_ids"][~inputs["loss_mask"]] = 10**9  # not even looked at
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    logprobs, entropy = linear_logprobs_and_entropy(**inputs)
    (logprobs + entropy).sum().backward()
    assert seen == [int(kept.sum())] * 2
    assert (logprobs[~kept] == 0).all() and (entropy[~kept] == 0).all()
    assert (hidden.grad[~kept] == 0).all() and weight.grad.isfinite().all()


def test_memory_is_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if more logits than one chunk are ever made at once, forward or backward."""
    biggest = 0
    logits = linear._Product.logits

    def watch(self: Any, hidden: Tensor, bias: Tensor | None) -> Tensor:
        nonlocal biggest
        result = logits(self, hidden, bias)
        biggest = max(biggest, result.numel())
        return result

    monkeypatch.setattr(linear._Product, "logits", watch)
    monkeypatch.setattr(linear, "CHUNK_ELEMENTS", 211 * 300)
    hidden = torch.randn(1000, 24, requires_grad=True)
    values = linear_logprobs_and_entropy(
        hidden, torch.randn(211, 24), torch.randint(0, 211, (1000,))
    )
    sum(value.sum() for value in values).backward()
    assert biggest == 211 * 256


def test_frozen_parts_get_no_gradient() -> None:
    """Fails if a frozen lm_head or body still costs its product, or breaks the other's."""
    inputs = make()
    for name in ("hidden", "weight", "bias"):
        leaves = {
            k: inputs[k].clone().requires_grad_(k == name) for k in ("hidden", "weight", "bias")
        }
        linear_logprobs_and_entropy(**{**inputs, **leaves})[0].sum().backward()
        assert [k for k, leaf in leaves.items() if leaf.grad is not None] == [name]
    reached = linear_logprobs_and_entropy(**inputs)
    assert not reached[0].requires_grad


def test_everything_masked() -> None:
    """Fails if no row to compute breaks the forward or the backward."""
    inputs = make()
    inputs["loss_mask"][:] = False
    hidden = inputs["hidden"].requires_grad_()
    logprobs, entropy = linear_logprobs_and_entropy(**inputs)
    (logprobs + entropy).sum().backward()
    assert (logprobs == 0).all() and (hidden.grad == 0).all()


def test_linear_grpo_loss_is_the_composition() -> None:
    """Fails if loss, gradient or metrics differ from logits -> log-probabilities -> loss."""
    inputs = make()
    del inputs["bias"]
    old, ref = -6 * torch.rand(3, 8), -6 * torch.rand(3, 8)
    mask = inputs.pop("loss_mask")
    inputs["token_ids"][0, 2] = 7
    advantages = torch.tensor([1.0, -1.0, 0.5])
    options: dict[str, Any] = dict(
        ref_logprobs=ref, kl_coef=0.1, dual_clip=3.0, aggregation="token-mean", normalizer=20.0
    )
    h, w = (inputs.pop(name).requires_grad_() for name in ("hidden", "weight"))
    loss, metrics = linear_grpo_loss(
        h, w, inputs["token_ids"], old, advantages, mask, temperature=0.9, **options
    )
    loss.backward()
    h2, w2 = (x.detach().clone().requires_grad_() for x in (h, w))
    logprobs, entropy = logprobs_and_entropy(h2 @ w2.T, inputs["token_ids"], temperature=0.9)
    loss2, metrics2 = grpo_loss(logprobs, old, advantages, mask, **options)
    loss2.backward()
    torch.testing.assert_close(loss, loss2)
    torch.testing.assert_close(h.grad, h2.grad)
    torch.testing.assert_close(w.grad, w2.grad)
    for name, value in metrics2.items():
        torch.testing.assert_close(metrics[name], value)
    torch.testing.assert_close(metrics["entropy"], entropy[mask].mean().detach())
    torch.testing.assert_close(metrics["token_entropy"], torch.where(mask, entropy, 0.0).detach())
    torch.testing.assert_close(metrics["token_logprobs"][mask], logprobs[mask].detach())
    assert not any(value.requires_grad for value in metrics.values())


def test_wrong_arguments_raise() -> None:
    """Fails if a mistake goes through, or the message does not name it."""
    h, w, ids = torch.randn(4, 6), torch.randn(9, 6), torch.zeros(4, dtype=torch.int64)
    cases: list[tuple[Any, str]] = [
        (lambda: linear_logprobs_and_entropy(h, w.T, ids), r"weight must be \[V, 6\]"),
        (lambda: linear_logprobs_and_entropy(h, w, ids[:3]), r"token_ids must have shape \[4\]"),
        (lambda: linear_logprobs_and_entropy(h, w, ids, bias=w[0]), r"bias must have shape \[9\]"),
        (lambda: linear_logprobs_and_entropy(h, w, ids, loss_mask=ids[:2]), "loss_mask must have"),
        (lambda: linear_logprobs_and_entropy(h, w, ids, vocab_size=10), "vocab_size must be at"),
        (lambda: linear_logprobs_and_entropy(h, w, ids, temperature=-1), "temperature must be"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
