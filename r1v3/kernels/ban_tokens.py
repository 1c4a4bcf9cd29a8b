"""Banning tokens before sampling (NoWait decoding)."""

from torch import Tensor

from r1v3.kernels import reference


def ban_tokens_(
    logits: Tensor, token_ids: Tensor, *, enabled: Tensor | None = None, vocab_start: int = 0
) -> Tensor:
    """Set the logits [..., V] of token_ids to -inf in place and return them."""
    return reference.ban_tokens_(logits, token_ids, enabled=enabled, vocab_start=vocab_start)
