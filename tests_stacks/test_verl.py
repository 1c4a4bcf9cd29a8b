"""verl's own losses, advantages and heads against r1v3's, values and gradients."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

verl = pytest.importorskip("verl")

from omegaconf import OmegaConf  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from verl import DataProto  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.trainer.ppo.ray_trainer import compute_advantage  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

from r1v3.integrations.verl import compute_score, use_heads  # noqa: E402

ROWS, LENGTH = 12, 9
MODES = [
    "token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
]  # fmt: skip
COUNTS: dict[str, dict[str, Any]] = {
    "local": {},
    "dp4": {
        "dp_size": 4, "batch_num_tokens": 300, "global_batch_size": 48, "loss_scale_factor": None,
    },
    "dp2-scaled": {
        "dp_size": 2, "batch_num_tokens": 300, "global_batch_size": 48, "loss_scale_factor": 100,
    },
}  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    """Ratios far enough from 1 that every clip acts, a row without tokens among them."""
    lengths = torch.randint(1, LENGTH + 1, (ROWS, 1))
    lengths[3] = 0
    mask = (torch.arange(LENGTH)[None] < lengths).long()
    old = -torch.rand(ROWS, LENGTH) * 3
    return {
        "mask": mask,
        "old": old,
        "new": old + torch.randn(ROWS, LENGTH) * 1.5,
        "advantages": torch.randn(ROWS, LENGTH) * mask,
        "weights": torch.rand(ROWS, LENGTH) + 0.5,
    }


def actor(**settings: Any) -> ActorConfig:
    defaults = {
        "strategy": "fsdp", "rollout_n": 4, "ppo_micro_batch_size_per_gpu": 1, "clip_ratio": 0.2,
        "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0,
    }  # fmt: skip
    return ActorConfig(**{**defaults, **settings})


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_equals_vanilla(mode: str, counts: str, weighted: bool) -> None:
    """Fails if a way of aggregating has another divisor, or a clip or metric differs."""
    given = batch()
    found = {}
    for name in ("vanilla", "r1v3_grpo"):
        config = actor()
        config.global_batch_info.clear()
        config.global_batch_info.update(COUNTS[counts])
        logprobs = given["new"].clone().requires_grad_()
        loss, metrics = core_algos.get_policy_loss_fn(name)(
            old_log_prob=given["old"], log_prob=logprobs, advantages=given["advantages"],
            response_mask=given["mask"].bool(), loss_agg_mode=mode, config=config,
            rollout_is_weights=given["weights"] if weighted else None,
        )  # fmt: skip
        loss.backward()
        found[name] = loss.item(), logprobs.grad, metrics
    (loss, grad, metrics), (our_loss, our_grad, our_metrics) = found.values()
    assert our_loss == pytest.approx(loss, rel=2e-6)
    torch.testing.assert_close(our_grad, grad, rtol=1e-5, atol=1e-6 * grad.abs().max().item())
    assert metrics["actor/pg_clipfrac"] > 0 and metrics["actor/pg_clipfrac_lower"] > 0
    assert our_metrics == pytest.approx(metrics, abs=1e-6)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "no-such-mode"])
def test_missing_counts_are_an_error(mode: str) -> None:
    """Fails if a rank's own count silently stands for that of all ranks."""
    given, config = batch(), actor()
    config.global_batch_info.clear()
    config.global_batch_info.update(dp_size=2)
    with pytest.raises(ValueError):
        core_algos.get_policy_loss_fn("r1v3_grpo")(
            given["old"], given["new"], given["advantages"], given["mask"], mode, config
        )


