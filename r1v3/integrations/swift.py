"""r1v3 in ms-swift: the heads of its trainers, and a reward.

A file for `--external_plugins`, which every process of ms-swift imports:

    from r1v3.integrations.swift import register_reward, use_head
    use_head()                   # use_head(megatron=True) for `megatron rlhf`
    register_reward()            # --reward_funcs r1v3

Losses and advantages are ms-swift's own.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from r1v3.integrations.rebinding import Name, Rebound, rebind
from r1v3.kernels import entropy_from_logits, logprobs_and_entropy, selective_log_softmax

REWARD = "r1v3"
_TRAINERS = "swift.rlhf_trainers"


def use_head(*, megatron: bool = False) -> Rebound:
    """Let ms-swift's GRPO, DPO and KTO trainers read their logits with r1v3's kernels.

    Args:
        megatron: the Megatron trainers instead, which need megatron-core.

    Returns:
        the names that were rebound, with `undo()`; also a context manager.

    Raises:
        ImportError: ms-swift is not installed.
        RuntimeError: this version of ms-swift has other heads; names the versions.
    """
    if megatron:
        return rebind("ms-swift", [_sharded("vocab_parallel_utils"), _sharded("grpo_trainer")])
    parameters = "logits, chunk_size"
    names = [
        _selective("grpo_trainer"),
        _selective("rlhf_mixin"),
        Name(f"{_TRAINERS}.grpo_trainer", "entropy_from_logits", parameters, entropy),
    ]
    return rebind("ms-swift", names)


def _sharded(module: str) -> Name:
    parameters = "logits, labels, compute_entropy, entropy_chunk_size"
    name = "compute_logps_and_entropy_from_logits"
    return Name(f"swift.megatron.trainers.{module}", name, parameters, sharded_logprobs)


def _selective(module: str) -> Name:
    name = "selective_log_softmax"
    return Name(f"{_TRAINERS}.{module}", name, "logits, index", logprobs)


def logprobs(logits: Tensor, index: Tensor) -> Tensor:
    """In the place of TRL's `selective_log_softmax`.

    Args:
        logits: [..., V]; index: [...], or [..., K] of several labels for each row.

    Returns:
        log-probabilities of the shape of index, float32 (float64 for float64 logits).
    """
    return selective_log_softmax(logits, index)


def entropy(logits: Tensor, chunk_size: int = 1) -> Tensor:
    """In the place of `entropy_from_logits`: [...] float32 of logits [..., V]."""
    return entropy_from_logits(logits)


def sharded_logprobs(
    logits: Tensor, labels: Tensor, compute_entropy: bool = False, entropy_chunk_size: int = 512
) -> tuple[Tensor, Tensor | None]:
    """In the place of ms-swift's `compute_logps_and_entropy_from_logits`.

    Args:
        logits: [B, T, V / TP]; labels: [B, T], -100 for log-probability 0.

    Returns:
        log-probabilities and entropies [B, T] float32, None where these are not asked for.
    """
    from megatron.core import mpu

    group = mpu.get_tensor_model_parallel_group()
    if not compute_entropy:
        return selective_log_softmax(logits, labels, group=group), None
    return logprobs_and_entropy(logits, labels, group=group)


class AnswerReward:
    """Reward of the report, as one of ms-swift's `orms`."""

    def __init__(self, args: Any = None, **_: object) -> None:
        self.args = args

    def __call__(
        self, completions: Sequence[str], solution: Sequence[str], **_: object
    ) -> list[float]:
        """Return 0.8 accuracy + 0.2 format for each completion.

        Args:
            solution: the data set's column of true answers.
        """
        from r1v3.rewards import score

        return [reward.total for reward in score(completions, list(solution))]


def register_reward() -> None:
    """Make `--reward_funcs r1v3` known to ms-swift.

    Raises:
        ImportError: ms-swift is not installed.
    """
    from swift.rewards import orms

    orms[REWARD] = AnswerReward
