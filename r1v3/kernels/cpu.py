"""Calls into the compiled CPU kernels, `r1v3._C`: addresses, dtype codes and thread counts."""

import functools
import warnings
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from r1v3.kernels.arguments import METRICS
from r1v3.kernels.grpo_terms import gives_token_losses

_C: Any
try:
    _C = import_module("r1v3._C")
except ImportError:
    _C = None

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def built() -> bool:
    """Whether the compiled kernels exist."""
    return _C is not None


def capabilities() -> list[str]:
    """Every instruction set of the compiled kernels that this machine runs, best first."""
    return list(_C.cpu_capabilities())


def supports(tensor: Tensor) -> bool:
    """Whether the compiled kernels are built and take this CPU tensor's dtype."""
    if tensor.device.type != "cpu" or tensor.dtype not in DTYPE_CODES:
        return False
    if _C is None:
        _say_what_runs_instead()
    return _C is not None


@functools.cache
def _say_what_runs_instead() -> None:
    warnings.warn(
        "r1v3 was installed without its compiled CPU kernels: CPU tensors run the reference, with "
        "the same results, but slower. Install r1v3 again where there is a C++17 compiler.",
        RuntimeWarning,
        stacklevel=2,
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def temperature_arguments(temperature: float | Tensor) -> tuple[float, dict[str, int]]:
    """The number of all rows, and the last argument of a call where each row has its own."""
    if isinstance(temperature, Tensor):
        return 1.0, {"temperatures": temperature.data_ptr()}
    return temperature, {}


def row_statistics(
    x: Tensor,
    rows: Tensor | None,
    token_ids: Tensor | None,
    temperature: float | Tensor,
    stats: Tensor,
) -> None:
    """Write (m, s, w, t) of the rows of x [*, vocab] (any row stride) to stats [n, 4]."""
    number, more = temperature_arguments(temperature)
    _C.row_statistics(
        x.data_ptr(), DTYPE_CODES[x.dtype], stats.shape[0], x.stride(0), x.shape[1],
        _address(rows), _address(token_ids), number, stats.data_ptr(), torch.get_num_threads(),
        **more,
    )  # fmt: skip


def logprobs_and_entropy(
    x: Tensor,
    rows: Tensor | None,
    token_ids: Tensor | None,
    temperature: float | Tensor,
    logprobs: Tensor,
    entropy: Tensor | None,
    saved: Tensor,
) -> None:
    """Write the results [n] of the rows of x [*, vocab], and (m, log s, entropy) to saved [n, 3].

    Without `entropy`, the cheaper sums for the log-probabilities alone. A token id outside
    [0, vocab) gives 0.
    """
    number, more = temperature_arguments(temperature)
    _C.logprobs_and_entropy(
        x.data_ptr(), DTYPE_CODES[x.dtype], saved.shape[0], x.stride(0), x.shape[1],
        _address(rows), _address(token_ids), number, logprobs.data_ptr(), _address(entropy),
        saved.data_ptr(), torch.get_num_threads(), **more,
    )  # fmt: skip


def row_gradient(
    x: Tensor,
    out: Tensor,
    rows: Tensor | None,
    token_ids: Tensor | None,
    temperature: float | Tensor,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    softcap: float,
) -> None:
    """Write the gradient of the rows of x [*, vocab] to the same rows of out; saved is [n, 3].

    With a softcap, x is softcap * tanh(z / softcap) and the gradient is that of z.
    """
    number, more = temperature_arguments(temperature)
    capped = {"softcap": softcap} if softcap else {}
    _C.row_gradient(
        x.data_ptr(), DTYPE_CODES[x.dtype], saved.shape[0], x.stride(0), x.shape[1],
        _address(rows), _address(token_ids), number, saved.data_ptr(), _address(grad_logprobs),
        _address(grad_entropy), out.data_ptr(), out.stride(0), torch.get_num_threads(), **more,
        **capped,
    )  # fmt: skip


def first_outside(ids: Tensor, vocab: int, ignored: int) -> int:
    """Position of the first int64 id of [n] that is neither in [0, vocab) nor ignored, or -1."""
    return int(_C.first_outside(ids.data_ptr(), ids.shape[0], vocab, ignored))


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    groups_are_ids: bool,
    baseline: int,
    scale: int,
    singleton: int,
    ddof: int,
    eps: float,
) -> Tensor:
    """Float32 advantages of rewards [N]; the codes are positions in `arguments`.

    Args:
        groups: int64, a group id per reward in any order, or the offsets [G + 1] of consecutive
            groups.
    """
    out = torch.empty_like(rewards)
    n, n_groups, order = rewards.shape[0], groups.shape[0] - 1, None
    if groups_are_ids:
        order, offsets = torch.empty_like(groups), groups.new_empty(n + 1)
        n_groups = _C.segments_of_ids(groups.data_ptr(), n, order.data_ptr(), offsets.data_ptr())
        groups = offsets
    _C.group_advantages(
        rewards.data_ptr(), n, _address(order), groups.data_ptr(), n_groups, baseline, scale, ddof,
        eps, singleton, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def grpo_loss(
    logprobs: Tensor,
    terms: list[Tensor | None],
    mask: Tensor,
    offsets: Tensor,
    normalizer: float,
    options: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, or losses, gradient and metrics of flat float32 tokens; normalizer 0 counts them.

    The other arguments are those of the op.
    """
    tokens = logprobs.shape[0]
    advantages, old_logprobs, ref_logprobs, weights = terms
    assert advantages is not None
    loss = logprobs.new_empty((tokens,) if gives_token_losses(options) else ())
    metrics = logprobs.new_empty(len(METRICS))
    gradient = torch.empty_like(logprobs)
    _C.grpo_loss(
        logprobs.data_ptr(), tokens, _address(old_logprobs), advantages.data_ptr(),
        advantages.shape[0] == tokens, mask.data_ptr(), _address(ref_logprobs),
        _address(weights), weights is not None and weights.shape[0] == tokens,
        offsets.data_ptr(), offsets.shape[0] - 1, normalizer, options, loss.data_ptr(),
        gradient.data_ptr(), metrics.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return loss, gradient, metrics


def read_sum(x: Tensor) -> float:
    """The sum of a contiguous float32 tensor by the plainest fast loop: a measure of bandwidth."""
    return float(_C.read_sum(x.data_ptr(), x.numel(), torch.get_num_threads()))


def ban_tokens(logits: Tensor, token_ids: Tensor, enabled: Tensor | None, vocab_start: int) -> None:
    """logits [V] or [n, V] (any row stride), integer ids, enabled bool [] or [n], or None."""
    ids = token_ids.to(torch.int64).contiguous()
    flags = None if enabled is None else enabled.contiguous()
    rows, row_stride = (logits.shape[0], logits.stride(0)) if logits.dim() == 2 else (1, 0)
    _C.ban_tokens(
        logits.data_ptr(), DTYPE_CODES[logits.dtype], rows, row_stride, logits.shape[-1],
        ids.data_ptr(), ids.shape[0], _address(flags), vocab_start,
    )  # fmt: skip


def _sampled_rows(
    x: Tensor,
    first: int,
    temperature: Tensor,
    banned: Tensor | None,
    enabled: Tensor | None,
    floor: Tensor | None,
) -> tuple[object, ...]:
    return (
        x.data_ptr(), DTYPE_CODES[x.dtype], x.shape[0], x.stride(0), x.shape[1], first,
        temperature.data_ptr(), _address(banned), 0 if banned is None else banned.shape[0],
        _address(enabled), _address(floor), torch.get_num_threads(),
    )  # fmt: skip


def sample_tokens(
    x: Tensor,
    temperature: Tensor,
    banned: Tensor | None,
    enabled: Tensor | None,
    floor: Tensor | None,
    uniforms: Tensor,
    forced: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities and entropy [n] of x [n, vocab] (any row stride).

    Args:
        temperature, floor, uniforms: float64 [n]; banned: int64 [K]; enabled: bool [n]; forced:
            int64 [n].
    """
    results = _sampling_results(x)
    _C.sample_tokens(
        *_sampled_rows(x, 0, temperature, banned, enabled, floor), uniforms.data_ptr(),
        _address(forced), *(result.data_ptr() for result in results),
    )  # fmt: skip
    return results


def sample_statistics(
    x: Tensor, first: int, temperature: Tensor, banned: Tensor | None, enabled: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Statistics of a shard: its own [n, chunks, 3], and those for the others [n, 7], float64."""
    chunks = -(-x.shape[1] // _C.sample_chunk)
    parts = torch.empty(x.shape[0], chunks, 3, dtype=torch.float64, device=x.device)
    rows = parts.new_empty(x.shape[0], 7)
    _C.sample_statistics(
        *_sampled_rows(x, first, temperature, banned, enabled, None), parts.data_ptr(),
        rows.data_ptr(),
    )  # fmt: skip
    return parts, rows


def sample_choose(
    x: Tensor,
    first: int,
    temperature: Tensor,
    banned: Tensor | None,
    enabled: Tensor | None,
    parts: Tensor,
    rows: Tensor,
    rank: int,
    uniforms: Tensor,
    forced: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Results as of `sample_tokens`, from the rows [ranks, n, 7] of all shards.

    A token of another shard is -1, with the log-probability 0.
    """
    results = _sampling_results(x)
    _C.sample_choose(
        *_sampled_rows(x, first, temperature, banned, enabled, None), parts.data_ptr(),
        rows.data_ptr(), rows.shape[0], rank, uniforms.data_ptr(), _address(forced),
        *(result.data_ptr() for result in results),
    )  # fmt: skip
    return results


def _sampling_results(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.new_empty(x.shape[0], dtype=torch.int64)
    logprobs = x.new_empty(x.shape[0], dtype=torch.float32)
    return tokens, logprobs, torch.empty_like(logprobs)


def prefer_huge_pages(x: Tensor) -> None:
    """Ask for huge pages under a CPU tensor that has not been written yet.

    Without them, the system's page faults take longer than the product of a row or two with it.
    """
    if _C is not None and x.device.type == "cpu":
        _C.prefer_huge_pages(x.data_ptr(), x.numel() * x.element_size())


def multiplies(dtype: torch.dtype) -> bool:
    """Whether `product` is built for operands of this dtype and this processor."""
    return _C is not None and dtype in DTYPE_CODES and _C.has_gemm(DTYPE_CODES[dtype])


def has_bfloat16_dot() -> bool:
    """Whether `product` multiplies pairs of bfloat16 as they are, not converted to float32."""
    return multiplies(torch.bfloat16) and bool(_C.has_bfloat16_dot())


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool, capability: str = "") -> None:
    """out (+)= a @ b for a [n, k], b [k, m] of any strides, float32 out [n, m].

    The rows of out are contiguous.
    """
    _C.gemm(
        DTYPE_CODES[a.dtype], a.data_ptr(), a.shape[0], *a.stride(), DTYPE_CODES[b.dtype],
        b.data_ptr(), b.shape[1], b.stride(1), b.stride(0), a.shape[1], out.data_ptr(),
        out.stride(0), add, torch.get_num_threads(), capability,
    )  # fmt: skip
