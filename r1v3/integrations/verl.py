"""r1v3 in verl: a policy loss, an advantage, a reward and the heads of its engines.

Installed beside verl, r1v3 is found by it in every worker (entry point `r1v3` of the group
`verl.plugins`):

    algorithm.adv_estimator=r1v3_group actor_rollout_ref.actor.policy_loss.loss_mode=r1v3_grpo

Heads of the FSDP and Megatron engines are rebound in every worker that builds a model:

    actor_rollout_ref.model.external_lib=r1v3.integrations.verl_heads

A reward function, with the path of this file:

    reward.custom_reward_function.path=.../r1v3/integrations/verl.py
    reward.custom_reward_function.name=compute_score
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r1v3.integrations.rebinding import Name, Rebound, rebind
from r1v3.kernels import (
    group_advantages,
    grpo_loss,
    linear_logprobs_and_entropy,
    logprobs_and_entropy,
)

POLICY_LOSS, ADVANTAGE = "r1v3_grpo", "r1v3_group"


def register() -> None:
    """Make the policy loss `r1v3_grpo` and the advantage `r1v3_group` known to verl.

    Raises:
        ImportError: verl is not installed.
    """
    from verl.trainer.ppo import core_algos

    core_algos.register_policy_loss(POLICY_LOSS)(policy_loss)
    core_algos.register_adv_est(ADVANTAGE)(advantage)


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return verl's "vanilla" loss (clip, dual clip, weights) and its metrics by `grpo_loss`.

    Args:
        old_log_prob, log_prob, advantages, response_mask, rollout_is_weights: [B, T].
        loss_agg_mode: any of verl's.
        config: verl's `ActorConfig`.

    Raises:
        ValueError: loss_agg_mode is not known, or a global count is missing with dp_size > 1.
    """
    low, high = config.clip_ratio_low, config.clip_ratio_high
    aggregation, normalizer = normalizer_of(
        loss_agg_mode, response_mask, **config.global_batch_info
    )
    loss, metrics = grpo_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        clip_low=config.clip_ratio if low is None else low,
        clip_high=config.clip_ratio if high is None else high,
        dual_clip=config.get("clip_ratio_c", 3.0),
        aggregation=aggregation,
        normalizer=normalizer,
        weights=rollout_is_weights,
    )
    clipped = metrics["clip_low_fraction"] + metrics["clip_high_fraction"]
    return loss, {
        "actor/pg_clipfrac": clipped.item(),
        "actor/ppo_kl": metrics["approx_kl"].item(),
        "actor/pg_clipfrac_lower": metrics["dual_clip_fraction"].item(),
    }


