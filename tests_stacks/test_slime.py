"""slime's own losses, heads and rewards, from its sources, against themselves on r1v3's kernels."""

import asyncio
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .comparing import assert_close, assert_same, function_of, imported_by, results
from .trainers import slime

stock = slime()
from megatron.core import mpu  # noqa: E402
from slime.utils import ppo_utils  # noqa: E402

from r1v3.integrations.slime import group_rewards, response_logprobs, reward, use_head  # noqa: E402
from r1v3.kernels import grpo_loss  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_rank")
VOCABULARY = 300
ACTOR = "slime.backends.megatron_utils.actor"
ARGUMENTS: dict[str, Any] = {
    "loss_type": "policy_loss", "calculate_per_token_loss": False, "use_rollout_logprobs": False,
    "use_opsm": False, "opsm_delta": 0.01, "advantage_estimator": "grpo", "eps_clip": 0.2,
    "eps_clip_high": 0.28, "eps_clip_c": None, "get_mismatch_metrics": False, "use_tis": False,
    "tis_clip": 2.0, "tis_clip_low": 0.1, "entropy_coef": 0.0, "use_kl_loss": False,
    "kl_loss_type": "k3", "kl_loss_coef": 0.05, "use_unbiased_kl": False, "allgather_cp": False,
    "log_probs_chunk_size": -1, "rollout_temperature": 1.0, "recompute_loss_function": False,
    "rollout_top_p": 1.0, "custom_pg_loss_reducer_function_path": None,
    "custom_tis_function_path": None,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dual clip, entropy": {"eps_clip_c": 3.0, "entropy_coef": 0.01},
    "temperature": {"rollout_temperature": 0.7, "entropy_coef": 0.1},
    "chunks": {"log_probs_chunk_size": 4},
    "per token": {"calculate_per_token_loss": True},
    "cispo": {"advantage_estimator": "cispo"},
    "gspo": {"advantage_estimator": "gspo"},
    "opsm": {"use_opsm": True},
    "tis": {"use_tis": True},
    "rollout's log-probs": {"use_rollout_logprobs": True},
    "k1": {"use_kl_loss": True, "kl_loss_type": "k1"},
    "k3": {"use_kl_loss": True},
    "low_var_kl": {"use_kl_loss": True, "kl_loss_type": "low_var_kl"},
    "unbiased KL": {"use_kl_loss": True, "use_unbiased_kl": True},
    "recomputed": {"recompute_loss_function": True},
    "sft": {"loss_type": "sft_loss"},
    "top-p": {"rollout_top_p": 0.9},
}


def batch() -> dict[str, Any]:
    """Three samples, one of them masked in part, and padding behind them."""
    totals, responses = [10, 14, 7], [6, 9, 1]
    masks = [torch.ones(n) for n in responses]
    masks[1][5:] = 0

    def values(scale: float) -> list[torch.Tensor]:
        return [-torch.rand(n) * scale - 5 for n in responses]

    kept = [torch.randint(0, VOCABULARY, (5,)).tolist() for _ in range(sum(responses))]
    offsets = [torch.arange(0, 5 * n + 1, 5).tolist() for n in responses]
    starts = [0, *torch.tensor(responses).cumsum(0).tolist()]
    return {
        "unconcat_tokens": [torch.randint(0, VOCABULARY, (n,)) for n in totals],
        "total_lengths": totals,
        "response_lengths": responses,
        "loss_masks": masks,
        "rollout_mask_sums": [each.sum() for each in masks],
        "advantages": [torch.randn(n) for n in responses],
        "log_probs": values(2.0),
        "rollout_log_probs": values(2.0),
        "ref_log_probs": values(2.0),
        "rollout_top_p_token_ids": [
            sum(kept[a:b], []) for a, b in zip(starts, starts[1:], strict=False)
        ],
        "rollout_top_p_token_offsets": offsets,
    }


@pytest.mark.parametrize("case", CASES)
def test_every_loss_equals_stock(case: str) -> None:
    """Fails if a loss of slime, or a number that it reports, changes with r1v3's head."""
    arguments = SimpleNamespace(**{**ARGUMENTS, **CASES[case]})
    data, reported = batch(), []
    logits = torch.randn(1, sum(data["total_lengths"]) + 3, VOCABULARY) * 2

    def run(leaf: torch.Tensor) -> list[torch.Tensor]:
        loss, _, log = stock.loss_function(arguments, data, 2, 16, leaf)
        reported.append([log["values"].double()])
        return [loss]

    wanted = results(run, logits)
    with use_head(arguments) as rebound:
        assert len(rebound.names) == 3
        assert_close(wanted, results(run, logits))
    assert_close(*reported)


@pytest.mark.parametrize("chunk", [-1, 4])
@pytest.mark.parametrize(
    "entropy",
    [{}, {"with_entropy": True}, {"with_entropy": True, "with_entropy_grad": False}],
    ids=["none", "gradient", "value"],
)
def test_rows_equal_stock(chunk: int, entropy: dict[str, bool]) -> None:
    """Fails if the function below every loss returns another shape, value or gradient."""
    tokens, group = torch.randint(0, VOCABULARY, (11,)), mpu.get_tensor_model_parallel_group()

    def run(leaf: torch.Tensor) -> Any:
        return stock.calculate_log_probs_and_entropy(
            leaf, tokens, group, chunk_size=chunk, **entropy
        )

    logits = torch.randn(11, VOCABULARY) * 3
    wanted = results(run, logits)
    with use_head():
        assert_close(wanted, results(run, logits))


