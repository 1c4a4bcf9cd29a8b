"""The error budget: at most twice the error of the same thing in PyTorch, plus a tolerance."""
# mypy: disable-error-code="arg-type"

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from r1v3.kernels import (
    entropy_from_logits,
    logprobs_and_entropy,
    reference,
    selective_log_softmax,
)
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
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A trainer's code without kernels: float32 log_softmax of logits / temperature."""
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1, 1)
    x, ids = logits.reshape(-1, logits.shape[-1])[:, :vocab_size], token_ids.reshape(-1)
    if rows is not None:
        x, ids = x[rows], ids[rows]
    log_p = (x.float() / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p)).sum(-1)
    picked = log_p.gather(-1, ids.clamp(min=0)[:, None]).squeeze(-1)
    shape = token_ids.shape if rows is None else rows.shape
    return torch.where(ids == -100, 0.0, picked).view(shape), entropy.view(shape)


def logprobs_alone(logits: Tensor, token_ids: Tensor, **options: object) -> tuple[Tensor]:
    return (selective_log_softmax(logits, token_ids, **options),)


def entropy_alone(logits: Tensor, _: Tensor, **options: object) -> tuple[Tensor]:
    return (entropy_from_logits(logits, **options),)


def evaluate(
    function: Callable[..., tuple[Tensor, ...]],
    which: Sequence[int],
    logits: Tensor,
    token_ids: Tensor,
    upstream: Tensor,
    options: dict[str, object],
) -> list[Tensor]:
    """The outputs, as many as `which`, and the gradient of their sum weighted by upstream."""
    x = logits.detach().requires_grad_()
    outputs = function(x, token_ids, **options)
    outputs = outputs if len(outputs) == len(which) else tuple(outputs[i] for i in which)
    # A -inf log-probability is legal; weighting it by 0 would make the sum NaN.
    sum(
        (torch.where(value.isfinite(), value, 0.0).reshape(-1) * upstream[i]).sum()
        for i, value in zip(which, outputs, strict=True)
    ).backward()
    assert x.grad is not None
    return [*(value.detach() for value in outputs), x.grad]


def check_logits(logits: Tensor, token_ids: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Compares the three functions' outputs and gradients with float64.

    Returns both outputs.
    """
    n = token_ids.numel() if options.get("rows") is None else options["rows"].numel()  # type: ignore
    upstream = torch.randn(2, n)
    for function, which in FUNCTIONS:
        given = token_ids, upstream, options
        truth = evaluate(reference.logprobs_and_entropy, which, logits.double(), *given)
        baseline = evaluate(pytorch, which, logits.clone(), *given)
        got = evaluate(function, which, logits, *given)
        # p (log p + H) / T: a rounding of log p, which may be all there is, counts 1 / T.
        grad = 2e-6 + 2.0**-24 / float(torch.as_tensor(options.get("temperature", 1.0)).min())
        if INTERPRETED and logits.dtype == torch.bfloat16:
            # The interpreter truncates to bfloat16 where a device rounds.
            grad += 2.0**-7 * truth[-1].abs().nan_to_num(0, 0, 0).max().item()
        names = [("logprobs", "entropy")[i] for i in which]
        for name, g, t, b in zip([*names, "grad"], got, truth, baseline, strict=True):
            assert_within_budget(name, g, t, b, grad if name == "grad" else 1e-5)
        if len(which) == 2:
            results = got[0], got[1]
    return results


# One result alone takes a path of its own on the CPU, and other arguments of one kernel in Triton.
FUNCTIONS: list[tuple[Callable[..., tuple[Tensor, ...]], Sequence[int]]]
FUNCTIONS = [(logprobs_and_entropy, (0, 1))]
if not INTERPRETED:
    FUNCTIONS += [(logprobs_alone, (0,)), (entropy_alone, (1,))]
