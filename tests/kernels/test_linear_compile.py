"""The language head's ops under torch.compile(fullgraph=True)."""
# mypy: disable-error-code="arg-type,union-attr,index"

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from r1v3.kernels import linear_grpo_loss, linear_logprobs_and_entropy
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


def logprobs_step(x: Tensor, ids: Tensor, temperature: float) -> Tensor:
    weight = x[:8]
    logprobs, entropy = linear_logprobs_and_entropy(x, weight, ids % 8, temperature=temperature)
    more, _ = linear_logprobs_and_entropy(x, weight, ids % 8, rows=ids[:1], vocab_size=8)
    several, _ = linear_logprobs_and_entropy(x, weight, torch.stack([ids % 8, ids % 3], 1))
    return logprobs.sum() + entropy.sum() + more.sum() + several.sum()


def loss_step(x: Tensor, ids: Tensor, temperature: float) -> Tensor:
    loss, metrics = linear_grpo_loss(
        x[None], x[:8], ids[None] % 8, None, torch.ones(1), (ids > 3)[None],
        temperature=temperature, normalizer=temperature * 3, aggregation="token-mean",
    )  # fmt: skip
    return 2 * loss + metrics["entropy"]


@pytest.mark.parametrize("step", [logprobs_step, loss_step])
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