def test_only_the_rows_of_responses_are_read() -> None:
    """Fails if rows of prompts or padding cost time, though no loss reads their tokens."""
    arguments = SimpleNamespace(**{**ARGUMENTS, "advantage_estimator": "cispo"})
    read = torch.zeros(34, dtype=torch.bool)
    read[3:9] = read[14:19] = read[29] = True
    logits = torch.randn(1, 34, VOCABULARY)
    logits[0, ~read & (torch.arange(34) < 14)] = torch.nan
    logits[0, 24:29] = logits[0, 30:] = torch.nan
    logits.requires_grad_()
    with use_head():
        loss, *_ = stock.loss_function(arguments, batch(), 1, 1, logits)
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad[0].abs().sum(-1) > 0, read)


def test_the_actor_has_a_name_of_its_own() -> None:
    """Fails if the old policy's log-probabilities are no longer computed under this name."""
    path = "slime/backends/megatron_utils/actor.py"
    assert "get_log_probs_and_entropy" in imported_by("slime", path)
    actor = sys.modules[ACTOR]
    was = actor.get_log_probs_and_entropy
    with use_head():
        assert actor.get_log_probs_and_entropy is not was
    assert actor.get_log_probs_and_entropy is was


def test_a_process_of_context_parallelism_keeps_stocks_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if a rank that holds parts of the sequences reads them as whole ones."""
    arguments = SimpleNamespace(**ARGUMENTS)
    given = {"unconcat_tokens": [], "total_lengths": [], "response_lengths": []}
    monkeypatch.setattr(mpu, "get_context_parallel_world_size", lambda: 2)
    compute = response_logprobs(lambda logits, **options: options)
    found = compute(torch.zeros(1, 2, 3), args=arguments, **given, with_entropy=True)
    assert found == {"args": arguments, **given, "with_entropy": True}


@pytest.mark.parametrize(
    ("estimator", "normalize", "scaled"),
    [
        ("grpo", True, True), ("gspo", True, False), ("cispo", False, True), ("ppo", True, True),
        ("reinforce_plus_plus_baseline", True, True),
    ],
)  # fmt: skip
def test_group_rewards_equal_stock(estimator: str, normalize: bool, scaled: bool) -> None:
    """Fails if advantages differ from slime's, a group without variance aside, which is 0 here."""
    values = [1.0, 0.0, 0.2, 1.0, 0.0, 0.0, 0.8, 0.2]
    samples = [SimpleNamespace(get_reward_value=lambda args, v=v: v) for v in values]
    arguments = SimpleNamespace(
        custom_reward_post_process_path=None, advantage_estimator=estimator,
        rewards_normalization=normalize, grpo_std_normalization=scaled, n_samples_per_prompt=4,
        rollout_batch_size=2,
    )  # fmt: skip
    process = function_of("slime", "slime/ray/rollout.py", "_post_process_rewards")
    actor = SimpleNamespace(custom_reward_post_process_func=None, args=arguments)
    raw, wanted = process(actor, samples)
    found = group_rewards(arguments, samples)
    assert found[0] == raw
    assert found[1] == pytest.approx(wanted, abs=1e-6)


def test_reward_of_the_report() -> None:
    """Fails if slime's asynchronous call does not get a number."""
    sample = SimpleNamespace(response="3+4=7</think>\n\n\\boxed{7}", label="7")
    assert asyncio.run(reward(SimpleNamespace(), sample)) == pytest.approx(1.0)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("kind", ["ppo", "cispo"])
def test_grpo_loss_is_slimes(kind: str, dual_clip: float | None) -> None:
    """Fails if the aggregation that the documentation names for slime is not its."""
    if kind == "cispo" and dual_clip:
        pytest.skip("slime's CISPO has no dual clip")
    lengths = [15, 1, 24]
    old, advantages = -torch.rand(40), torch.randn(40)
    mask = (torch.rand(40) < 0.7).float()

    def theirs(new: torch.Tensor) -> list[torch.Tensor]:
        if kind == "ppo":
            losses, _ = ppo_utils.compute_policy_loss(old - new, advantages, 0.2, 0.28, dual_clip)
        else:
            losses, _ = ppo_utils.compute_cispo_loss(old - new, new, advantages, 0.2, 0.28)
        reduce = stock.get_sum_of_sample_mean(lengths, lengths, list(mask.split(lengths)))
        return [reduce(losses)]

    def ours(new: torch.Tensor) -> list[torch.Tensor]:
        loss, _ = grpo_loss(
            new, old, advantages, mask, clip_low=0.2, clip_high=0.28, dual_clip=dual_clip,
            ratio_clip=kind, cu_seqlens=torch.tensor([0, 15, 16, 40]), normalizer=1.0,
        )  # fmt: skip
        return [loss]

    assert_same(theirs, ours, old + torch.randn(40) * 0.4)
