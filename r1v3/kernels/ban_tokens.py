"""Banning tokens before sampling, as NoWait decoding does with its reflection words."""

import torch
from torch import Tensor

from r1v3.kernels import devices, host, reference
from r1v3.kernels.arguments import check_shape


def ban_tokens_(
    logits: Tensor, token_ids: Tensor, *, enabled: Tensor | None = None, vocab_start: int = 0
) -> Tensor:
    """Set the logits of `token_ids` to -inf, in place, in the enabled rows.

    Args:
        logits: [..., V] floating point, any strides; may be one shard of the vocabulary.
        token_ids: [K] integers, ids of the whole vocabulary; those outside this shard are
            ignored, repetitions are harmless.
        enabled: [...], not 0 where the ban holds; None bans in every row.
        vocab_start: id of this shard's first column.

    Returns:
        logits, the same tensor.

    Raises:
        ValueError: for a shape or dtype that makes no sense.
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
    torch.ops.r1v3.ban_tokens_.default(logits, token_ids, enabled, vocab_start)
    return logits


# Not `custom_op`, whose wrappers take longer than the kernel.
torch.library.define(
    "r1v3::ban_tokens_",
    "(Tensor(a!) logits, Tensor token_ids, Tensor? enabled, int vocab_start) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("r1v3::ban_tokens_", ("cpu", "cuda"))
def _ban_tokens_(
    logits: Tensor, token_ids: Tensor, enabled: Tensor | None, vocab_start: int
) -> None:
    torch.autograd.graph.increment_version(logits)
    if logits.numel() == 0 or token_ids.numel() == 0:
        return
    if devices.runs_triton(logits) and logits.dim() <= 3:
        from r1v3.kernels import ban_tokens_triton

        ban_tokens_triton.ban_tokens(logits, token_ids, enabled, vocab_start)
    elif host.supports(logits) and logits.stride(-1) == 1 and logits.dim() <= 2:
        host.ban_tokens(logits, token_ids, enabled, vocab_start)
    else:
        reference.ban_tokens_(logits, token_ids, enabled=enabled, vocab_start=vocab_start)


@torch.library.register_fake("r1v3::ban_tokens_")
def _(logits: Tensor, token_ids: Tensor, enabled: Tensor | None, vocab_start: int) -> None:
    return None
