"""r1v3 in slime: the heads of its Megatron backend, group-relative rewards and a reward.

    --custom-megatron-init-path r1v3.integrations.slime.use_head
    --custom-reward-post-process-path r1v3.integrations.slime.group_rewards
    --custom-rm-path r1v3.integrations.slime.reward

The log-probabilities and entropies that every loss of slime begins with are r1v3's; the losses
themselves (PPO, GSPO, CISPO, with their masks and corrections) stay slime's own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from r1v3.integrations.rebinding import Name, Rebound, rebind
from r1v3.kernels import group_advantages, logprobs_and_entropy, selective_log_softmax

# Estimators of slime that start from rewards over their group, and from centered ones.
_SCALED, _CENTERED = ("grpo", "gspo", "cispo"), "reinforce_plus_plus_baseline"
_LOSS = "slime.backends.megatron_utils.loss"
_RESPONSES_PARAMETERS = (
    "logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy, "
    "non_loss_data, top_p_token_ids, top_p_token_offsets"
)
_ROWS_PARAMETERS = (
    "logits, tokens, tp_group, with_entropy, chunk_size, log_prob_keep_mask, with_entropy_grad"
)


def use_head(args: Any = None) -> Rebound:
    """Let slime's Megatron actors read their logits with `logprobs_and_entropy`.

    Only the responses' rows are read, in place, and the temperature is applied to them there;
    slime divides and reads every row. Context parallelism and the replay of top-p sampling go
    through slime's own function, without the replay on r1v3's kernels.

    Args:
        args: slime's arguments, with which it calls a `--custom-megatron-init-path`; not read.

    Returns:
        the names that were rebound, with `undo()`; also a context manager.

    Raises:
        ImportError: slime is not installed.
        RuntimeError: this version of slime has other heads; names the versions.
    """
    responses = "get_log_probs_and_entropy", _RESPONSES_PARAMETERS, response_logprobs
    return rebind(
        "slime",
        [
            Name(_LOSS, "calculate_log_probs_and_entropy", _ROWS_PARAMETERS, row_logprobs),
            Name(_LOSS, *responses, wraps=True),
            Name("slime.backends.megatron_utils.actor", *responses, wraps=True),
        ],
    )


def row_logprobs(
    logits: Tensor,
    tokens: Tensor,
    tp_group: Any,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None,
    with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """In the place of slime's `calculate_log_probs_and_entropy`.

    Args:
        logits: [T, V / TP]; tokens: [T].
        chunk_size: not needed, nothing of the size of the logits is allocated.
        log_prob_keep_mask: bool [T, V / TP]; with one, slime's own function is called.

    Returns:
        log-probabilities [T, 1] and entropies [T], or None where they are not asked for.
    """
    if log_prob_keep_mask is not None:
        from slime.utils.ppo_utils import calculate_log_probs_and_entropy

        return calculate_log_probs_and_entropy(
            logits,
            tokens,
            tp_group,
            with_entropy=with_entropy,
            chunk_size=chunk_size,
            log_prob_keep_mask=log_prob_keep_mask,
            with_entropy_grad=with_entropy_grad,
        )
    if not with_entropy:
        return selective_log_softmax(logits, tokens, group=tp_group).unsqueeze(-1), None
    logprobs, entropy = logprobs_and_entropy(logits, tokens, group=tp_group)
    return logprobs.unsqueeze(-1), entropy if with_entropy_grad else entropy.detach()


def response_logprobs(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return what stands in the place of slime's `get_log_probs_and_entropy`, which is `stock`."""

    def compute(
        logits: Tensor,
        *,
        args: Any,
        unconcat_tokens: Sequence[Tensor],
        total_lengths: Sequence[int],
        response_lengths: Sequence[int],
        with_entropy: bool = False,
        **options: Any,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Return an empty tensor, and "log_probs" and, if asked for, "entropy" of each response.

        Args:
            logits: [1, T, V / TP], samples one after the other, padding after the last.
            unconcat_tokens: each sample's prompt and response.
            total_lengths, response_lengths: tokens of each sample, and of its response.
            options: those that only slime's own function reads.
        """
        from megatron.core import mpu

        samples = unconcat_tokens, total_lengths, response_lengths
        if mpu.get_context_parallel_world_size() > 1 or options.get("top_p_token_ids") is not None:
            names = "unconcat_tokens", "total_lengths", "response_lengths"
            options |= dict(zip(names, samples, strict=True)) | {"with_entropy": with_entropy}
            return stock(logits, args=args, **options)
        rows, labels = _response_rows(logits, *samples)
        how = {
            "rows": rows,
            "temperature": getattr(args, "rollout_temperature", 1.0),
            "group": mpu.get_tensor_model_parallel_group(),
        }
        lengths = list(response_lengths)
        if not with_entropy:
            logprobs = selective_log_softmax(logits[0], labels, **how)
            return logits.new_empty(0), {"log_probs": list(logprobs.split(lengths))}
        logprobs, entropy = logprobs_and_entropy(logits[0], labels, **how)
        if getattr(args, "entropy_coef", 0.0) == 0:
            entropy = entropy.detach()
        results = {"log_probs": logprobs.split(lengths), "entropy": entropy.split(lengths)}
        return logits.new_empty(0), {name: list(parts) for name, parts in results.items()}

    return compute


def _response_rows(
    logits: Tensor,
    unconcat_tokens: Sequence[Tensor],
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Rows that predict the responses' tokens [n], and what each row predicts [T]."""
    device = logits.device
    labels = torch.zeros(logits.shape[1], dtype=torch.int64, device=device)
    rows, start = [], 0
    for tokens, total, response in zip(
        unconcat_tokens, total_lengths, response_lengths, strict=True
    ):
        first, end = start + total - response - 1, start + total - 1
        labels[first:end] = tokens[total - response : total].to(device)
        rows.append(torch.arange(first, end, device=device))
        start += total
    return torch.cat(rows), labels


def group_rewards(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Rewards of slime's samples, and what its estimator starts from, by `group_advantages`.

    As slime's own normalization, but for a batch that lost groups to a filter: slime then takes
    all samples as one group.

    Args:
        args: slime's arguments; `n_samples_per_prompt` consecutive samples are a group.
        samples: slime's `Sample`s.

    Raises:
        ValueError: a group is not whole.
    """
    raw = [float(sample.get_reward_value(args)) for sample in samples]
    estimator = args.advantage_estimator
    if not args.rewards_normalization or estimator not in (*_SCALED, _CENTERED):
        return raw, raw
    scale = "group" if args.grpo_std_normalization and estimator != _CENTERED else "none"
    advantages = group_advantages(torch.tensor(raw), args.n_samples_per_prompt, scale=scale)
    return raw, advantages.tolist()


async def reward(args: Any, sample: Any, **_: object) -> float:
    """Reward of the report for a sample of slime: 0.8 accuracy + 0.2 format, in [0, 1].

    Args:
        sample: its `response` is graded against its `label`.
    """
    from r1v3.rewards import score

    return score([sample.response], [sample.label])[0].total
