"""Forward and backward over rows of logits, on whatever device they live.

CUDA tensors run Triton (temperature 0 the reference), CPU tensors the compiled CPU kernels;
float64, and everything where neither exists, runs the reference. No autograd here.

A caller with a chunk of logits of its own, [rows, V] in float32 or bfloat16, gets their gradient
in place from `forward` and `backward(logits, out=logits, ...)`: two reads and one write of the
chunk, no allocation of its size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from r1v3.kernels import cpu, devices, reference, vocab_parallel


def forward(
    logits: Tensor,
    token_ids: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    vocab_size: int | None,
    group_name: str,
    shard: Tensor | None = None,
    with_entropy: bool = True,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [n], entropy [n], what the backward needs [n, 3], shard bounds.

    Args:
        logits: [..., V]; token_ids: [n] global ids of the selected rows, or None.
        rows: int64 [n] into the flattened leading dimensions, or None for all of them.
        shard: the bounds that an earlier call with this group returned, or None to ask for them.
        with_entropy: False where nobody looks at the entropy, which then may hold anything; the
            CPU kernels save a part of their arithmetic.
        keep: bool [n], rows somebody looks at; Triton does not read the others, whose entropy is
            then 0. Elsewhere `rows` does this.
    """
    width = logits.shape[-1]
    if shard is None and group_name:
        shard = vocab_parallel.shard_bounds(width, vocab_size, group_name, logits.device)
    elif shard is None:
        shard = torch.empty(0, dtype=torch.int64, device=logits.device)
    if devices.runs_triton(logits) and temperature > 0:
        return *_forward_triton(
            logits, token_ids, rows, temperature, vocab_size, shard, group_name, keep
        ), shard
    first, vocab, true_size = _columns(width, vocab_size, shard)
    ids = None if token_ids is None else token_ids.to(torch.int64).contiguous()
    if logits.device.type == "cpu":
        if ids is not None:
            check_labels(ids, true_size)
        if rows is not None:
            check_row_index(rows, logits.shape[:-1].numel())
    if cpu.supports(logits) and not group_name:
        return *_forward_on_cpu(logits, ids, rows, temperature, vocab, with_entropy), shard
    stats = _statistics(logits, None if ids is None else ids - first, rows, temperature, vocab)
    shards = vocab_parallel.gather_statistics(stats, group_name) if group_name else stats[None]
    ignored = None if ids is None else ids == reference.IGNORED_TOKEN
    return *reference.merge_statistics(shards, ignored, temperature), shard


