"""The weight of one token in the gradient of the KL estimators: the documented numbers, and the
metrics that watch it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from r1v3.config import PolicyLoss
from r1v3.kernels import grpo_loss, reference
from r1v3.trainer.policy_loss import (
    PolicyLossFn,
    Targets,
    covariance,
    gap_metrics,
    gap_statistics,
    moments,
)

KINDS = ("k1", "k2", "k3")
PAGE = Path(__file__).resolve().parents[2] / "docs/runs.md"


def weights(gaps: Tensor, kl: str) -> Tensor:
    """The gradient of the summed KL of tokens with these gaps by their log-probs."""
    logprobs = torch.zeros(gaps.shape, dtype=torch.float64, requires_grad=True)
    loss, _ = grpo_loss(
        logprobs[None],
        None,
        torch.zeros(1, dtype=torch.float64),
        torch.ones(1, len(gaps), dtype=torch.bool),
        ref_logprobs=gaps[None],
        kl_coef=1.0,
        kl=kl,
        aggregation="constant",
        normalizer=1.0,
    )
    loss.backward()
    assert logprobs.grad is not None
    return logprobs.grad


def table(heading: str) -> list[list[float]]:
    """The numbers of the table of docs/runs.md under this first cell."""
    lines = PAGE.read_text(encoding="utf-8").partition(f"| {heading} |")[2].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([float(re.sub(r"[,% ]", "", cell)) for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize("row", table("g (nats)"), ids=lambda row: f"g={row[0]:g}")
def test_the_documented_weights_are_those_of_the_kernel(row: list[float]) -> None:
    """Fails if the risk of one outlying token is another than the page says."""
    for kl, documented in zip(KINDS, row[1:], strict=True):
        [found] = weights(torch.tensor([row[0]], dtype=torch.float64), kl).abs().tolist()
        # To the digits that the page shows.
        assert found == pytest.approx(documented, rel=3e-3), kl
        wanted = reference._kl(torch.tensor([row[0]], dtype=torch.float64), kl)[1].abs()
        assert found == pytest.approx(0.0 if abs(row[0]) > 20 else float(wanted), rel=1e-12)


@pytest.mark.parametrize("row", table("g of the outlier"), ids=lambda row: f"g={row[0]:g}")
def test_the_documented_shares_are_measured(row: list[float]) -> None:
    """Fails if an outlier drowns more of the other tokens than the page says."""
    generator = torch.Generator().manual_seed(0)
    others = 0.1 * torch.randn(999, generator=generator, dtype=torch.float64)
    gaps = torch.cat([others, torch.tensor([row[0]], dtype=torch.float64)])
    for kl, documented in zip(KINDS, row[1:], strict=True):
        found = weights(gaps, kl).abs()
        assert 100 * float(found[-1] / found.sum()) == pytest.approx(documented, abs=0.06), kl


def test_the_page_has_enough_rows() -> None:
    """Fails if the tables are no longer found, so that the tests above test nothing."""
    assert len(table("g (nats)")) >= 10 and len(table("g of the outlier")) == 4


@pytest.mark.parametrize("kl", KINDS)
@pytest.mark.parametrize("seed", range(10))
def test_the_metrics_are_those_of_the_gradient(kl: str, seed: int) -> None:
    """Fails if the watched weight is not the one in the loss, or tokens that do not count do."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 7)
    logprobs = -3 * torch.rand(shape, generator=generator)
    ref = logprobs + (1 + 3 * seed) * torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[0, 0] = True
    targets = [
        Targets(mask[i], torch.zeros(1), logprobs[i], mask[i], ref_logprobs=ref[i])
        for i in (slice(0, 2), slice(2, 3))
    ]
    outputs = [{"token_logprobs": logprobs[:2]}, {"token_logprobs": logprobs[2:]}]
    pairs = list(zip(targets, outputs, strict=True))
    found = gap_metrics(torch.stack([gap_statistics(*one, kl) for one in pairs]))
    gaps = (ref - logprobs)[mask].double()
    assert found["ref_gap_max"] == pytest.approx(float(gaps.abs().max()))
    assert found["ref_gap_share"] == pytest.approx(float((gaps.abs() > 5).double().mean()))
    assert found["kl_weight_max"] == pytest.approx(float(weights(gaps, kl).abs().max()), rel=1e-6)


def test_without_a_reference_nothing_is_said() -> None:
    """Fails if runs without a KL term show a gap of 0 to a reference that they do not have."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    targets = [Targets(mask, torch.zeros(1), torch.zeros(1, 2), mask)]
    loss = PolicyLossFn(PolicyLoss(), targets, 4)
    outputs = [loss.metrics(torch.zeros(1, 2), torch.zeros(1, 2), 0)]
    assert gap_metrics(gap_statistics(targets[0], outputs[0], "k3")[None]) == {}


def test_the_covariance_of_log_prob_and_advantage_is_over_all_tokens() -> None:
    """Fails if masked tokens count, or micro-batches are averaged and not joined."""
    rng = np.random.default_rng(0)
    targets, outputs, pairs = [], [], []
    for rows, width in ((3, 5), (2, 7)):
        logprobs, advantages = rng.normal(size=(rows, width)), rng.normal(size=rows)
        mask = rng.random((rows, width)) < 0.6
        fields = torch.tensor(mask), torch.tensor(advantages)
        targets.append(Targets(*fields, torch.zeros(rows, width), fields[0]))
        outputs.append({"token_logprobs": torch.tensor(logprobs)})
        pairs += [(logprobs[n, t], advantages[n]) for n, t in zip(*mask.nonzero(), strict=True)]
    expected = np.cov(np.array(pairs).T, ddof=0)[0, 1]
    rows = torch.stack([moments(*one) for one in zip(targets, outputs, strict=True)])
    assert covariance(rows) == pytest.approx(expected)
    assert covariance(torch.zeros(0, 4)) == 0.0
