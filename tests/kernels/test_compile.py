"""The ops under torch.compile(fullgraph=True)."""
# mypy: disable-error-code="arg-type,union-attr,index"

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from r1v3.kernels import (
    ban_tokens_,
    entropy_from_logits,
    group_advantages,
    grpo_loss,
    logprobs_and_entropy,
    sample_tokens,
    selective_log_softmax,
)
from tests.kernels.conftest import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="compilation does not see the kernels"),
    pytest.mark.usefixtures("device"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits_step(x: Tensor, ids: Tensor, temperature: float) -> Tensor:
    logprobs, entropy = logprobs_and_entropy(x, ids, temperature=temperature, vocab_size=30)
    more = selective_log_softmax(x, ids) + entropy_from_logits(x, rows=ids[:1]).sum()
    return (logprobs + 0.1 * entropy + more).sum()


def training_step(x: Tensor, ids: Tensor, temperature: float) -> Tensor:
    b = ids.shape[0] // 2
    logprobs, entropy = logprobs_and_entropy(x, ids, temperature=temperature, inplace_backward=True)
    advantages = group_advantages(x.detach()[:, 0], torch.zeros_like(ids))
    loss, metrics = grpo_loss(
        logprobs.view(2, b), logprobs.detach().view(2, b) - 0.1, advantages.view(2, b),
        torch.ones_like(ids).view(2, b), normalizer=temperature * 4,
    )  # fmt: skip
    return loss + entropy.sum() + metrics["ratio_mean"]


@pytest.mark.parametrize("step", [logits_step, training_step])
def test_full_graph_equals_eager_and_compiles_few_times(step: Any) -> None:
    """Fails on a graph break, a wrong gradient, or a compile per length or temperature."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for n in (10, 12, 20, 26, 34):
        for temperature in (1.0, 0.7, 0.35, 0.2, 1.5):
            x, ids = torch.randn(n, 32), torch.randint(0, 9, (n,))
            results = []
            for function in (step, compiled):
                leaf = x.clone().requires_grad_()
                loss = function(leaf * 1, ids, temperature)
                loss.backward()
                results.append((loss.detach(), leaf.grad))
            for eager, graph in zip(*results, strict=True):
                torch.testing.assert_close(graph, eager)
    # Static, then a dynamic length, then a dynamic temperature.
    assert counter.frame_count <= 3


def test_in_place_ban_in_a_graph() -> None:
    """Fails if functionalization drops the write, or the caller's tensor keeps its old value."""
    step = torch.compile(
        lambda x, ids: ban_tokens_(x, ids).exp().sum(-1), fullgraph=True, backend="aot_eager"
    )
    x = torch.zeros(2, 6)
    assert torch.equal(step(x, torch.tensor([1, 4])), torch.tensor([4.0, 4.0]))
    assert (x[:, [1, 4]] == -torch.inf).all()


def test_sampling_in_a_graph() -> None:
    """Fails on a graph break, another draw than in eager mode, or a compile per temperature."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, u, t: sample_tokens(x, u, temperature=t, top_k=5), fullgraph=True, backend=counter
    )
    for n in (10, 12, 20):
        for temperature in (1.0, 0.7, 0.35):
            x, uniforms = torch.randn(n, 32), torch.rand(n)
            got = compiled(x, uniforms, temperature)
            wanted = sample_tokens(x, uniforms, temperature=temperature, top_k=5)
            assert all(map(torch.equal, got, wanted))
    assert counter.frame_count <= 3


def test_group_lengths_in_a_graph() -> None:
    """Fails if a list of lengths breaks the graph, or is read another way than in eager mode."""
    rewards = torch.randn(9)
    step = torch.compile(
        lambda r: group_advantages(r * 2, [4, 0, 5]), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(step(rewards), group_advantages(rewards * 2, [4, 0, 5]))
