"""Calls of the compiled CPU kernels with tensors, and their float64 truth."""

import pytest
import torch
from torch import Tensor

from r1v3 import _C

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CAPABILITIES = _C.cpu_capabilities()

each_capability = pytest.mark.parametrize("capability", CAPABILITIES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def forward(
    logits: Tensor,
    token_ids: Tensor | None = None,
    *,
    temperature: float = 1.0,
    rows: Tensor | None = None,
    vocab: int | None = None,
    threads: int = 1,
    capability: str = "",
) -> Tensor:
    """(m, s, w, t) per row, [n, 4]; m and t are logits, s and w of (x - m) / temperature."""
    n = logits.shape[0] if rows is None else rows.shape[0]
    stats = torch.full((n, 4), 777.0)
    _C.row_statistics(
        logits=logits.data_ptr(),
        dtype=DTYPES[logits.dtype],
        n_rows=n,
        row_stride=logits.stride(0),
        vocab=logits.shape[1] if vocab is None else vocab,
        rows=0 if rows is None else rows.data_ptr(),
        token_ids=0 if token_ids is None else token_ids.data_ptr(),
        temperature=temperature,
        stats=stats.data_ptr(),
        num_threads=threads,
        capability=capability,
    )
    return stats


def backward(
    logits: Tensor,
    token_ids: Tensor | None,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    out: Tensor,
    temperature: float = 1.0,
    rows: Tensor | None = None,
    threads: int = 1,
    capability: str = "",
) -> Tensor:
    m, s, w, _ = stats.double().unbind(-1)
    log_s = torch.where(s == 0, 1.0, s).log()
    entropy = torch.where(s == 0, 0.0, log_s - w / torch.where(s == 0, 1.0, s))
    saved = torch.stack([m, log_s, entropy], dim=-1).float()
    _C.row_gradient(
        logits=logits.data_ptr(),
        dtype=DTYPES[logits.dtype],
        n_rows=stats.shape[0],
        row_stride=logits.stride(0),
        vocab=logits.shape[1],
        rows=0 if rows is None else rows.data_ptr(),
        token_ids=0 if token_ids is None else token_ids.data_ptr(),
        temperature=temperature,
        saved=saved.data_ptr(),
        grad_logprobs=0 if grad_logprobs is None else grad_logprobs.data_ptr(),
        grad_entropy=0 if grad_entropy is None else grad_entropy.data_ptr(),
        grad_logits=out.data_ptr(),
        grad_row_stride=out.stride(0),
        num_threads=threads,
        capability=capability,
    )
    return out


def outputs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    capability: str = "",
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs [n], entropy [n] and (m, log s, entropy) [n, 3]."""
    n = logits.shape[0]
    logprobs, entropy, saved = torch.full((n,), 7.0), torch.full((n,), 7.0), torch.empty(n, 3)
    _C.logprobs_and_entropy(
        logits=logits.data_ptr(),
        dtype=DTYPES[logits.dtype],
        n_rows=n,
        row_stride=logits.stride(0),
        vocab=logits.shape[1],
        rows=0,
        token_ids=token_ids.data_ptr(),
        temperature=temperature,
        logprobs=logprobs.data_ptr(),
        entropy=entropy.data_ptr() if with_entropy else 0,
        saved=saved.data_ptr(),
        num_threads=1,
        capability=capability,
    )
    return logprobs, entropy, saved


def results(stats: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    m, s, w, t = stats.double().unbind(-1)
    return (t - m) / temperature - s.log(), s.log() - w / s


def eager(
    logits: Tensor, token_ids: Tensor, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    logp = (logits.to(dtype) / temperature).log_softmax(-1)
    product = torch.where(logp == -torch.inf, 0.0, logp.exp() * logp)
    return logp.gather(-1, token_ids[:, None]).squeeze(-1), -product.sum(-1)


def eager_gradient(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float,
    grads: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    x = logits.to(dtype).requires_grad_()
    logprobs, entropy = eager(x, token_ids, temperature, dtype)
    (logprobs @ grads[0].to(dtype) + entropy @ grads[1].to(dtype)).backward()
    assert x.grad is not None
    return x.grad


def error(value: Tensor, truth: Tensor) -> float:
    return (value.double() - truth).abs().max().item()


def make(n: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (torch.randn(n, vocab) * 4 + 3).to(dtype), torch.randint(0, vocab, (n,))
