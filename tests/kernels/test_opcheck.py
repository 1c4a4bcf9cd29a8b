"""Every op as torch.library registers it."""
# mypy: disable-error-code="arg-type"

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from r1v3 import kernels
from tests.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="registration does not see the kernels")
# The backward of these scales in place, which a second one, as the other checks make it, must not
# see.
USED_ONCE = ("with_gradient",)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def logits_cases() -> dict[str, tuple[Any, ...]]:
    x, ids, rows = torch.randn(6, 11), torch.randint(0, 9, (6,)), torch.tensor([4, 0])
    leaf = x.clone().requires_grad_()
    saved, slope = torch.rand(6, 3), torch.randn(6)
    degrees, pairs = torch.rand(6, dtype=torch.float64), torch.stack([ids, ids.flip(0)], 1)
    gradient = ids, None, scalar(0.7), 9, rows[:0], saved, slope, slope
    terms = [torch.rand(6), slope, None, slope, None]
    grpo = ids, terms, [0.2, 0.3, 0.0, 0.0, 0.1, 2.0, 0.0, 0.0], scalar(0.7), 9, ""
    return {
        "logprobs_and_entropy": (leaf, ids, None, scalar(0.7), 9, "", False, True),
        "logprobs_and_entropy by row": (leaf, ids, None, degrees, 9, "", False, True),
        "logprobs_and_entropy of rows": (
            leaf, ids[rows], rows, scalar(1.0), None, "", False, True,
        ),
        "logprobs_and_entropy without ids": (leaf, None, None, scalar(1.0), None, "", False, True),
        "logprobs_and_entropy without entropy": (leaf, ids, None, scalar(1.0), 9, "", False, False),
        "logprobs_and_entropy of several": (leaf, pairs, None, scalar(0.7), 9, "", False, True),
        "logits_gradient": (x, x.clone(), *gradient),
        "logits_gradient of several": (
            x, x.clone(), pairs, None, scalar(0.7), 9, rows[:0], saved, pairs.float(), slope,
        ),
        "logits_gradient of rows": (
            x, x.clone(), ids[rows], rows, scalar(1.0), None, rows[:0], saved[rows], None,
            slope[rows],
        ),
        "logits_gradient by row": (
            x, x.clone(), ids, None, degrees, 9, rows[:0], saved, slope, slope,
        ),
        "logits_grpo": (x, x.clone(), *grpo),
        "logits_grpo by row": (x, x.clone(), ids, terms, grpo[2], degrees, 9, ""),
        "logits_grpo without gradient": (x, None, *grpo),
        "scale_": (x.clone(), torch.tensor(2.0)),
        "with_gradient of logits": (torch.ones(()), leaf, torch.randn(6, 11), None, None),
        "sample_tokens": (
            x, torch.rand(6), scalar(0.7), ids, None, None, None, None, None, 9, "",
        ),
        "sample_tokens with everything": (
            leaf, torch.rand(6), torch.rand(6), ids, ids > 3, ids - 1, 5, 0.9, 0.1, None, "",
        ),
        "ban_tokens_": (x.clone(), ids, None, 0),
        "ban_tokens_ of enabled rows": (x.clone(), ids, ids > 3, 2),
    }  # fmt: skip


def token_cases() -> dict[str, tuple[Any, ...]]:
    flat, mask = torch.randn(6), torch.ones(6, dtype=torch.bool)
    options = [0.2, 0.2, 0.0, 0.0, 0.1, 2.0, 0.0, 0.0]
    rewards, rest = torch.randn(4), (0, 0, 0, 1, 1e-6)
    return {
        "group_advantages": (rewards, None, torch.tensor([0, 2, 4]), 0, *rest),
        "group_advantages of equal groups": (rewards, None, None, 2, *rest),
        "group_advantages of ids": (rewards, torch.tensor([7, 2, 2, 7]), None, 0, *rest),
        "grpo_loss": (
            flat - 0.1, [flat, flat, flat, None], mask, torch.tensor([0, 2, 6]), 0, scalar(3.0),
            options,
        ),
        "grpo_loss of tokens": (
            flat, [flat[:2], flat, flat, None], mask, None, 3, None, [*options[:6], 1.0, 4.0],
        ),
        "token_terms": (mask, flat[:2], None, None, 3, 2, scalar(4.0), 0, torch.float32),
        "token_terms packed": (
            mask, flat[:2], flat[:2], torch.tensor([0, 2, 5]), 0, 2, None, 1, torch.float32,
        ),
        "grpo_loss padded": (flat, [flat[:2], None, None, None], mask, None, 3, None, options),
    }  # fmt: skip


