"""The ops of a language head at every vocabulary, on missing rows, and on wrong labels."""
# mypy: disable-error-code="arg-type,union-attr,index"

from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.kernels import cpu, linear_grpo_loss, linear_logprobs_and_entropy, reference
from tests.kernels.budget import assert_within_budget
from tests.kernels.conftest import INTERPRETED

VOCABULARIES = [1, 7, 8, 1023, 1025]
if not INTERPRETED:  # which takes seconds per row; its kernels see these in the tests on logits
    VOCABULARIES += [151_674, 152_064]


@pytest.fixture(autouse=True)
def start(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if backend == "reference":
        monkeypatch.setattr(cpu, "multiplies", lambda dtype: False)


def make(vocab: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    ids = torch.randint(0, vocab, (2, 3))
    ids[0] = torch.tensor([vocab - 1, 0, -100])
    return {
        "hidden": torch.randn(2, 3, 8).to(dtype),
        "weight": torch.randn(vocab, 8).to(dtype),
        "token_ids": ids,
        "loss_mask": torch.tensor([[True, True, True], [True, False, True]]),
    }


def logprobs_and_entropy(function: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    values = function(**inputs, temperature=0.8)
    return values[0].sum() - 0.3 * values[1].sum(), list(values)


def policy_loss(function: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The op, or what it stands for: the specification of each of its two halves."""
    options = dict(ref_logprobs=torch.full((2, 3), -1.5), kl_coef=0.1)
    old, advantages = torch.full((2, 3), -1.0), torch.tensor([1.0, -2.0])
    if function is linear_grpo_loss:
        head = {k: v for k, v in inputs.items() if k != "loss_mask"}
        loss, _ = function(**head, old_logprobs=old, advantages=advantages,
                           loss_mask=inputs["loss_mask"], **options)  # fmt: skip
    else:
        logprobs, _ = function(**inputs)
        loss, _, _ = reference.grpo_loss(
            logprobs.view(-1), old.view(-1), advantages, inputs["loss_mask"].view(-1),
            torch.tensor([0, 3, 6]), ref_logprobs=options["ref_logprobs"].view(-1), kl_coef=0.1,
        )  # fmt: skip
    return loss, [loss]


def run(step: Any, function: Any, inputs: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and the gradients of hidden and weight."""
    leaves = {k: inputs[k].to(dtype, copy=True).requires_grad_() for k in ("hidden", "weight")}
    total, outputs = step(function, {**inputs, **leaves})
    total.backward()
    return [*(value.detach() for value in outputs), *(leaf.grad for leaf in leaves.values())]


OPS = [(logprobs_and_entropy, linear_logprobs_and_entropy), (policy_loss, linear_grpo_loss)]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16] if INTERPRETED else [torch.bfloat16, torch.float32]
)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("step,function", OPS)
def test_every_vocabulary(step: Any, function: Any, vocab: int, dtype: torch.dtype) -> None:
    """Fails if a tile's ragged end loses a column, counts it twice or gives it no gradient."""
    inputs = make(vocab, dtype)
    specified = reference.linear_logprobs_and_entropy
    truth = run(step, specified, inputs, torch.float64)
    baseline = run(step, specified, inputs, dtype)
    got = run(step, function, inputs, dtype)
    for index, (g, t, b) in enumerate(zip(got, truth, baseline, strict=True)):
        assert_within_budget(f"result {index}", g, t, b, 1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
@pytest.mark.parametrize("step,function", OPS)
def test_no_row_counts(step: Any, function: Any, shape: tuple[int, int]) -> None:
    """Fails if a batch without rows, or with masked ones of NaN only, gives anything but 0."""
    inputs = {
        "hidden": torch.full((*shape, 8), torch.nan, requires_grad=True),
        "weight": torch.randn(40, 8).requires_grad_(),
        "token_ids": torch.full(shape, 10**9),
    }
    rest = (
        {}
        if step is logprobs_and_entropy
        else dict(old_logprobs=None, advantages=torch.ones(shape[0]))
    )
    loss, _ = function(**inputs, **rest, loss_mask=torch.zeros(shape, dtype=torch.bool))
    assert (loss == 0).all()
    loss.sum().backward()
    assert (inputs["weight"].grad == 0).all()
    assert inputs["hidden"].grad.shape == (*shape, 8) and (inputs["hidden"].grad == 0).all()


def test_an_empty_sequence_does_not_count() -> None:
    """Fails if a sequence whose tokens are all masked changes the mean over sequences."""
    inputs = make(40)
    with_empty, alone = (
        linear_grpo_loss(
            inputs["hidden"][:n], inputs["weight"], inputs["token_ids"][:n], None,
            torch.tensor([1.0, 9.0])[:n], torch.tensor([[True] * 3, [False] * 3])[:n],
        )
        for n in (2, 1)
    )  # fmt: skip
    torch.testing.assert_close(with_empty[0], alone[0])
    assert with_empty[1]["tokens"] == alone[1]["tokens"] == 3


@pytest.mark.parametrize("label", [40, -1, 10**12])
@pytest.mark.parametrize("step,function", OPS)
def test_a_label_outside_the_vocabulary(step: Any, function: Any, label: int, backend: str) -> None:
    """Fails if a wrong label gives a plausible number: raises on CPU, NaN on a device."""
    inputs = make(40)
    inputs["token_ids"][1, 2] = label
    rest = {} if step is logprobs_and_entropy else dict(old_logprobs=None, advantages=torch.ones(2))
    if backend != "cuda":
        with pytest.raises(ValueError, match=r"token_ids must be in \[0, 40\)"):
            function(**inputs, **rest)
        return
    values = function(**inputs, **rest)
    logprobs = values[0] if step is logprobs_and_entropy else values[1]["token_logprobs"]
    assert logprobs.isnan().view(-1).tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_inputs_changed_before_the_backward_raise(name: str) -> None:
    """Fails if the logits are computed again from something else than in the forward."""
    inputs = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in make(40).items()}
    inputs[name] = inputs[name] * 1
    loss = linear_logprobs_and_entropy(**inputs)[0].sum()
    with torch.no_grad():
        inputs[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
