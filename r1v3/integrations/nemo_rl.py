"""r1v3 in NeMo-RL: log-probabilities and entropies of its Megatron and DTensor policies.

    from r1v3.integrations.nemo_rl import use_head
    use_head()            # in every worker process

Losses, advantages and everything that filters by top-k or top-p are NeMo-RL's own.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r1v3.integrations.rebinding import Name, Rebound, rebind
from r1v3.kernels import entropy_from_logits, linear_logprobs_and_entropy, selective_log_softmax

_MODULE = "nemo_rl.distributed.model_utils"
_SHARD = "ctx, vocab_parallel_logits, target, vocab_start_index, vocab_end_index"
_NEXT_TOKEN = (
    "get_next_token_logprobs_from_logits",
    "input_ids, next_token_logits, seq_index, vocab_parallel_rank, vocab_parallel_group, "
    "context_parallel_group, sampling_params, chunk_size",
)


def use_head() -> Rebound:
    """Let NeMo-RL read logits with r1v3's kernels, and score hidden states without logits.

    Replaced are the autograd functions that its policies call on sharded logits, whole or a part
    of the sequence at a time, packed or not; that of `use_linear_ce_fusion_loss`, which takes
    hidden states; and what the losses call on logits that are not sharded.

    Returns:
        the names that were rebound, with `undo()`; also a context manager.

    Raises:
        ImportError: NeMo-RL is not installed.
        RuntimeError: this version of NeMo-RL has other heads; names the versions.
    """
    functions = [
        ("DistributedLogprob", f"{_SHARD}, group, inference_only", Logprob),
        (
            "ChunkedDistributedLogprob",
            f"{_SHARD}, chunk_size, tp_group, inference_only",
            ChunkedLogprob,
        ),
        (
            "ChunkedDistributedEntropy",
            "ctx, vocab_parallel_logits, chunk_size, tp_group, inference_only",
            ChunkedEntropy,
        ),
        (
            "ChunkedDistributedHiddenStatesToLogprobs",
            "ctx, tensor_parallel_hidden_states, target, output_weight_layer, vocab_start_index, "
            "vocab_end_index, chunk_size, tp_group, inference_only",
            HiddenLogprob,
        ),
    ]
    names = [Name(_MODULE, *function, member="forward") for function in functions]
    for module in (_MODULE, "nemo_rl.algorithms.loss.utils"):
        names.append(Name(module, *_NEXT_TOKEN, next_token_logprobs, wraps=True))
    return rebind("nemo-rl", names)


def _gradients(inference_only: bool) -> torch.set_grad_enabled:
    """A context in which gradients are recorded as outside, but for inference."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only)


class Logprob:
    """In the place of NeMo-RL's autograd function, of which it calls `apply` alone."""

    @staticmethod
    def apply(
        logits: Tensor,
        target: Tensor,
        start: int,
        end: int,
        group: Any,
        inference_only: bool = False,
    ) -> Tensor:
        """Return log-probabilities [B, S] of target [B, S] by logits [B, S, V / TP].

        Args:
            start, end: the shard's tokens, which are those of the rank in its group.
        """
        with _gradients(inference_only):
            return selective_log_softmax(logits, target, group=group)


class ChunkedLogprob:
    """As `Logprob`; nothing of the size of the logits is allocated, so that no chunk is needed."""

    @staticmethod
    def apply(
        logits: Tensor,
        target: Tensor,
        start: int,
        end: int,
        chunk_size: int,
        group: Any,
        inference_only: bool = False,
    ) -> Tensor:
        """Return log-probabilities [B, S]; see `Logprob.apply`."""
        return Logprob.apply(logits, target, start, end, group, inference_only)


class ChunkedEntropy:
    """In the place of an autograd function that returns the sum of p log p: minus the entropy."""

    @staticmethod
    def apply(logits: Tensor, chunk_size: int, group: Any, inference_only: bool = False) -> Tensor:
        """Return minus the entropies [B, S] of logits [B, S, V / TP]."""
        with _gradients(inference_only):
            return -entropy_from_logits(logits, group=group)


class HiddenLogprob:
    """In the place of the autograd function of `use_linear_ce_fusion_loss`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        target: Tensor,
        weight: Tensor,
        start: int,
        end: int,
        chunk_size: int,
        group: Any,
        inference_only: bool = False,
    ) -> Tensor:
        """Return log-probabilities [B, S].

        Args:
            hidden: [S / TP, B, H], this rank's part of the sequence.
            target: [B, S]; weight: [V / TP, H].
        """
        with _gradients(inference_only):
            hidden = _Gathered.apply(hidden, group)
            logprobs, _ = linear_logprobs_and_entropy(
                hidden.transpose(0, 1), weight, target, group=group, reduce_hidden_grad=False
            )
            return logprobs


class _Gathered(torch.autograd.Function):
    """Parts [S / TP, ...] of all ranks as one [S, ...]; the ranks' gradients are added up."""

    @staticmethod
    def forward(ctx, part, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        parts = [each.contiguous() for each in gradient.chunk(ctx.group.size())]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own, None


def next_token_logprobs(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what stands in the place of `get_next_token_logprobs_from_logits`, which is `stock`.

    Sharded logits go to it, and from there to the classes above.
    """

    def compute(
        input_ids: Tensor,
        next_token_logits: Tensor,
        seq_index: Tensor | None = None,
        vocab_parallel_rank: int | None = None,
        vocab_parallel_group: Any = None,
        context_parallel_group: Any = None,
        sampling_params: Any = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Return log-probabilities [B, S - 1] of input_ids [B, S] by logits [B, S, V]."""
        from nemo_rl.algorithms.logits_sampling_utils import need_top_k_or_top_p_filtering
        from torch.distributed.tensor import DTensor

        if (
            vocab_parallel_group is not None
            or isinstance(next_token_logits, DTensor)
            or need_top_k_or_top_p_filtering(sampling_params)
        ):
            return stock(
                input_ids,
                next_token_logits,
                seq_index=seq_index,
                vocab_parallel_rank=vocab_parallel_rank,
                vocab_parallel_group=vocab_parallel_group,
                context_parallel_group=context_parallel_group,
                sampling_params=sampling_params,
                chunk_size=chunk_size,
            )
        labels = input_ids[:, 1:].to(next_token_logits.device)
        return selective_log_softmax(next_token_logits[:, :-1], labels)

    return compute