@pytest.mark.parametrize("mode", MODES)
def test_ppo_loss_of_nested_tensors(mode: str) -> None:
    """Fails if verl's own worker cannot call the loss on its jagged batches."""
    given, prompt = batch(), 3
    given["mask"][3, 0] = 1
    lengths = given["mask"].sum(-1).tolist()

    def nested(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    def responses(x: torch.Tensor) -> torch.Tensor:
        return nested([row[:n] for row, n in zip(x, lengths, strict=True)])

    def zeros(extra: int) -> torch.Tensor:
        return nested([torch.zeros(extra + n, dtype=torch.long) for n in lengths])

    found = []
    for name in ("vanilla", "r1v3_grpo"):
        data = TensorDict(
            {
                "prompts": nested([torch.zeros(prompt, dtype=torch.long)] * ROWS),
                "responses": zeros(0),
                "input_ids": zeros(prompt),
                "response_mask": responses(given["mask"]),
                "old_log_probs": responses(given["old"]),
                "advantages": responses(given["advantages"]),
            },
            batch_size=[ROWS],
        )
        tensordict_utils.assign_non_tensor(
            data, dp_size=4, batch_num_tokens=300, global_batch_size=48, max_response_len=LENGTH
        )
        config = actor(loss_agg_mode=mode, policy_loss=PolicyLossConfig(loss_mode=name))
        # The log-probability at a position is that of the next token.
        rows = [
            torch.cat([torch.zeros(prompt - 1), row[:n], torch.zeros(1)])
            for row, n in zip(given["new"], lengths, strict=True)
        ]
        leaf = torch.cat(rows).requires_grad_()
        logprobs = torch.nested.nested_tensor_from_jagged(leaf, data["input_ids"].offsets())
        loss, _ = ppo_loss(config, {"log_probs": logprobs}, data)
        loss.backward()
        found.append((loss.item(), leaf.grad))
    (loss, grad), (our_loss, our_grad) = found
    assert our_loss == pytest.approx(loss, rel=2e-6)
    assert grad.abs().max() > 0
    torch.testing.assert_close(our_grad, grad, rtol=1e-5, atol=1e-6 * grad.abs().max().item())


@pytest.mark.parametrize("by_std", [True, False])
def test_advantage_through_the_trainer(by_std: bool) -> None:
    """Fails if groups, their spread, a constant group or a single sample differ from verl's."""
    mask = batch()["mask"]
    rewards = torch.zeros(ROWS, LENGTH)
    rewards[:, 0] = torch.rand(ROWS)
    rewards[4:8, 0] = 0.7
    uid = np.array(["a"] * 4 + ["b"] * 4 + ["c"] * 3 + ["single"], dtype=object)
    order = np.random.default_rng(0).permutation(ROWS)
    found = {}
    for name in ("grpo", "r1v3_group"):
        data = DataProto.from_dict(
            tensors={
                "token_level_rewards": rewards[order],
                "response_mask": mask[order],
                "responses": mask[order],
            },
            non_tensors={"uid": uid[order]},
        )
        config = OmegaConf.create({"norm_adv_by_std_in_grpo": by_std})
        out = compute_advantage(
            data, adv_estimator=name, norm_adv_by_std_in_grpo=by_std, config=config
        )
        found[name] = out.batch["advantages"]
        assert torch.equal(out.batch["advantages"], out.batch["returns"])
    torch.testing.assert_close(found["r1v3_group"], found["grpo"], rtol=2e-6, atol=2e-6)


def test_reward_of_the_report() -> None:
    """Fails if verl's reward managers cannot call it, or options of the row are not seen."""
    one = compute_score("any", "3+4=7</think>\n\n\\boxed{7}", "7", {"index": 3}, sandbox=None)
    assert one == {"score": 1.0, "acc": 1.0, "format": 1.0}
    row = {"question": "Which?", "options": ["5", "7"]}
    chosen = compute_score("any", "It is 7</think>\n\n\\boxed{7}", "B", row)
    assert chosen["acc"] == 1.0
    assert compute_score("any", "7", "8")["score"] == 0.0


def truth(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies in float64."""
    logs = ((hidden @ weight.T) / temperature).log_softmax(-1)
    return logs.gather(-1, ids[..., None])[..., 0], -(logs.exp() * logs).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_head_of_fsdp_is_as_exact_as_stock(dtype: torch.dtype, temperature: float) -> None:
    """Fails if a result or gradient is further from float64 than verl's own, rounding aside."""
    from verl.utils.experimental import torch_functional

    shape, vocabulary, width = (2, 24), 3000, 32
    hidden = torch.randn(*shape, width).to(dtype)
    weight = (torch.randn(vocabulary, width) * 0.3).to(dtype)
    ids = torch.randint(0, vocabulary, shape)
    up = torch.randn(2, *shape)

    def run(head: Any, to: torch.dtype) -> list[torch.Tensor]:
        x, y = (each.detach().clone().to(to).requires_grad_() for each in (hidden, weight))
        logprobs, entropy = head(x, y, ids, temperature)
        (logprobs * up[0] + entropy * up[1]).sum().backward()
        assert x.grad is not None and y.grad is not None
        return [each.double() for each in (logprobs.detach(), entropy.detach(), x.grad, y.grad)]

    exact = run(truth, torch.float64)
    stock = run(torch_functional.FusedLinearForPPO(), dtype)
    with use_heads():
        ours = run(torch_functional.FusedLinearForPPO(), dtype)
    for a, b, c in zip(exact, stock, ours, strict=True):
        scale = a.abs().max()
        rounding = 1e-6 if dtype == torch.float32 else 4e-3
        assert (c - a).abs().max() / scale < max(1.5 * (b - a).abs().max() / scale, rounding)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_whole_model_with_fused_kernels(backend: str) -> None:
    """Fails if a model that verl has patched calls the head otherwise than it is called alone."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from verl.models.transformers import dense_common

    config = Qwen2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=500,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    ids = torch.randint(0, 500, (2, 11))
    forward = getattr(dense_common, f"forward_with_{backend}_backend")
    with use_heads():
        out = forward(model, input_ids=ids, temperature=0.8, return_dict=True)
    hidden = model.model(input_ids=ids).last_hidden_state
    rolled = torch.roll(ids, shifts=-1, dims=-1)
    logprobs, entropy = truth(hidden.double(), model.lm_head.weight.double(), rolled, 0.8)
    for a, b in ((out.log_probs, logprobs), (out.entropy, entropy)):
        torch.testing.assert_close(a.reshape(-1).double(), b.reshape(-1), rtol=1e-5, atol=1e-5)


def test_the_plugin_is_found_by_verl() -> None:
    """Fails if verl, which only logs a plug-in's errors, does not know r1v3's names."""
    assert "r1v3_grpo" in core_algos.POLICY_LOSS_REGISTRY
    assert "r1v3_group" in core_algos.ADV_ESTIMATOR_REGISTRY


def test_heads_are_rebound_by_external_lib() -> None:
    """Fails if the module for `model.external_lib` does not rebind, or stock is lost."""
    from verl.utils import import_utils
    from verl.utils.experimental import torch_functional

    from r1v3.integrations import verl as adapter

    assert torch_functional.FusedLinearForPPO is not adapter.FusedLinear
    import_utils.import_external_libs("r1v3.integrations.verl_heads")
    from r1v3.integrations import verl_heads

    try:
        assert torch_functional.FusedLinearForPPO is adapter.FusedLinear
        assert len(verl_heads.REBOUND.names) == 5
    finally:
        verl_heads.REBOUND.undo()
    assert torch_functional.FusedLinearForPPO is not adapter.FusedLinear


def test_megatron_heads_on_two_ranks() -> None:
    """Fails if a vocabulary-parallel head of verl is less exact with r1v3 than with its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    case = Path(__file__).with_name("verl_megatron_case.py")
    done = subprocess.run([*command, str(case)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def test_megatron_options_that_r1v3_does_not_compute_go_to_stock() -> None:
    """Fails if distillation or the sum of squares is dropped from the results."""
    from r1v3.integrations.verl import logits_processor

    process = logits_processor(lambda self, logits, label, temperature, **options: options)
    flags = ("calculate_sum_pi_squared", "distillation_use_topk", "distillation_only")
    for asked in flags:
        options = {flag: flag == asked for flag in flags} | {"calculate_entropy": True}
        assert process(SimpleNamespace(), None, None, None, **options) == options
