"""The one-pass GRPO loss of a language head, on every implementation this process can run."""
# mypy: disable-error-code="arg-type,union-attr,index"

from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.kernels import (
    cpu,
    grpo_loss,
    linear_grpo_loss,
    logprobs_and_entropy,
)
from r1v3.kernels.linear import head, tiles
from tests.kernels.budget import assert_within_budget
from tests.kernels.conftest import CPU_BACKENDS, INTERPRETED, slow_interpreted

not_interpreted = pytest.mark.skipif(INTERPRETED, reason="not about the arithmetic of a kernel")
VOCAB, TRUE = 300, 290
# To the kernels they are all the same: logits are float32.
DTYPES = [torch.bfloat16] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
HOSTILE = dict(aggregation="token-mean", normalizer=20.0, dual_clip=3.0, kl_coef=0.1)


@pytest.fixture(autouse=True)
def small_chunks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 6 rows in tiles of 128 columns: three chunks of the tests' problem."""
    torch.manual_seed(0)
    if backend == "reference":
        monkeypatch.setattr(cpu, "multiplies", lambda dtype: False)
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)
    monkeypatch.setattr(tiles, "CPU_WORKSPACE", 6 * VOCAB * 4)
    monkeypatch.setattr(tiles, "DEVICE_WORKSPACE", 6 * VOCAB * 4)