def backward(
    logits: Tensor,
    out: Tensor,
    token_ids: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    vocab_size: int | None,
    shard: Tensor,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Write the gradient of all rows of logits [..., V] to out, which may be the logits.

    Rows outside `rows` and columns outside the vocabulary get 0.
    """
    width = logits.shape[-1]
    if token_ids is None:
        grad_logprobs = None  # without labels the log-probabilities are the constant 0
    if grad_logprobs is not None:
        grad_logprobs = grad_logprobs.to(saved.dtype).contiguous()
    if grad_entropy is not None:
        grad_entropy = grad_entropy.to(saved.dtype).contiguous()
    if devices.runs_triton(logits) and temperature > 0:
        from r1v3.kernels.triton.logits_gradient import row_gradient
        from r1v3.kernels.triton.logits_statistics import as_rows

        vocab = width if shard.numel() or vocab_size is None else vocab_size
        row_gradient(
            as_rows(logits), as_rows(out), token_ids, rows,
            temperature, vocab, shard if shard.numel() else None, saved, grad_logprobs,
            grad_entropy,
        )  # fmt: skip
        return
    first, vocab, _ = _columns(width, vocab_size, shard)
    local = None
    if token_ids is not None:
        local = token_ids.to(torch.int64)
        if first:
            local = local - first
        if grad_logprobs is not None:
            ignored = token_ids == reference.IGNORED_TOKEN
            grad_logprobs = torch.where(ignored, 0.0, grad_logprobs)
    _gradient(logits, out, local, rows, temperature, vocab, saved, grad_logprobs, grad_entropy)


def writable_in_place(logits: Tensor) -> bool:
    """Whether every element has its own memory and the kernels can address the rows there."""
    if any(
        stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)
    ):
        return False
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        return False
    return logits.dim() <= 3 if devices.runs_triton(logits) else _flattens(logits)


def _forward_triton(
    logits: Tensor,
    token_ids: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    vocab_size: int | None,
    shard: Tensor,
    group_name: str,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from r1v3.kernels.triton import logits_statistics as triton

    bounds = shard if group_name else None
    vocab = logits.shape[-1] if group_name or vocab_size is None else vocab_size
    stats = triton.row_statistics(
        triton.as_rows(logits), token_ids, rows, temperature, vocab, bounds, keep
    )
    if group_name:
        merged = triton.merge_parts(stats, temperature)
        stats = vocab_parallel.gather_statistics(merged, group_name)
    return triton.finalize(stats, token_ids, temperature, vocab, bounds)


def _columns(width: int, vocab_size: int | None, shard: Tensor) -> tuple[int, int, int]:
    """First token id here, number of columns that take part, and the true vocabulary size."""
    if shard.numel() == 0:
        vocab = width if vocab_size is None else vocab_size
        return 0, vocab, vocab
    first, true_size = shard.tolist()
    return first, min(width, max(true_size - first, 0)), true_size


def check_labels(token_ids: Tensor, vocab: Tensor | int) -> None:
    """Raise ValueError for a label outside the vocabulary; on a GPU that would be a wait."""
    if token_ids.is_cuda or token_ids.numel() == 0:
        return
    size, ids = int(vocab), token_ids.to(torch.int64).contiguous()
    if cpu.built() and cpu.first_outside(ids, size, reference.IGNORED_TOKEN) < 0:
        return
    bad = ids[((ids < 0) | (ids >= size)) & (ids != reference.IGNORED_TOKEN)]
    if bad.numel():
        raise ValueError(
            f"token_ids must be in [0, {size}) or {reference.IGNORED_TOKEN}, got {bad[:8].tolist()}"
        )


def check_row_index(rows: Tensor, n: int) -> None:
    """Raise ValueError unless the int64 rows are distinct and in [0, n); for CPU tensors."""
    if rows.numel() == 0:
        return
    if int(rows.min()) < 0 or int(rows.max()) >= n:
        raise ValueError(f"rows must be in [0, {n}), got {int(rows.min())} to {int(rows.max())}")
    if rows.unique().numel() != rows.numel():
        raise ValueError(f"rows must not repeat, got {rows[:16].tolist()}")


def _flattens(logits: Tensor) -> bool:
    try:
        logits.view(logits.shape[:-1].numel(), logits.shape[-1])
    except RuntimeError:
        return False
    return True


def _blocks(logits: Tensor, vocab: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows as 2-D views [*, vocab] with their numbers, in order.

    A copy is made only of a strided last dimension.
    """
    logits = _last_contiguous(logits)
    done = 0
    for block in _views(logits):
        yield slice(done, done + block.shape[0]), block[:, :vocab]
        done += block.shape[0]


def _views(logits: Tensor) -> Iterator[Tensor]:
    if _flattens(logits):
        yield logits.view(logits.shape[:-1].numel(), logits.shape[-1])
    else:
        for part in logits.unbind(0):
            yield from _views(part)


def _selectable(logits: Tensor, vocab: int) -> Tensor:
    """[n, vocab] in which row numbers count from the first leading dimension on."""
    n = logits.shape[:-1].numel()
    return _last_contiguous(logits).reshape(n, logits.shape[-1])[:, :vocab]


def _forward_on_cpu(
    logits: Tensor,
    token_ids: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    vocab: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n = logits.shape[:-1].numel() if rows is None else rows.shape[0]
    logprobs = logits.new_empty(n, dtype=torch.float32)
    entropy = logprobs.new_empty(n if with_entropy else 0)
    saved = logprobs.new_empty(n, 3)
    if rows is not None:
        cpu.logprobs_and_entropy(
            _selectable(logits, vocab), rows.contiguous(), token_ids, temperature, logprobs,
            entropy if with_entropy else None, saved,
        )  # fmt: skip
        return logprobs, entropy, saved
    for part, block in _blocks(logits, vocab):
        cpu.logprobs_and_entropy(
            block, None, _part(token_ids, part), temperature, logprobs[part],
            entropy[part] if with_entropy else None, saved[part],
        )  # fmt: skip
    return logprobs, entropy, saved


def _statistics(
    logits: Tensor,
    token_ids: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    vocab: int,
) -> Tensor:
    if not cpu.supports(logits):
        x = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])[:, :vocab]
        return reference.row_statistics(x if rows is None else x[rows], token_ids, temperature)
    n = logits.shape[:-1].numel() if rows is None else rows.shape[0]
    stats = logits.new_empty(n, 4, dtype=torch.float32)
    if rows is not None:
        x = _selectable(logits, vocab)
        cpu.row_statistics(x, rows.contiguous(), token_ids, temperature, stats)
        return stats
    for part, block in _blocks(logits, vocab):
        cpu.row_statistics(block, None, _part(token_ids, part), temperature, stats[part])
    return stats


def _gradient(
    logits: Tensor,
    out: Tensor,
    token_ids: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    vocab: int,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    n, width = logits.shape[:-1].numel(), logits.shape[-1]
    target = out.view(n, width)
    if not cpu.supports(logits):
        x = logits.reshape(n, width)[:, :vocab]
        x = x if rows is None else x[rows]
        grad = reference.row_gradient(x, token_ids, temperature, saved, grad_logprobs, grad_entropy)
        _zero_rest(target, rows, vocab)
        target[:, :vocab][slice(None) if rows is None else rows] = grad
        return
    ids = None if token_ids is None else token_ids.contiguous()
    saved = saved.contiguous()
    if rows is not None:
        cpu.row_gradient(
            _selectable(logits, vocab), target[:, :vocab], rows.contiguous(), ids, temperature,
            saved, grad_logprobs, grad_entropy,
        )  # fmt: skip
    else:
        for part, block in _blocks(logits, vocab):
            cpu.row_gradient(
                block, target[part, :vocab], None, _part(ids, part), temperature,
                saved[part], _part(grad_logprobs, part), _part(grad_entropy, part),
            )  # fmt: skip
    _zero_rest(target, rows, vocab)


def _part(vector: Tensor | None, part: slice) -> Tensor | None:
    return None if vector is None else vector[part]


def _zero_rest(target: Tensor, rows: Tensor | None, vocab: int) -> None:
    if vocab < target.shape[1]:
        target[:, vocab:] = 0
    if rows is not None:
        unselected = torch.ones(target.shape[0], dtype=torch.bool, device=target.device)
        unselected[rows] = False
        if target.is_cuda:  # where counting them would be a synchronization
            target.masked_fill_(unselected[:, None], 0)
        else:  # filling under a mask would read and write every row
            target.index_fill_(0, unselected.nonzero().squeeze(-1), 0)


def _last_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] <= 1 else logits.contiguous()
