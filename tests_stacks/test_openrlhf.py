"""OpenRLHF's own heads and losses, from its wheel, against r1v3's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .comparing import assert_close, assert_same, results
from .trainers import openrlhf

actor = openrlhf()
from openrlhf.models import utils  # noqa: E402
from openrlhf.models.loss import PolicyLoss  # noqa: E402

from r1v3.integrations.openrlhf import reward_func, use_head  # noqa: E402
from r1v3.kernels import grpo_loss  # noqa: E402

ROWS, LENGTH, VOCABULARY = 3, 9, 400


class Model(torch.nn.Module):
    """A model that returns given logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, sequences: torch.Tensor, **_: object) -> Any:
        class Output(dict[str, torch.Tensor]):
            """As transformers' outputs, which take items and attributes."""

        return Output(logits=self.logits * 1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [False, True])
def test_the_actor_equals_stock(entropy: bool, temperature: float) -> None:
    """Fails if the actor's log-probabilities, entropies or gradients change with r1v3's head."""
    lengths = torch.tensor([[9], [6], [7]])
    attention = (torch.arange(LENGTH)[None] < lengths).long()
    sequences = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    action = attention[:, 4:]

    def run(leaf: torch.Tensor) -> list[torch.Tensor | None]:
        model = actor.Actor(Model(leaf), temperature=temperature)
        model.packing_samples = False
        logprobs, output = model(
            sequences, action, attention, return_output=True, return_entropy=entropy
        )
        return [logprobs, getattr(output, "entropy", None)]

    logits = torch.randn(ROWS, LENGTH, VOCABULARY) * 2
    wanted = results(run, logits)
    with use_head() as rebound:
        assert len(rebound.names) == 2
        assert_close(wanted, results(run, logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_functions_alone(dtype: torch.dtype) -> None:
    """Fails if a dtype is scored less exactly than by OpenRLHF's own functions."""
    logits = (torch.randn(ROWS, LENGTH, VOCABULARY) * 3).to(dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    stock = utils.log_probs_from_logits, utils.compute_entropy

    def run(leaf: torch.Tensor) -> list[torch.Tensor]:
        return [actor.log_probs_from_logits(leaf, labels), actor.compute_entropy(leaf)]

    exact = results(lambda leaf: [f(leaf, *a) for f, a in zip(stock, [[labels], []], strict=True)],
                    logits.double())  # fmt: skip
    with use_head():
        found = results(run, logits)
    assert_close(exact, found, tolerance=4e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("counts", [{}, {"dp_size": 2, "batch_num_tokens": 100.0,
                                         "global_batch_size": 16.0}])  # fmt: skip
@pytest.mark.parametrize("correction", [None, "clip", "mask"])
@pytest.mark.parametrize("per_token", [True, False])
def test_grpo_loss_is_openrlhfs(
    per_token: bool, correction: str | None, counts: dict[str, float], dual_clip: float | None
) -> None:
    """Fails if the aggregation that the documentation names for OpenRLHF is not its."""
    mask = (torch.arange(LENGTH)[None] < torch.tensor([[9], [0], [4]])).float()
    old = -torch.rand(ROWS, LENGTH)
    rollout, advantages = old + torch.randn(ROWS, LENGTH) * 0.3, torch.randn(ROWS, LENGTH)
    stock = PolicyLoss(
        0.2, 0.28, dual_clip, token_level_loss=per_token,
        is_correction_level="token" if correction else "off",
        is_correction_mode=correction or "mask", is_correction_threshold=[0.8, 1.25],
    )  # fmt: skip
    ratio = (old - rollout).exp()
    weights = {
        None: None,
        "clip": ratio.clamp(0.8, 1.25),
        "mask": ratio * ((ratio >= 0.8) & (ratio <= 1.25)),
    }[correction]
    kept = SimpleNamespace(tokens=mask.sum(), rows=(mask.sum(-1) > 0).sum())
    count = counts.get("batch_num_tokens" if per_token else "global_batch_size")
    count = count or (kept.tokens if per_token else kept.rows)
    metrics = []

    def theirs(new: torch.Tensor) -> list[torch.Tensor]:
        loss, clipped, kl, *_ = stock(new, old, advantages, mask, rollout, **counts)
        metrics.append([clipped.double(), kl.double()])
        return [loss]

    def ours(new: torch.Tensor) -> list[torch.Tensor]:
        loss, found = grpo_loss(
            new, old, advantages, mask, clip_low=0.2, clip_high=0.28, dual_clip=dual_clip,
            aggregation="token-mean" if per_token else "sequence-mean", weights=weights,
            normalizer=count / counts.get("dp_size", 1),
        )  # fmt: skip
        clipped = found["clip_low_fraction"] + found["clip_high_fraction"]
        metrics.append([clipped.double(), found["approx_kl"].double()])
        return [loss]

    assert_same(theirs, ours, old + torch.randn(ROWS, LENGTH) * 0.5)
    assert_close(*metrics)


def test_reward_of_the_report() -> None:
    """Fails if OpenRLHF's sampler cannot read what the reward's file returns."""
    prompts = ["What is 3+4? Put it in \\boxed{}.<think>\n"] * 3
    answers = ["7</think>\n\n\\boxed{7}", "\\boxed{7}", "8</think>\n\n\\boxed{8}"]
    queries = [p + a for p, a in zip(prompts, answers, strict=True)]
    found = reward_func(queries, prompts, ["7"] * 3)
    assert found["rewards"].tolist() == pytest.approx([1.0, 0.8, 0.2])
    single = reward_func(queries[:1], prompts[:1], ["7"])
    assert torch.tensor([single["scores"]]).tolist() == pytest.approx([1.0])
    assert set(single["extra_logs"]) == {"accuracy", "format"}
