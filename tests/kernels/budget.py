"""The error budget: at most twice the error of the same thing in PyTorch, plus a tolerance."""
# mypy: disable-error-code="arg-type"

import torch
from torch import Tensor

from r1v3.kernels import logprobs_and_entropy, reference
from tests.kernels.conftest import INTERPRETED


def assert_within_budget(
    name: str, got: Tensor, truth: Tensor, baseline: Tensor, tolerance: float
) -> None:
    """max|got - truth| <= 2 max|baseline - truth| + tolerance, with equal non-finite elements."""
    got, baseline = got.double(), baseline.double()
    assert got.shape == truth.shape, (name, got.shape, truth.shape)
    finite = truth.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{name}: finite where the truth is not, or not"
    assert torch.equal(got.isnan(), truth.isnan()), f"{name}: NaN in other places than the truth"
    assert torch.equal(got[truth.isinf()], truth[truth.isinf()]), f"{name}: infinities differ"
    if not bool(finite.any()):
        return
    error = (got - truth)[finite].abs().max().item()
    allowed = 2 * (baseline - truth)[finite].abs().nan_to_num(0, 0, 0).max().item()
    # Two roundings of the largest result are nobody's fault.
    allowed += tolerance + 2.0**-22 * truth[finite].abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def pytorch(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a trainer writes without kernels: float32 log_softmax of logits / temperature."""
    x, ids = logits.reshape(-1, logits.shape[-1])[:, :vocab_size], token_ids.reshape(-1)
    if rows is not None:
        x, ids = x[rows], ids[rows]
    log_p = (x.float() / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p)).sum(-1)
    picked = log_p.gather(-1, ids.clamp(min=0)[:, None]).squeeze(-1)
    shape = token_ids.shape if rows is None else rows.shape
    return torch.where(ids == -100, 0.0, picked).view(shape), entropy.view(shape)


def check_logits(logits: Tensor, token_ids: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Compares both outputs and the gradient with float64; returns the outputs."""
    n = token_ids.numel() if options.get("rows") is None else options["rows"].numel()  # type: ignore
    upstream = torch.randn(2, n)
    results = []
    for x, function in (
        (logits.double(), reference.logprobs_and_entropy),
        (logits.clone(), pytorch),
        (logits, logprobs_and_entropy),
    ):
        x = x.detach().requires_grad_()
        outputs = function(x, token_ids, **options)
        flat = [value.reshape(-1) for value in outputs]
        # A -inf log-probability is legal; weighting it by 0 would make the sum NaN.
        kept = [torch.where(v.isfinite(), v, 0.0) * u for v, u in zip(flat, upstream, strict=True)]
        (kept[0].sum() + kept[1].sum()).backward()
        assert x.grad is not None
        results.append((*outputs, x.grad))
    truth, baseline, got = results
    grad = 2e-6
    if INTERPRETED and logits.dtype == torch.bfloat16:
        # The interpreter truncates to bfloat16 where a device rounds.
        grad += 2.0**-7 * truth[2].abs().nan_to_num(0, 0, 0).max().item()
    for name, index, tolerance in (("logprobs", 0, 1e-5), ("entropy", 1, 1e-5), ("grad", 2, grad)):
        assert_within_budget(
            name, got[index].detach(), truth[index].detach(), baseline[index].detach(), tolerance
        )
    return got[0].detach(), got[1].detach()
