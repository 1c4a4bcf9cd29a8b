"""Forward and backward over rows of logits, on whatever device they live.

CUDA tensors run Triton (temperature 0 of all rows the reference), CPU tensors the compiled
kernels; float64, and everything where neither exists, runs the reference. No autograd here.

A caller with a chunk of logits of its own, [rows, V] in float32 or bfloat16, gets their gradient
in place from `forward` and `backward(logits, out=logits, ...)`: two reads and one write of the
chunk, no allocation of its size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from r1v3.kernels import cpu, devices, reference, several_labels, vocab_parallel
from r1v3.kernels.arguments import check_temperature
from r1v3.kernels.row_labels import RowLabels, part_of


def forward(
    logits: Tensor, labels: RowLabels, *, with_entropy: bool = True, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [n], or [n, K], entropy [n] and what the backward needs [n, 3].

    Args:
        with_entropy: False where nobody looks at the entropy, which then may hold anything; the
            CPU kernels save a part of their arithmetic.
        keep: bool [n], rows somebody looks at; Triton does not read the others, whose entropy is
            then 0. Elsewhere `rows` does this.
    """
    if logits.device.type == "cpu" and not labels.runs_triton(logits):
        if labels.token_ids is not None:
            check_labels(labels.token_ids, labels.columns(logits.shape[-1])[2])
        if labels.rows is not None:
            check_row_index(labels.rows, logits.shape[:-1].numel())
        check_temperature(labels.temperature)
    if labels.several:
        targets = several_labels.target_logits(logits, labels)
        unlabeled = labels._replace(token_ids=None)
        _, entropy, saved = forward(logits, unlabeled, with_entropy=with_entropy, keep=keep)
        logprobs = several_labels.target_logprobs(targets, labels, logits.shape[-1], saved)
        return logprobs, entropy, saved
    if cpu.supports(logits) and not labels.group and not labels.runs_triton(logits):
        return _forward_on_cpu(logits, labels, with_entropy)
    return merge(statistics(logits, labels, keep), labels, logits.shape[-1])


def statistics(logits: Tensor, labels: RowLabels, keep: Tensor | None = None) -> Tensor:
    """Statistics [parts, n, 4] of the rows, as `reference.row_statistics` defines them."""
    width = logits.shape[-1]
    if labels.runs_triton(logits):
        from r1v3.kernels.triton import logits_statistics as triton

        return triton.row_statistics(
            triton.as_rows(logits), labels.token_ids, labels.rows, labels.temperature,
            *labels.columns_on_device(width), keep,
        )  # fmt: skip
    first, vocab, _ = labels.columns(width)
    ids = labels.local_ids(first)
    if not cpu.supports(logits):
        x = logits.reshape(logits.shape[:-1].numel(), width)[:, :vocab]
        x = x if labels.rows is None else x[labels.rows]
        return reference.row_statistics(x, ids, labels.temperature)[None]
    stats = logits.new_empty(1, _count(logits, labels), 4, dtype=torch.float32)
    for part, block, index in _blocks(logits, vocab, labels.rows):
        cpu.row_statistics(
            block, index, _part(ids, part), part_of(labels.temperature, part), stats[0, part]
        )
    return stats