def linear_cases() -> dict[str, tuple[Any, ...]]:
    hidden, weight = torch.randn(6, 4), torch.randn(11, 4)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    bias = torch.randn(11).requires_grad_()
    ids, mask = torch.randint(0, 9, (6,)), torch.ones(6, dtype=torch.bool)
    pairs = torch.stack([ids, ids.flip(0)], 1)
    some, sharding = torch.tensor([4]), ("", True, 0, 0.0)
    rest = scalar(0.7), None, *sharding
    per_token: list[Tensor | None] = [torch.rand(6) for _ in range(5)]
    options = [0.2, 0.2, 0.0, 0.0, 0.1, 2.0, 0.0, 0.0]
    bounds, saved, slope = torch.tensor([0, 11]), torch.rand(6, 3), torch.randn(6)
    degrees = torch.rand(6, dtype=torch.float64)
    gradient = scalar(0.7), bounds, saved, [slope, slope]
    return {
        "linear_logprobs_and_entropy": (*leaves, None, ids, mask, None, *rest),
        "linear_logprobs_and_entropy by row": (
            *leaves, None, ids, mask, None, degrees, None, *sharding,
        ),
        "linear_logprobs_and_entropy of several": (*leaves, None, pairs, mask, None, *rest),
        "linear_logprobs_and_entropy of rows": (*leaves, bias, ids, None, some, *rest),
        "linear_gradient": (
            hidden, weight, bias.detach(), ids, mask, None, *gradient, [True, True, True],
            *sharding,
        ),
        "linear_gradient of several": (
            hidden, weight, None, pairs, mask, None, scalar(0.7), bounds, saved,
            [pairs.float(), slope], [True, True, False], *sharding,
        ),
        "linear_gradient of the weight": (
            hidden, weight, None, ids, mask, None, *gradient, [False, True, False], *sharding,
        ),
        "linear_grpo": (
            hidden, weight, ids, mask, None, per_token, options, [True, True], *rest,
        ),
        "linear_grpo by row": (
            hidden, weight, ids, mask, None, per_token, options, [True, True], degrees, None,
            *sharding,
        ),
        "linear_grpo of rows": (
            hidden, weight, ids, mask, some, per_token, options, [True, True], *rest,
        ),
        "with_gradient": (
            torch.ones(()), leaves[0], torch.randn(6, 4), leaves[1], torch.randn(11, 4),
        ),
    }  # fmt: skip


def cases() -> dict[str, tuple[Any, ...]]:
    """Arguments by the name of the op and of the case."""
    return logits_cases() | token_cases() | linear_cases()


@pytest.mark.parametrize("name", cases())
def test_opcheck(name: str, device: str) -> None:
    """Fails if schema, fake tensors, autograd or AOT dispatch of an op are registered wrongly."""
    op = getattr(torch.ops.r1v3, name.split()[0])
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if name.split()[0] not in USED_ONCE:
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op, cases()[name], test_utils=tests)


def test_no_op_is_forgotten() -> None:
    """Fails if an op of this package is registered and not checked here."""
    every = torch._C._dispatch_get_all_op_names()
    registered = {name.partition("::")[2] for name in every if name.startswith("r1v3::")}
    assert {name.partition(".")[0] for name in registered} == {name.split()[0] for name in cases()}


class Named(TorchDispatchMode):
    """Names of the operations that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_small_ops_are_seen_by_who_looks() -> None:
    """Fails if a call past the dispatcher hides an op from a mode, a write from autograd's count,
    or gives another result."""
    x, banned, rewards = torch.randn(3, 5), torch.tensor([1]), torch.randn(4).requires_grad_()
    plain = x.clone(), kernels.group_advantages(rewards, 2)
    assert kernels.ban_tokens_(plain[0], banned)._version == 1
    assert not plain[1].requires_grad
    with Named() as mode:
        kernels.ban_tokens_(x, banned)
        advantages = kernels.group_advantages(rewards, 2)
    assert {"r1v3.ban_tokens_.default", "r1v3.group_advantages.default"} <= set(mode.seen)
    assert torch.equal(x, plain[0]) and torch.equal(advantages, plain[1])
    kernels.ban_tokens_(torch.nn.Parameter(x, requires_grad=False), banned)
