"""Banning tokens before sampling, as NoWait decoding does with its reflection words."""

from torch import Tensor

from r1v3.kernels import cpu, devices, reference
from r1v3.kernels.arguments import check_shape
from r1v3.kernels.registration import register_small_op


def ban_tokens_(
    logits: Tensor, token_ids: Tensor, *, enabled: Tensor | None = None, vocab_start: int = 0
) -> Tensor:
    """Set the logits of `token_ids` to -inf, in place, in the enabled rows.

    Args:
        logits: [..., V] floating point, any strides; may be one shard of the vocabulary.
        token_ids: [K] integers, ids of the whole vocabulary; those outside this shard are
            ignored, repetitions are harmless.
        enabled: [...], nonzero where the ban holds; None bans in every row.
        vocab_start: id of this shard's first column.

    Returns:
        logits, the same tensor.

    Raises:
        ValueError: if logits are not floating point, token_ids are not integers [K], or the shape
            of enabled is not that of the rows.
    """
    if logits.dim() == 0 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a floating-point tensor [..., V], got {logits.dtype} "
            f"of shape {list(logits.shape)}"
        )
    if token_ids.dim() != 1 or token_ids.is_floating_point() or token_ids.is_complex():
        raise ValueError(
            f"token_ids must be integers [K], got {token_ids.dtype} "
            f"of shape {list(token_ids.shape)}"
        )
    if enabled is not None:
        check_shape("enabled", enabled, tuple(logits.shape[:-1]))
        enabled = enabled != 0
    _call_ban_tokens(logits, token_ids, enabled, vocab_start)
    return logits


def _ban_tokens_(
    logits: Tensor, token_ids: Tensor, enabled: Tensor | None, vocab_start: int
) -> None:
    if logits.numel() == 0 or token_ids.numel() == 0:
        return
    if devices.runs_triton(logits) and logits.dim() <= 3:
        from r1v3.kernels.triton import ban_tokens as triton

        triton.ban_tokens(logits, token_ids, enabled, vocab_start)
    elif cpu.supports(logits) and logits.stride(-1) == 1 and logits.dim() <= 2:
        cpu.ban_tokens(logits, token_ids, enabled, vocab_start)
    else:
        reference.ban_tokens_(logits, token_ids, enabled=enabled, vocab_start=vocab_start)


_call_ban_tokens = register_small_op(
    "ban_tokens_", _ban_tokens_, fake=lambda *_: None, mutates_args=("logits",)
)