def merge(stats: Tensor, labels: RowLabels, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [n], entropy [n], (m, log s, entropy) [n, 3] of parts and ranks."""
    temperature, ids = labels.temperature, labels.token_ids
    if labels.runs_triton(stats):
        from r1v3.kernels.triton import logits_statistics as triton

        if labels.group:
            merged = triton.merge_parts(stats, temperature)
            stats = vocab_parallel.gather_statistics(merged, labels.group)
        return triton.finalize(stats, ids, temperature, *labels.columns_on_device(width))
    stats = reference.join_statistics(stats, temperature)
    if labels.group:
        stats = vocab_parallel.gather_statistics(stats, labels.group)
    ignored = None if ids is None else ids == reference.IGNORED_TOKEN
    return reference.merge_statistics(stats if labels.group else stats[None], ignored, temperature)


def backward(
    logits: Tensor,
    out: Tensor,
    labels: RowLabels,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None = None,
) -> None:
    """Write the gradient of all rows of logits [..., V] to out, which may be the logits.

    Rows outside `rows` and columns outside the vocabulary get 0.

    Args:
        grad_logprobs: [n], or with K labels for each row `several_labels.summed_gradients`.
    """
    if labels.several:
        if grad_logprobs is not None:
            _backward_of_several(logits, out, labels, saved, grad_logprobs, grad_entropy)
            return
        labels = labels._replace(token_ids=None)
    if labels.token_ids is None:
        grad_logprobs = None  # without labels the log-probabilities are the constant 0
    upstream = [
        None if x is None else x.to(saved.dtype).contiguous() for x in (grad_logprobs, grad_entropy)
    ]
    width, rows, temperature = logits.shape[-1], labels.rows, labels.temperature
    if labels.runs_triton(logits):
        from r1v3.kernels.triton.logits_gradient import row_gradient
        from r1v3.kernels.triton.logits_statistics import as_rows

        row_gradient(as_rows(logits), as_rows(out), labels, saved, *upstream)
        return
    first, vocab, _ = labels.columns(width)
    ids = labels.local_ids(first)
    if labels.token_ids is not None and upstream[0] is not None:
        upstream[0] = torch.where(labels.token_ids == reference.IGNORED_TOKEN, 0.0, upstream[0])
    target = out.view(logits.shape[:-1].numel(), width)
    if cpu.supports(logits):
        saved = saved.contiguous()
        for part, block, index in _blocks(logits, vocab, rows):
            cpu.row_gradient(
                block, target[part if rows is None else slice(None), :vocab], index,
                _part(ids, part), part_of(temperature, part), saved[part],
                *(_part(x, part) for x in upstream), softcap=labels.softcap,
            )  # fmt: skip
        _zero_rest(target, rows, vocab)
        return
    x = logits.reshape(target.shape)[:, :vocab]
    x = x if rows is None else x[rows]
    grad = reference.row_gradient(x, ids, temperature, saved, *upstream, softcap=labels.softcap)
    _zero_rest(target, rows, vocab)
    target[:, :vocab][slice(None) if rows is None else rows] = grad


def _backward_of_several(
    logits: Tensor,
    out: Tensor,
    labels: RowLabels,
    saved: Tensor,
    summed: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """`backward` with a label that is nowhere, and the columns of the K labels put right."""
    gradients = several_labels.target_gradients(logits, labels, saved, summed, grad_entropy)
    total = summed[:, 0]
    nowhere = labels._replace(token_ids=torch.full_like(total, -1, dtype=torch.int64))
    backward(logits, out, nowhere, saved, total, grad_entropy)
    several_labels.write_gradients(out, labels, gradients)


def writable_in_place(logits: Tensor) -> bool:
    """Whether every element has its own memory and the kernels can address the rows there."""
    if any(
        stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)
    ):
        return False
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        return False
    return logits.dim() <= 3 if devices.runs_triton(logits) else _flattens(logits)


def check_labels(token_ids: Tensor, vocab: Tensor | int) -> None:
    """Raise ValueError for a label outside the vocabulary; on a GPU that would be a wait."""
    if token_ids.is_cuda or token_ids.numel() == 0:
        return
    size, ids = int(vocab), token_ids.reshape(-1).to(torch.int64).contiguous()
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


def scatter(values: Tensor, rows: Tensor, n: int) -> Tensor:
    """[len(rows), ...] to [n, ...], zero elsewhere."""
    return values.new_zeros(n, *values.shape[1:]).index_copy_(0, rows, values)


def _flattens(logits: Tensor) -> bool:
    try:
        logits.view(logits.shape[:-1].numel(), logits.shape[-1])
    except RuntimeError:
        return False
    return True


def _count(logits: Tensor, labels: RowLabels) -> int:
    return logits.shape[:-1].numel() if labels.rows is None else labels.rows.shape[0]


def _blocks(
    logits: Tensor, vocab: int, rows: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Numbers of the results, in order, and the 2-D view [*, vocab] and row index they are from.

    A copy is made only of a strided last dimension and, where there are rows, of leading
    dimensions that do not flatten.
    """
    logits = logits if logits.stride(-1) == 1 or logits.shape[-1] <= 1 else logits.contiguous()
    if rows is not None:
        flat = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])
        yield slice(0, rows.shape[0]), flat[:, :vocab], rows.contiguous()
        return
    done = 0
    for block in _views(logits):
        yield slice(done, done + block.shape[0]), block[:, :vocab], None
        done += block.shape[0]


def _views(logits: Tensor) -> Iterator[Tensor]:
    if _flattens(logits):
        yield logits.view(logits.shape[:-1].numel(), logits.shape[-1])
    else:
        for part in logits.unbind(0):
            yield from _views(part)


def _forward_on_cpu(
    logits: Tensor, labels: RowLabels, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n = _count(logits, labels)
    logprobs = logits.new_empty(n, dtype=torch.float32)
    entropy = logprobs.new_empty(n) if with_entropy else None
    saved, ids = logprobs.new_empty(n, 3), labels.local_ids(0)
    vocab = labels.columns(logits.shape[-1])[1]
    for part, block, index in _blocks(logits, vocab, labels.rows):
        cpu.logprobs_and_entropy(
            block, index, _part(ids, part), part_of(labels.temperature, part), logprobs[part],
            _part(entropy, part), saved[part],
        )  # fmt: skip
    return logprobs, logprobs.new_empty(0) if entropy is None else entropy, saved


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
