"""A temperature for each row, in every op that takes one, on every implementation here."""
# mypy: disable-error-code="arg-type,union-attr,index"

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.kernels import (
    entropy_from_logits,
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs_and_entropy,
    logits_grpo_loss,
    logprobs_and_entropy,
    reference,
    selective_log_softmax,
)
from r1v3.kernels.linear import tiles
from tests.kernels.budget import assert_within_budget, check_logits
from tests.kernels.conftest import CPU_BACKENDS, INTERPRETED

pytestmark = pytest.mark.usefixtures("backend")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="not about the arithmetic of a kernel")
DTYPES = [torch.float32, torch.bfloat16]
B, T, WIDTH, VOCAB = 2, 4, 24, 300


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of several tiles of 128 columns and 3 rows, in chunks of 3 rows."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)
    monkeypatch.setattr(tiles, "CPU_BLOCK_ROWS", 3)
    monkeypatch.setattr(tiles, "CPU_WORKSPACE", 3 * VOCAB * 4)


def make(vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [8, V] with hard rows, labels and temperatures from 1e-3 to 50."""
    logits = (4 * torch.randn(8, vocab)).to(dtype)
    logits[1, ::3] = -math.inf
    ids = torch.randint(0, vocab, (8,))
    ids[3] = -100
    return logits, ids, torch.tensor([0.7, 1.0, 1.3, 1e-3, 50.0, 0.7, 0.2, 1.0])


@pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETED else DTYPES, ids=str)
def test_each_row_is_that_of_its_own_number(dtype: torch.dtype) -> None:
    """Fails if a row's bits, or those of its gradient, differ from a call with its number alone."""
    logits, ids, degrees = make(1100, dtype)
    logits[2], logits[4, 7], degrees[5] = -math.inf, math.nan, 0.0
    upstream = torch.randn(2, 8)

    def run(which: Tensor, temperature: float | Tensor) -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        outputs = logprobs_and_entropy(leaf, ids, temperature=temperature, rows=which)
        torch.autograd.backward(outputs, list(upstream[:, which]))
        return [*(value.detach() for value in outputs), leaf.grad[which]]

    everything = run(torch.arange(8), degrees)
    for row in [1, 5] if INTERPRETED else range(8):
        alone = run(torch.tensor([row]), float(degrees[row]))
        for several, one in zip(everything, alone, strict=True):
            # Triton leaves one temperature of 0 for all rows to the reference.
            same = {"rtol": 1e-6, "atol": 1e-6} if row == 5 else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(several[row : row + 1], one, equal_nan=True, **same)
    few = torch.tensor([6, 0])
    for several, some in zip(everything, run(few, degrees), strict=True):
        assert torch.equal(several[few], some)


@pytest.mark.parametrize("shape", [(8,), (2, 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Fails if an output or the gradient is less accurate than float32 PyTorch allows."""
    if INTERPRETED and (shape == (8,)) != (dtype == torch.float32):
        pytest.skip("the interpreter takes seconds")
    logits, ids, degrees = make(1023, dtype)
    logits, ids = logits.view(*shape, -1), ids.view(shape)
    check_logits(logits, ids, temperature=degrees.view(shape), vocab_size=1000)


def test_zero_and_one_number() -> None:
    """Fails if a row of temperature 0 is not greedy, or a 0-d tensor is not one for all rows."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [1.0, 3.0, 3.0, 0.0], [-math.inf] * 4])
    logits.requires_grad_()
    ids, degrees = torch.tensor([1, 0, 0]), torch.tensor([0.0, 0.0, 0.0])
    logprobs, entropy = logprobs_and_entropy(logits, ids, temperature=degrees)
    torch.testing.assert_close(logprobs, torch.tensor([-math.log(2), -math.inf, -math.inf]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), math.log(2), 0.0]))
    (logprobs[0] + entropy.sum()).backward()
    assert (logits.grad == 0).all()
    given = torch.tensor(0.5, requires_grad=True)
    got = selective_log_softmax(logits, ids, temperature=given)
    torch.testing.assert_close(got, selective_log_softmax(logits, ids, temperature=0.5))
    row = entropy_from_logits(logits[0], temperature=torch.tensor(0.5))
    torch.testing.assert_close(row, entropy_from_logits(logits[0], temperature=0.5))


def head(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Inputs of the ops on hidden states; masked tokens have no temperature that is one."""
    mask = torch.tensor([[True, True, False, True], [True, False, True, True]])
    degrees = torch.tensor([[0.7, 1.0, -1.0, 0.3], [2.0, math.nan, 1.5, 0.9]])
    ids = torch.randint(0, VOCAB - 10, (B, T))
    ids[0, 1] = -100
    return {
        "hidden": torch.randn(B, T, WIDTH).to(dtype),
        "weight": (0.5 * torch.randn(VOCAB, WIDTH)).to(dtype),
        "token_ids": ids,
        "loss_mask": mask,
        "temperature": degrees,
        "vocab_size": VOCAB - 10,
    }


def all_logits(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, loss_mask: Tensor, temperature: Tensor,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probabilities and entropies of the head from all its logits."""
    degrees = torch.where(loss_mask, temperature, 1.0).to(hidden.dtype)
    log_p = ((hidden @ weight.T)[..., :vocab_size] / degrees[..., None]).log_softmax(-1)
    chosen = log_p.gather(-1, token_ids.clamp(min=0)[..., None]).squeeze(-1)
    keep = loss_mask & (token_ids != -100)
    return torch.where(keep, chosen, 0.0), torch.where(keep, -(log_p.exp() * log_p).sum(-1), 0.0)


def of_the_head(function: Any, given: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and the gradients of hidden and weight."""
    leaves = {name: given[name].to(dtype).requires_grad_() for name in ("hidden", "weight")}
    outputs = function(**{**given, **leaves})
    upstream = torch.linspace(-1, 2, B * T).view(B, T)
    (outputs[0] * upstream + 0.3 * outputs[1]).sum().backward()
    return [*(value.detach() for value in outputs), *(leaf.grad for leaf in leaves.values())]


@pytest.mark.parametrize("dtype", DTYPES[1:] if INTERPRETED else DTYPES, ids=str)
def test_of_the_head_matches_float64(dtype: torch.dtype) -> None:
    """Fails if a chunk or tile of the head takes the temperatures of other rows."""
    given = head(dtype)
    truth, baseline, got = (
        of_the_head(all_logits, given, torch.float64),
        of_the_head(all_logits, given, dtype),
        of_the_head(linear_logprobs_and_entropy, given, dtype),
    )
    names = ("logprobs", "entropy", "hidden", "weight")
    for name, g, t, b in zip(names, got, truth, baseline, strict=True):
        assert_within_budget(name, g, t, b, 2e-5)


def test_losses_are_the_composition() -> None:
    """Fails if a loss of logits or of the head takes other temperatures than its log-probs."""
    given = head()
    names = ("hidden", "weight")
    tokens = {"advantages": torch.tensor([1.0, -0.5]), "old_logprobs": torch.full((B, T), -5.0)}
    policy = {**tokens, "loss_mask": given["loss_mask"], "aggregation": "token-mean"}
    results = []
    for kind in ("composed", "logits", *(() if INTERPRETED else ("linear",))):
        hidden, weight = (given[name].clone().requires_grad_() for name in names)
        if kind == "composed":
            logprobs, _ = all_logits(**{**given, "hidden": hidden, "weight": weight})
            loss, _ = grpo_loss(logprobs, **policy)
        elif kind == "logits":
            rest = {k: given[k] for k in ("token_ids", "temperature", "vocab_size")}
            loss, _ = logits_grpo_loss(hidden @ weight.T, **rest, **policy)
        else:
            loss, _ = linear_grpo_loss(
                **{**given, "hidden": hidden, "weight": weight}, **tokens, aggregation="token-mean"
            )
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for got in results[1:]:
        for value, want in zip(got, results[0], strict=True):
            torch.testing.assert_close(value, want, rtol=2e-5, atol=2e-6)


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_loss_of_logits_in_other_dtypes(dtype: torch.dtype) -> None:
    """Fails if the long way of `logits_grpo_loss` refuses or misuses a masked temperature."""
    mask = torch.tensor([[True, False, True]])
    degrees = torch.tensor([[0.5, -1.0, 2.0]])
    logits, ids = torch.randn(1, 3, 50).to(dtype), torch.tensor([[3, 4, 5]])
    _, metrics = logits_grpo_loss(logits, ids, None, torch.ones(1), mask, temperature=degrees)
    want = reference.logprobs_and_entropy(logits[:, ::2], ids[:, ::2], temperature=degrees[:, ::2])
    torch.testing.assert_close(metrics["token_logprobs"][:, ::2], want[0])
    torch.testing.assert_close(metrics["token_entropy"][:, ::2], want[1])


@not_interpreted
def test_gradcheck(backend: str) -> None:
    """Fails if a gradient in closed form is not the derivative, a row of temperature 0 included."""
    if backend not in CPU_BACKENDS[:1]:
        pytest.skip("float64 is the reference's")
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    ids, degrees = torch.tensor([3, -100, 0, 6]), torch.tensor([0.4, 2.0, 0.0, 1.0])

    def of_logits(x: Tensor) -> tuple[Tensor, ...]:
        logprobs, entropy = logprobs_and_entropy(x, ids, temperature=degrees)
        return logprobs[[0, 1, 3]], entropy

    assert torch.autograd.gradcheck(of_logits, (logits,))
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    some = torch.tensor([0, 1, 3])

    def of_head(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprobs_and_entropy(h, w, ids, temperature=degrees, rows=some)

    assert torch.autograd.gradcheck(of_head, (hidden, weight))


def test_wrong_temperatures_raise(backend: str) -> None:
    """Fails if a mistake goes through, or the message does not name it; on a device NaN shows it.

    Nothing waits there for the values.
    """
    x, h, w = torch.randn(3, 9), torch.randn(3, 6), torch.randn(9, 6)
    ids = torch.zeros(3, dtype=torch.int64)
    for bad, message in (
        (torch.ones(4), r"temperature must have shape \[3\], got \[4\]"),
        (torch.ones(1), r"temperature must have shape \[3\], got \[1\]"),
        (torch.ones(3, 1), r"temperature must have shape \[3\], got \[3, 1\]"),
        (torch.ones(3, dtype=torch.int64), "temperature must be a number or a floating-point"),
        (torch.ones(3, device="meta"), "temperature must be a number or a floating-point.*meta"),
    ):
        for call in (
            lambda t: logprobs_and_entropy(x, ids, temperature=t),
            lambda t: entropy_from_logits(x, temperature=t),
            lambda t: linear_logprobs_and_entropy(h, w, ids, temperature=t),
        ):
            with pytest.raises(ValueError, match=message):
                call(bad)
    for value in (-0.5, math.nan, math.inf):
        degrees = torch.tensor([1.0, value, 1.0])
        if backend in CPU_BACKENDS:
            with pytest.raises(ValueError, match="temperature must be finite and >= 0, got"):
                logprobs_and_entropy(x, ids, temperature=degrees)
            with pytest.raises(ValueError, match="temperature must be finite and >= 0, got"):
                linear_logprobs_and_entropy(h, w, ids, temperature=degrees)
        else:
            logprobs, entropy = logprobs_and_entropy(x, ids, temperature=degrees)
            for result in (logprobs, entropy):
                assert result.isnan().tolist() == [False, True, False]


@not_interpreted
def test_in_a_graph(backend: str) -> None:
    """Fails on a graph break or another gradient than in eager mode."""
    if backend == "reference":
        pytest.skip("once is enough")
    torch._dynamo.reset()
    weight, ids = torch.randn(9, 6), torch.zeros(2, 3, dtype=torch.int64)

    def step(h: Tensor, degrees: Tensor) -> Tensor:
        return linear_logprobs_and_entropy(h, weight, ids, temperature=degrees)[0].sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    hidden, degrees = torch.randn(2, 3, 6), torch.rand(2, 3) + 0.5
    for function in (step, compiled):
        leaf = hidden.clone().requires_grad_()
        loss = function(leaf, degrees)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)
    torch._dynamo.reset()
