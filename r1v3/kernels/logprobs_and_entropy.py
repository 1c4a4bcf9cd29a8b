"""Log-probability and entropy of each row of logits."""

from torch import Tensor
from torch.distributed import ProcessGroup

from r1v3.kernels import reference
from r1v3.kernels.arguments import check_logits, check_token_ids


def logprobs_and_entropy(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    rows: Tensor | None = None,
    group: ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of token_ids and entropy, both [...] float32, from logits [..., V]."""
    check_logits(logits, temperature, vocab_size)
    check_token_ids(token_ids, tuple(logits.shape[:-1]))
    return reference.logprobs_and_entropy(
        logits, token_ids, temperature=temperature, vocab_size=vocab_size, rows=rows
    )


def entropy_from_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    rows: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Entropy in nats, [...] float32, from logits [..., V]."""
    check_logits(logits, temperature, vocab_size)
    return reference.entropy_from_logits(
        logits, temperature=temperature, vocab_size=vocab_size, rows=rows
    )


def selective_log_softmax(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    rows: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Log-probability of token_ids, [...] float32, from logits [..., V]."""
    return logprobs_and_entropy(
        logits, token_ids, temperature=temperature, vocab_size=vocab_size, rows=rows, group=group
    )[0]
