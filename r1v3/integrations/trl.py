"""r1v3's fused language head in TRL.

    from r1v3.integrations.trl import use_head
    use_head()            # before the trainer is built or after, for every trainer of TRL

TRL's GRPO, RLOO, KTO, DPO and SFT trainers score completions through one class that computes
log-probabilities and entropies from hidden states, a part of the vocabulary at a time. That class
is replaced; every `loss_type` is TRL's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from r1v3.integrations.rebinding import Name, Rebound, rebind
from r1v3.kernels import linear_logprobs_and_entropy

_HEAD_PARAMETERS = (
    "ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, "
    "logit_scale, outputs"
)
_COMPUTED = {"log_probs", "entropy"}


def use_head(*, compact: bool = True) -> Rebound:
    """Let every trainer of TRL score its completions with `linear_logprobs_and_entropy`.

    TRL's own class goes on to serve other outputs than log-probabilities and entropies, and weights
    that DeepSpeed has partitioned (ZeRO-3), which are gathered anew for its backward.

    Args:
        compact: drop prompts and padding before the head on every device. TRL does so where
            Triton runs, and scores every position elsewhere.

    Returns:
        the names that were rebound, with `undo()`; also a context manager.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this version of TRL has another head; names the versions.
    """
    module = "trl.trainer.utils"
    names = [
        Name(module, "_ChunkedLogProbFunction", _HEAD_PARAMETERS, _Head, member="forward"),
    ]
    if compact:
        # In that module it decides the compaction alone.
        names.append(Name(module, "_use_triton", "device", _compact_everywhere))
    return rebind("trl", names)


def answer_reward(
    completions: Sequence[Any], solution: Sequence[str], **_: object
) -> list[float | None]:
    """A reward function for TRL's trainers: accuracy and format of the report, in [0, 1].

    Args:
        completions: texts, or conversations whose last message is the completion.
        solution: the data set's column of true answers.

    Returns:
        0.8 accuracy + 0.2 format for each completion; see `r1v3.rewards.score`.
    """
    from r1v3.rewards import score

    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    return [reward.total for reward in score(texts, list(solution))]


def _compact_everywhere(device: torch.device) -> bool:
    return True


class _Head:
    """Stands where TRL looks up an autograd function, of which it calls `apply` alone."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        *options: Any,
    ) -> tuple[Tensor | None, ...]:
        """Return log-probabilities [N], entropies [N] or None, and three times None.

        Args:
            hidden: [N, H]; weight: [V, H]; bias: [V] or None; targets: [N].
            options: final_logit_softcapping, logit_scale and the names of the outputs.
        """
        from trl.kernels import ChunkedLogProbFunction

        softcap, scale, outputs = options
        if not set(outputs) <= _COMPUTED or hasattr(weight, "ds_id"):
            return ChunkedLogProbFunction.apply(
                hidden, weight, bias, targets, temperature, chunk_size, *options
            )
        dtype = _compute_dtype(hidden)
        logprobs, entropy = linear_logprobs_and_entropy(
            hidden.to(dtype),
            weight.to(dtype),
            targets,
            bias=None if bias is None else bias.to(dtype),
            temperature=temperature,
            logit_scale=scale,
            softcap=softcap,
        )
        return logprobs, entropy if "entropy" in outputs else None, None, None, None


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which TRL multiplies: that of autocast, where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
