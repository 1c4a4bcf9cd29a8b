"""Launches csrc/cuda/logits_grpo_loss.cu: one read of the logits, one write of their gradient."""

from functools import cache

import torch
from torch import Tensor

from r1v3.kernels import cpu, devices
from r1v3.kernels.grpo_terms import TokenTerms

SUPPORTED = (torch.float32, torch.bfloat16)


def cluster(logits: Tensor, vocab: int) -> int:
    """Blocks of the cluster that holds a row of vocab logits, 0 where the kernel cannot run.

    It needs r1v3._C built with CUDA, an architecture with thread-block clusters (sm_90 on) and
    rows of at most eight multiprocessors' shared memory.
    """
    if not logits.is_cuda or logits.dtype not in SUPPORTED or not built():
        return 0
    with devices.launching_on(logits):
        return _cluster(cpu.DTYPE_CODES[logits.dtype], vocab, torch.cuda.current_device())


def built() -> bool:
    """Whether the compiled part has the kernel."""
    return cpu._C is not None and bool(cpu._C.built_with_cuda)


@cache
def _cluster(dtype: int, vocab: int, device: int) -> int:
    return int(cpu._C.logits_grpo_loss_cluster(dtype, vocab))


def logits_grpo_loss(
    logits: Tensor,
    gradient: Tensor | None,
    token_ids: Tensor,
    terms: TokenTerms,
    temperature: float | Tensor,
    vocab: int,
    blocks: int,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n] and entropy [n]; writes the gradient, which may be the logits.

    Without a gradient the results have the same bits.

    Args:
        token_ids: int64 [n]; a token with a loss scale of 0 or label -100 is not read.
        temperature: a number > 0, or float64 [n].
        blocks: from `cluster`.
    """
    from r1v3.kernels.triton.logits_statistics import as_rows

    logits = as_rows(logits)
    address, layout = 0, [1, 0, 0]
    if gradient is not None:
        gradient = as_rows(gradient)
        address, layout = gradient.data_ptr(), _layout(gradient)
    logprobs = torch.empty(token_ids.shape[0], dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logprobs)
    scale, advantages, old, ref, weights = terms.tensors()
    given = [None if x is None else x.contiguous() for x in
             (token_ids, scale, old, advantages, weights, ref)]  # fmt: skip
    number, more = cpu.temperature_arguments(temperature)
    with devices.launching_on(logits):
        cpu._C.logits_grpo_loss_cuda(
            logits.data_ptr(), _layout(logits), address, layout,
            cpu.DTYPE_CODES[logits.dtype], token_ids.shape[0], logits.shape[-1], vocab,
            *(0 if x is None else x.data_ptr() for x in given), number, terms.options,
            logprobs.data_ptr(), entropy.data_ptr(), blocks,
            torch.cuda.current_stream().cuda_stream, **more,
        )  # fmt: skip
    return logprobs, entropy


def _layout(tensor: Tensor) -> list[int]:
    """Inner size, outer and inner stride of [outer, inner, V] in elements."""
    view = tensor[None, None] if tensor.dim() == 1 else tensor
    view = view[None] if view.dim() == 2 else view
    return [max(view.shape[1], 1), view.stride(0), view.stride(1)]
