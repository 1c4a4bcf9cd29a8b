"""The language head and the policy loss as a trainer without fused kernels writes them."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.training_step.problem import CLIP
from r1v3.engine.head import Head

REFERENCE_ROWS = 512
ENTROPY_ROWS = 128


def fused(
    head: Head, old: Tensor, advantages: Tensor, sequences: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """r1v3's head: hidden states to loss without logits.

    Args:
        old: float32 [N, R], log-probs that ratios are taken to.
        advantages: float32 [N].
        sequences: of the whole step, by which the loss is divided.

    Returns:
        loss, and among others "token_logprobs" and "token_entropy" [N, R].
    """
    return head.grpo_loss(old, advantages, clip_low=CLIP, clip_high=CLIP, normalizer=sequences)


def materialized(
    head: Head, old: Tensor, advantages: Tensor, sequences: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `fused`, by a matrix product, float32 logits [M, V] and log_softmax."""
    rows = logprobs_and_entropy(head.hidden, _true_weight(head), head.token_ids, torch.float32)
    return _loss(head, *rows, old, advantages, sequences)


def materialized_bf16(
    head: Head, old: Tensor, advantages: Tensor, sequences: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `materialized`, but everything of size [M, V] is bfloat16: half the memory, less exact."""
    hidden, weight = head.hidden.bfloat16(), _true_weight(head).bfloat16()
    rows = logprobs_and_entropy(hidden, weight, head.token_ids, torch.bfloat16)
    return _loss(head, *rows, old, advantages, sequences)


def reference(
    head: Head, old: Tensor, advantages: Tensor, sequences: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `materialized`, a few rows at a time, computed again in the backward: it always fits."""
    weight, pieces = _true_weight(head), []
    rows = zip(head.hidden.split(REFERENCE_ROWS), head.token_ids.split(REFERENCE_ROWS), strict=True)
    for hidden, ids in rows:
        pieces.append(
            checkpoint(
                logprobs_and_entropy, hidden, weight, ids, torch.float32, use_reentrant=False
            )
        )
    logprobs, entropy = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return _loss(head, logprobs, entropy, old, advantages, sequences)


HEAD_LOSSES = {
    "fused": fused,
    "materialized": materialized,
    "materialized-bf16": materialized_bf16,
}


def logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """float32 log-probs [M] of the tokens and entropies, which get no gradient.

    Args:
        dtype: of the logits and of the log_softmax, both [M, V].
    """
    everything = torch.log_softmax((hidden @ weight.T).to(dtype), -1)
    with torch.no_grad():
        # In chunks, as trainers do it: all rows at once would take another two [M, V].
        entropy = [-(rows.exp() * rows).sum(-1) for rows in everything.split(ENTROPY_ROWS)]
    return everything.gather(-1, token_ids[:, None]).squeeze(-1).float(), torch.cat(entropy).float()


def _true_weight(head: Head) -> Tensor:
    return head.weight[: head.vocab_size]


def _loss(
    head: Head, logprobs: Tensor, entropy: Tensor, old: Tensor, advantages: Tensor, sequences: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped loss: mean over the tokens of a response, all of which count, then over those."""
    shape = head.loss_mask.shape
    logprobs, entropy = logprobs.view(shape), entropy.view(shape)
    ratio, advantages = (logprobs - old).exp(), advantages[:, None]
    per_token = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    tokens = {"token_logprobs": logprobs.detach(), "token_entropy": entropy}
    return per_token.mean(1).sum() / sequences, tokens