def make(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    mask = torch.rand(3, 8) < 0.7
    mask[0, 0] = True
    ids = torch.randint(0, TRUE, (3, 8))
    ids[0, 0] = -100  # counted with log-probability 0, like a token the caller made up
    hidden, weight = torch.randn(3, 8, 24).to(dtype), torch.randn(VOCAB, 24).to(dtype)
    logits = (hidden.float() @ weight.float().T)[..., :TRUE] / 0.9
    logprobs = logits.log_softmax(-1).gather(-1, ids.clamp(min=0)[..., None]).squeeze(-1)
    return {
        "hidden": hidden,
        "weight": weight,
        "token_ids": ids,
        "old_logprobs": logprobs + 0.4 * torch.randn(3, 8),
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "loss_mask": mask,
        "ref_logprobs": logprobs + 0.4 * torch.randn(3, 8),
    }


def composed(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """All logits, then log-probabilities and entropy, then the loss."""
    shape = token_ids.shape
    logits = hidden.reshape(-1, hidden.shape[-1]) @ weight.T
    logprobs, entropy = logprobs_and_entropy(
        logits, token_ids.reshape(-1), temperature=temperature, vocab_size=vocab_size
    )
    ignored = ~loss_mask | (token_ids == -100)
    entropy = torch.where(ignored, 0.0, entropy.view(shape)).detach()
    loss, metrics = grpo_loss(logprobs.view(shape), old_logprobs, advantages, loss_mask, **options)
    metrics["entropy"] = entropy.sum() / metrics["tokens"]
    metrics["token_entropy"] = entropy
    metrics["token_logprobs"] = torch.where(ignored, 0.0, logprobs.view(shape)).detach()
    return loss, metrics


def run(
    function: Any, inputs: dict[str, Any], dtype: torch.dtype, scale: float = 1.0, **options: Any
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Loss and the two gradients, and the metrics."""
    given = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    if dtype != torch.float64:
        given.update({k: inputs[k] for k in ("old_logprobs", "ref_logprobs") if k in inputs})
    leaves = {k: given[k].clone().requires_grad_() for k in ("hidden", "weight")}
    loss, metrics = function(**{**given, **leaves}, temperature=0.9, vocab_size=TRUE, **options)
    (scale * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves.values())], metrics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "aggregation", ["sequence-mean", *([] if INTERPRETED else ["token-mean", "sequence-sum"])]
)
@pytest.mark.parametrize(
    "policy", [{"dual_clip": 3.0}, pytest.param({"ratio_clip": "cispo"}, marks=slow_interpreted)]
)
def test_is_the_composition(aggregation: str, dtype: torch.dtype, policy: dict[str, Any]) -> None:
    """Fails if loss, gradients or metrics are worse than logits -> log-probabilities -> loss."""
    inputs = make(dtype)
    options = dict(aggregation=aggregation, kl_coef=0.1, **policy)
    truth, exact = run(composed, inputs, torch.float64, 0.37, **options)
    baseline, _ = run(composed, inputs, dtype, 0.37, **options)
    got, metrics = run(linear_grpo_loss, inputs, dtype, 0.37, **options)
    for name, g, t, b in zip(("loss", "hidden", "weight"), got, truth, baseline, strict=True):
        assert_within_budget(name, g, t, b, 2e-5)
    assert got[1].dtype == got[2].dtype == dtype
    assert list(metrics) == list(exact)
    for name, value in metrics.items():
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-4)


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_columns_in_one_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the layout of a GPU, where one product takes all columns, loses or adds a term."""
    whole_rows = property(lambda head: not head.converts)
    monkeypatch.setattr(head.TiledHead, "whole_rows", whole_rows)
    inputs = make(dtype)
    truth, _ = run(composed, inputs, torch.float64)
    baseline, _ = run(composed, inputs, dtype)
    got, _ = run(linear_grpo_loss, inputs, dtype)
    for name, g, t, b in zip(("loss", "hidden", "weight"), got, truth, baseline, strict=True):
        assert_within_budget(name, g, t, b, 2e-5)


def cases() -> dict[str, dict[str, Any]]:
    """Options and changed inputs by name."""
    inputs = make()
    packed = {k: inputs[k].flatten(0, 1) for k in inputs if k not in ("weight", "advantages")}
    return {
        "on-policy": {"old_logprobs": None},
        "constant": {"aggregation": "constant", "normalizer": torch.tensor(7.0)},
        "token advantages and weights": {
            "advantages": torch.randn(3, 8), "weights": torch.rand(3, 8),
        },
        "sequence weights": {"weights": torch.rand(3), "aggregation": "sequence-mean"},
        "packed": {**packed, "cu_seqlens": torch.tensor([0, 4, 4, 19])},
        "nothing masked in": {"loss_mask": torch.zeros(3, 8, dtype=torch.bool)},
        "one empty sequence": {
            "loss_mask": make()["loss_mask"] & torch.tensor([[True], [False], [True]]),
        },
        "k1": {"kl": "k1", "kl_coef": 0.3}, "k2": {"kl": "k2", "kl_coef": 0.3},
        "unbiased KL": {"unbiased_kl": True, "kl_coef": 0.3},
    }  # fmt: skip


@not_interpreted
@pytest.mark.parametrize("name", cases())
def test_options(name: str) -> None:
    """Fails if an option of grpo_loss means something else here, in value or gradient."""
    inputs = {**make(), **cases()[name]}
    (want, metrics2), (got, metrics) = (
        run(function, inputs, torch.float32) for function in (composed, linear_grpo_loss)
    )
    if name == "nothing masked in":
        metrics2["entropy"] = torch.zeros(())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-5, atol=2e-6)
    for key, value in metrics.items():
        if name == "packed" and key == "entropy":
            value = value * metrics["tokens"]
            metrics2[key] = metrics2["token_entropy"][:19].sum()
        elif name == "packed" and key.startswith("token_"):
            assert (value[19:] == 0).all(), "tokens in no sequence are not computed"
            value, metrics2[key] = value[:19], metrics2[key][:19]
        torch.testing.assert_close(value, metrics2[key], rtol=2e-5, atol=2e-5)


@not_interpreted
def test_gradient_is_the_derivative() -> None:
    """Fails if the gradient is not the slope of the loss along random directions, in float64."""
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in make().items()}
    (_, grad_hidden, grad_weight), _ = run(linear_grpo_loss, inputs, torch.float64, **HOSTILE)
    for name, grad in (("hidden", grad_hidden), ("weight", grad_weight)):
        direction = torch.randn_like(grad)
        moved = [
            run(linear_grpo_loss, {**inputs, name: inputs[name] + step * direction},
                torch.float64, **HOSTILE)[0][0]
            for step in (1e-6, -1e-6)
        ]  # fmt: skip
        slope = (moved[0] - moved[1]) / 2e-6
        torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Multiplications of every matrix product."""
    seen: list[int] = []
    multiply = head.multiply

    def watch(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
        seen.append(a.shape[0] * a.shape[1] * b.shape[1])
        multiply(a, b, out, add=add)

    monkeypatch.setattr(head, "multiply", watch)
    monkeypatch.setattr("r1v3.kernels.linear.gradients.multiply", watch)
    return seen


@not_interpreted
@pytest.mark.parametrize(
    "trained,gemms", [(("hidden", "weight"), 3), (("hidden",), 2), (("weight",), 2), ((), 1)]
)
def test_every_product_is_made_once(trained: tuple[str, ...], gemms: int, work: list[int]) -> None:
    """Fails if logits are computed again, or a frozen head or body costs its product."""
    inputs = make()
    for name in trained:
        inputs[name].requires_grad_()
    loss, _ = linear_grpo_loss(**inputs)
    if trained:
        loss.backward()
    rows = int((inputs["loss_mask"] & (inputs["token_ids"] != -100)).sum())
    assert sum(work) == gemms * rows * VOCAB * 24
    assert [k for k in ("hidden", "weight") if inputs[k].grad is not None] == list(trained)
    work.clear()
    with torch.no_grad():
        assert not linear_grpo_loss(**inputs)[0].requires_grad
    assert sum(work) == rows * VOCAB * 24


@not_interpreted
def test_given_rows_are_the_mask(backend: str) -> None:
    """Fails if rows change the result, or a wrong set of them passes on the CPU."""
    inputs = make()
    inputs["token_ids"][0, 0] = 5
    rows = inputs["loss_mask"].flatten().nonzero().squeeze(-1)
    (want, metrics2), (got, metrics) = (
        run(linear_grpo_loss, inputs, torch.float32, **options)
        for options in ({}, {"rows": rows.flip(0)})
    )
    for g, w in zip([*got, *metrics.values()], [*want, *metrics2.values()], strict=True):
        torch.testing.assert_close(g, w)
    with torch.no_grad():
        loss, _ = linear_grpo_loss(**inputs, rows=rows, temperature=0.9, vocab_size=TRUE)
    torch.testing.assert_close(loss, want[0])
    if backend != "cuda":
        with pytest.raises(ValueError, match="rows must be the"):
            linear_grpo_loss(**inputs, rows=rows[1:])


@not_interpreted
def test_a_second_backward_raises() -> None:
    """Fails if gradients that were scaled in place are silently scaled again."""
    inputs = make()
    inputs["hidden"].requires_grad_()
    loss, _ = linear_grpo_loss(**inputs)
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation|in-place|second time"):
        (2 * loss).backward()


@not_interpreted
def test_float16_gradients_survive_a_loss_scale() -> None:
    """Fails if a gradient too small for float16 is rounded to 0 before the loss scale."""
    inputs = make(torch.float16)
    options = dict(aggregation="constant", normalizer=1e7)
    truth, _ = run(composed, inputs, torch.float64, 1e7, **options)
    got, _ = run(linear_grpo_loss, inputs, torch.float16, 1e7, **options)
    for g, t in zip(got[1:], truth[1:], strict=True):
        torch.testing.assert_close(g.double(), t, rtol=2e-2, atol=2e-3)


@slow_interpreted
def test_hostile_tokens() -> None:
    """Fails if an overflowing ratio or a masked NaN reaches the loss or a gradient."""
    inputs = make()
    mask = inputs["loss_mask"]
    inputs["old_logprobs"][~mask] = torch.nan
    inputs["hidden"][~mask] = torch.nan
    inputs["old_logprobs"][1] -= 200  # ratio e^200
    inputs["ref_logprobs"][2] += 200  # and a k3 of it
    inputs["advantages"] = torch.tensor([1.0, -1.0, 0.0])
    (loss, grad_hidden, grad_weight), metrics = run(
        linear_grpo_loss, inputs, torch.float32, **HOSTILE
    )
    assert loss.isfinite() and grad_hidden.isfinite().all() and grad_weight.isfinite().all()
    assert (grad_hidden[~mask] == 0).all() and metrics["nonfinite"] == 0


@not_interpreted
def test_bits_do_not_change_from_run_to_run() -> None:
    """Fails if loss, metrics or gradients have other bits in a second run."""
    inputs = make(torch.bfloat16)
    (first, metrics), (second, again) = (
        run(linear_grpo_loss, inputs, torch.bfloat16, **HOSTILE) for _ in range(2)
    )
    for a, b in zip([*first, *metrics.values()], [*second, *again.values()], strict=True):
        assert torch.equal(a, b)


@not_interpreted
def test_row_tile() -> None:
    """Fails if padding rows to a constant product changes loss or gradients beyond rounding."""
    inputs = make()
    (want, _), (got, _) = (
        run(linear_grpo_loss, inputs, torch.float32, **options) for options in ({}, {"row_tile": 4})
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


@not_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_tile_makes_rows_independent_of_the_batch(dtype: torch.dtype) -> None:
    """Fails if a row has other bits among more rows, by way of another order of the work."""
    inputs = make(dtype)
    options = dict(aggregation="constant", normalizer=1.0, row_tile=4)
    for name in ("token_ids", "old_logprobs", "ref_logprobs", "hidden", "advantages"):
        inputs[name] = torch.cat([inputs[name]] * 4)
    gradients = []
    for sequences in (12, 4, 1):  # 96, 32 and 8 rows: more than a gradient of 24 columns holds
        inputs["loss_mask"] = torch.zeros(12, 8, dtype=torch.bool)
        inputs["loss_mask"][:sequences] = True
        (_, gradient, _), _ = run(linear_grpo_loss, inputs, dtype, **options)
        gradients.append(gradient[0])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_wrong_arguments_raise(backend: str) -> None:
    """Fails if a mistake goes through, or the message does not name it."""
    inputs = make()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"weight": inputs["weight"].T}, r"weight must be \[V, 24\]"),
        ({"loss_mask": inputs["loss_mask"][:2]}, "loss_mask must have"),
        ({"old_logprobs": torch.zeros(3)}, "old_logprobs must have"),
        ({"advantages": torch.zeros(4)}, "advantages must have"),
        ({"aggregation": "mean"}, "aggregation must be one of"),
        ({"normalizer": 0.0}, "normalizer must be > 0"),
        ({"aggregation": "none"}, "linear_logprobs_and_entropy to grpo_loss"),
        ({"dual_clip": 0.5}, "dual_clip must be > 1"),
    ]
    if backend in CPU_BACKENDS:
        cases.append(({"token_ids": inputs["token_ids"] + 200}, "token_ids must be in"))
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_grpo_loss(**{**inputs, **given})