def normalizer_of(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[str, Tensor | float]:
    """Return r1v3's aggregation and normalizer for one of verl's `loss_agg_mode`.

    Args:
        mask: [B, T]; the others are verl's `global_batch_info`.

    Raises:
        ValueError: as `policy_loss`.
    """
    if mode == "token-sum":
        return "constant", 1 / dp_size
    count = batch_num_tokens if mode == "token-mean" else global_batch_size
    divisor: Tensor | float
    if count is not None:
        divisor = count / dp_size
    elif dp_size > 1:
        raise ValueError(f"loss_agg_mode {mode!r} needs the global count where dp_size > 1")
    elif mode == "token-mean":
        divisor = mask.sum().clamp(min=1)
    else:
        divisor = (mask.sum(-1) > 0).sum().clamp(min=1)
    if mode == "token-mean":
        return "token-mean", divisor
    if mode == "seq-mean-token-mean":
        return "sequence-mean", divisor
    if mode == "seq-mean-token-sum":
        return "sequence-sum", divisor
    if mode == "seq-mean-token-sum-norm":
        scale = mask.shape[-1] if loss_scale_factor is None else loss_scale_factor
        return "sequence-sum", divisor * scale
    raise ValueError(f"loss_agg_mode {mode!r} is not known")


def advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Return the group-relative advantage [B, T], twice, as verl's "grpo" does.

    Args:
        token_level_rewards, response_mask: [B, T].
        index: [B], the group of each row.
        config: verl's algorithm settings. The trainer passes `norm_adv_by_std_in_grpo` only to
            its own "grpo", so that it is read from here.
    """
    if config is not None:
        norm_adv_by_std_in_grpo = config.get("norm_adv_by_std_in_grpo", norm_adv_by_std_in_grpo)
    groups = np.unique(np.asarray(index).astype(str), return_inverse=True)[1]
    scalars = group_advantages(
        token_level_rewards.sum(-1),
        torch.as_tensor(groups),
        eps=epsilon,
        scale="group" if norm_adv_by_std_in_grpo else "none",
        singleton="raw",  # to verl, a group of one has mean 0 and standard deviation 1
    )
    out = scalars[:, None] * response_mask
    return out, out


@dataclass(frozen=True)
class _Row:
    """A sample as `r1v3.rewards.score` grades it."""

    question: str
    ground_truth: str
    options: list[str] | None


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **_: object,
) -> dict[str, float]:
    """Reward of the report for verl's reward managers: `score`, and its parts `acc`, `format`.

    Args:
        solution_str: the completion without its prompt.
        extra_info: "question" and "options" of the row, where it has them.
    """
    from r1v3.rewards import score

    extra = extra_info or {}
    row = _Row(extra.get("question", ""), ground_truth, extra.get("options"))
    (reward,) = score([solution_str], [row])
    return {"score": reward.total, "acc": reward.accuracy, "format": reward.format}


def use_heads(*, megatron: bool = False) -> Rebound:
    """Let verl's engines compute log-probabilities and entropies by r1v3's kernels.

    With `model.use_fused_kernels=True`: the head of every Hugging Face model family (FSDP), with
    either of verl's backends, and of Megatron models. Without it: the logits of the Megatron
    engine, which are read once and not cloned.

    Args:
        megatron: also the names of the Megatron engine, which need megatron-core.

    Returns:
        the names that were rebound, with `undo()`; also a context manager.

    Raises:
        ImportError: verl is not installed.
        RuntimeError: this version of verl has other heads; names the versions.
    """
    names = [
        Name(
            "verl.utils.experimental.torch_functional",
            "FusedLinearForPPO",
            "self, hidden_states, vocab_weights, input_ids, temperature",
            FusedLinear,
            member="forward",
        ),
        _cross_entropy("verl.utils.kernel.linear_cross_entropy"),
    ]
    if megatron:
        names += [
            _cross_entropy("verl.models.mcore.model_forward_fused"),
            _cross_entropy("verl.models.mcore.model_forward_1f1b_overlap"),
            _megatron_logits(),
        ]
    return rebind("verl", names)


def _cross_entropy(module: str) -> Name:
    """The name under which a module of verl calls its autograd function."""
    return Name(
        module,
        "linear_cross_entropy",
        "ctx, hidden, weight, labels, temperature, reduction, dist_process_group",
        linear_cross_entropy,
        member="__self__.forward",
    )


class FusedLinear(torch.nn.Module):
    """In the place of verl's `FusedLinearForPPO`."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies [..., T] of hidden_states [..., T, H]."""
        return linear_logprobs_and_entropy(
            hidden_states, vocab_weights, input_ids.long(), temperature=temperature
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """In the place of verl's function of this name: log-probabilities and entropies [N].

    Args:
        hidden: [..., H]; weight: [V, H], or a shard of the vocabulary with a group.
        labels: [...].
        reduction: "none", the only one that verl's models use.

    Raises:
        ValueError: another reduction.
    """
    if reduction != "none":
        raise ValueError(f"reduction {reduction!r} is not supported, only 'none'")
    return linear_logprobs_and_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        group=dist_process_group,
    )


def _megatron_logits() -> Name:
    """The method of verl's Megatron engine that reads the logits, with its replacement."""
    return Name(
        "verl.workers.engine.megatron.transformer_impl",
        "MegatronEngineWithLMHead._lm_head_logits_processor",
        "self, logits, label, temperature, *, calculate_sum_pi_squared, calculate_entropy, "
        "distillation_use_topk, distillation_only, logits_processor_func, batch, data_format",
        logits_processor,
        wraps=True,
    )


def logits_processor(stock: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Return the method for verl's Megatron engine; what r1v3 does not compute goes to `stock`."""

    def process(
        self: Any, logits: Tensor, label: Tensor, temperature: Tensor, **options: Any
    ) -> dict[str, Tensor]:
        """Log-probabilities and entropies [1, N] of logits [1, N, V / TP].

        The backward overwrites the logits.

        Args:
            temperature: [1, N].
        """
        others = ("calculate_sum_pi_squared", "distillation_use_topk", "distillation_only")
        if any(options[name] for name in others):
            return stock(self, logits, label, temperature, **options)
        from megatron.core import parallel_state

        logprobs, entropy = logprobs_and_entropy(
            logits,
            label,
            temperature=torch.where(temperature > 0, temperature, 1.0),  # padding has none
            group=parallel_state.get_tensor_model_parallel_group(),
            inplace_backward=True,
        )
        out = {"log_probs": logprobs}
        return {**out, "entropy": entropy} if options["calculate_entropy"] else out

    return process
