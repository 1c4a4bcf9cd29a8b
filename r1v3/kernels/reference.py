"""The mathematical specification of every kernel, in plain PyTorch.

Arithmetic is float32, or float64 for float64 input; everything is differentiable by autograd and
runs on any device. `T > 0` is the temperature, `x` a row of logits:

    y = x / T        p = softmax(y)        logp_t = log p_t        H = -sum_v p_v log p_v

Both results come from the shifted form, with M = max x, d = (x - M) / T, s = sum exp d and
w = sum d exp d:  logp_t = d_t - log s,  H = log s - w / s.  Nothing cancels, whatever the offset.

Equation numbers are those of the Skywork-R1V3 report (arXiv:2507.06167).
"""

import math

import torch
from torch import Tensor

from r1v3.kernels.arguments import METRICS

IGNORED_TOKEN = -100
# Log-ratios are clamped to +- this before exp; where the clamp acts there is no gradient.
LOG_RATIO_LIMIT = 20.0


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def logprobs_and_entropy(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of `token_ids` and entropy of softmax(logits / temperature), in nats.

    Shapes: logits [..., V], token_ids [...] or [..., K], a temperature for each row [...], results
    [...] (or [len(rows)]), with K labels for each row log-probabilities [..., K].
    """
    leading, shape = logits.shape[:-1], logits.shape[:-1] if rows is None else rows.shape
    labels = token_ids.shape[len(leading) :]
    x = _selected(logits, vocab_size, rows)
    ids = token_ids.reshape(leading.numel(), labels.numel())
    ids = ids if rows is None else ids[rows]
    ignored = ids == IGNORED_TOKEN
    if bool(((ids < 0) | (ids >= x.shape[-1])).logical_and(~ignored).any()):
        few = ids.flatten()[:8].tolist()
        raise ValueError(f"token_ids must be in [0, {x.shape[-1]}) or -100, got {few}")
    d, log_s, entropy, dead = _softmax_parts(x, _of_rows(temperature, rows, x.dtype))
    if x.shape[-1] == 0:
        target = d.new_zeros(ids.shape)
    else:
        target = d.gather(-1, ids.clamp(min=0))
    logprobs = torch.where(dead[:, None], -torch.inf, target - log_s[:, None])
    logprobs = torch.where(ignored, 0.0, logprobs)
    return logprobs.view((*shape, *labels)), entropy.view(shape)


def entropy_from_logits(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Entropy of softmax(logits / temperature) in nats; logits [..., V] -> [...]."""
    shape = logits.shape[:-1] if rows is None else rows.shape
    x = _selected(logits, vocab_size, rows)
    return _softmax_parts(x, _of_rows(temperature, rows, x.dtype))[2].view(shape)


def selective_log_softmax(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """log softmax(logits / temperature)[token_ids]; logits [..., V] -> [...]."""
    return logprobs_and_entropy(
        logits, token_ids, temperature=temperature, vocab_size=vocab_size, rows=rows
    )[0]


def _of_rows(
    temperature: float | Tensor, rows: Tensor | None, dtype: torch.dtype
) -> float | Tensor:
    """The temperature of the computed rows: a number, or [n]."""
    if not isinstance(temperature, Tensor):
        return temperature
    flat = temperature.reshape(-1).to(dtype)
    return flat if rows is None else flat[rows]


def _selected(logits: Tensor, vocab_size: int | None, rows: Tensor | None) -> Tensor:
    x = logits.reshape(-1, logits.shape[-1])
    if rows is not None:
        x = x[rows]
    return x[:, :vocab_size].to(accumulation_dtype(logits))


def _softmax_parts(x: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d, log s, entropy, row is all -inf) of the rows x [n, V], d shifted by the row maximum.

    temperature is a number or [n].
    """
    if x.shape[-1] == 0:
        zero = x.new_zeros(x.shape[0])
        return x, zero, zero, torch.ones_like(zero, dtype=torch.bool)
    maximum = x.detach().amax(-1, keepdim=True)
    dead = maximum == -torch.inf
    shifted = x - torch.where(dead, 0.0, maximum)
    if isinstance(temperature, Tensor):
        degrees = temperature[:, None]
        warm = shifted / torch.where(degrees == 0, 1.0, degrees)
        d = torch.where(degrees == 0, _coldest(shifted), warm)
    else:
        d = _coldest(shifted) if temperature == 0 else shifted / temperature
    e = d.exp()
    s = e.sum(-1)
    w = (e * torch.where(d == -torch.inf, 0.0, d)).sum(-1)
    dead = dead.squeeze(-1)
    s = torch.where(dead, 1.0, s)
    log_s = s.log()
    return d, log_s, torch.where(dead, 0.0, log_s - w / s), dead


def _coldest(shifted: Tensor) -> Tensor:
    """The limit T -> 0 of x / T less its maximum: uniform over the maxima, and gradients are 0."""
    d = torch.where(shifted == 0, 0.0, -torch.inf)
    return torch.where(shifted.isnan(), torch.nan, d) + 0.0 * torch.where(
        shifted.isfinite(), shifted, 0.0
    )


def over(difference: Tensor, temperature: float | Tensor) -> Tensor:
    """difference / temperature for differences <= 0, [n] or [n, V]; at 0 the limit, 0 or -inf."""
    if not isinstance(temperature, Tensor):
        if temperature == 0:
            return torch.where(difference < 0, -torch.inf, difference)
        return difference / temperature
    degrees = temperature.to(difference.dtype)
    degrees = degrees if difference.dim() == 1 else degrees[:, None]
    limit = torch.where(difference < 0, -torch.inf, difference)
    return torch.where(degrees == 0, limit, difference / degrees)


def row_statistics(x: Tensor, token_ids: Tensor | None, temperature: float | Tensor) -> Tensor:
    """Softmax statistics of a shard of the vocabulary: [n, 4] = (m, s, w, t) per row.

    m = max x and t = x[token], or 0 when the id is outside this shard, are logits: divided by a
    small temperature they would lose digits. With d = (x - m) / T, s = sum exp(d) and
    w = sum exp(d) d. An all -inf row gives m = -inf and s = w = 0; NaN or +inf gives s = NaN.
    At temperature 0, s counts the maxima.

    Args:
        x: [n, V] logits without padded columns.
        token_ids: [n] ids relative to this shard, or None.
        temperature: a number, or [n] with one for each row.
    """
    x = x.to(accumulation_dtype(x))
    n, vocab = x.shape
    if vocab == 0:
        stats = x.new_zeros(n, 4)
        stats[:, 0] = -torch.inf
        return stats
    maximum = x.amax(-1)
    dead = maximum == -torch.inf
    shifted = x - torch.where(dead, 0.0, maximum)[:, None]
    d = over(shifted, temperature)
    e = d.exp()
    w = (e * torch.where(d == -torch.inf, 0.0, d)).sum(-1)
    target = torch.zeros_like(maximum)
    if token_ids is not None:
        inside = (token_ids >= 0) & (token_ids < vocab)
        here = x.gather(-1, torch.where(inside, token_ids, 0)[:, None]).squeeze(-1)
        target = torch.where(inside, here, 0.0)
    return torch.stack([maximum, e.sum(-1), w, target], dim=-1)


def join_statistics(stats: Tensor, temperature: float | Tensor) -> Tensor:
    """[shards, n, 4] from `row_statistics` -> [n, 4] of their union, added in shard order."""
    m_all, s_all, w_all, t_all = stats.unbind(-1)
    m = m_all.amax(0)
    s, w, t = torch.zeros_like(m), torch.zeros_like(m), torch.zeros_like(m)
    for m_r, s_r, w_r, t_r in zip(m_all, s_all, w_all, t_all, strict=True):
        gap = over(torch.where(m_r == -torch.inf, 0.0, m_r - m), temperature)
        scale = gap.exp()
        gap = torch.where(scale == 0, 0.0, gap)
        s = s + scale * s_r
        w = w + scale * (w_r + gap * s_r)
        t = t + t_r
    return torch.stack([m, s, w, t], dim=-1)


def merge_statistics(
    stats: Tensor, ignored: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the shards' statistics, in shard order.

    Args:
        stats: [shards, n, 4] from `row_statistics`.
        ignored: [n] bool, rows whose log-probability is 0 by definition, or None.
    Returns:
        logprobs [n], entropy [n], and [n, 3] = (m, log s, entropy) for the backward.
    """
    m, s, w, t = join_statistics(stats, temperature).unbind(-1)
    dead = s == 0
    log_s = torch.where(dead, 1.0, s).log()
    entropy = torch.where(dead, 0.0, log_s - w / torch.where(dead, 1.0, s))
    logprobs = torch.where(dead, -torch.inf, over(t - m, temperature) - log_s)
    if ignored is not None:
        logprobs = torch.where(ignored, 0.0, logprobs)
    return logprobs, entropy, torch.stack([m, log_s, entropy], dim=-1)


def row_gradient(
    x: Tensor,
    token_ids: Tensor | None,
    temperature: float | Tensor,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    softcap: float,
) -> Tensor:
    """dx = [g_logp (1[t] - p) - g_H p (log p + H)] / T for the rows x [n, V], in x's dtype.

    With a softcap c, x is c tanh(z / c), and dz = dx (1 - (x / c)^2) is returned.

    Args:
        token_ids: [n] ids relative to this shard (an id outside it adds no 1[t]), or None.
        temperature: a number, or [n] with one for each row.
        saved: [n, 3] from `merge_statistics`.
        grad_logprobs: [n] or None; must already be 0 where the label is ignored.
        grad_entropy: [n] or None.
    """
    degrees = temperature
    if isinstance(degrees, Tensor):
        degrees = degrees.to(saved.dtype)[:, None]
    elif degrees == 0:
        return torch.zeros_like(x)
    if (grad_logprobs is None and grad_entropy is None) or x.shape[1] == 0:
        return torch.zeros_like(x)
    m, log_s, entropy = (column[:, None] for column in saved.unbind(-1))
    dead = m == -torch.inf
    log_p = (x.to(saved.dtype) - torch.where(dead, 0.0, m)) / degrees - log_s
    p = log_p.exp()
    grad = torch.zeros_like(p)
    needed = torch.zeros_like(dead)
    if grad_logprobs is not None:
        g = grad_logprobs.to(p.dtype)[:, None]
        needed |= g != 0
        grad -= g * p
        if token_ids is not None:
            inside = (token_ids >= 0) & (token_ids < x.shape[1])
            index = torch.where(inside, token_ids, 0)[:, None]
            grad.scatter_add_(1, index, torch.where(inside[:, None], g, 0.0))
    if grad_entropy is not None:
        g = grad_entropy.to(p.dtype)[:, None]
        needed |= g != 0
        grad -= g * torch.where(p == 0, 0.0, p * (log_p + entropy))
    if isinstance(degrees, Tensor):
        needed &= degrees != 0
    if softcap:
        grad = grad * (1 - (x.to(saved.dtype) / softcap).square())
    return torch.where(needed & ~dead, grad / degrees, 0.0).to(x.dtype)


def linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    loss_mask: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`logprobs_and_entropy(hidden @ weight.T + bias, token_ids)`, logits in float32.

    The logits are multiplied by logit_scale, and then softcap * tanh(logits / softcap) if given.
    Shapes: hidden [..., H], weight [V, H], bias [V], token_ids [...] or [..., K], loss_mask [...].
    Rows with loss_mask 0 or no label but -100 give 0 for both results and touch no gradient.
    """
    dtype = accumulation_dtype(hidden)
    keep = token_ids != IGNORED_TOKEN
    if token_ids.dim() == hidden.dim():
        keep = keep.any(-1) if token_ids.shape[-1] else keep.new_ones(hidden.shape[:-1])
    if loss_mask is not None:
        keep = keep & (loss_mask != 0)
    logits = hidden[keep].to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature[keep]
    logprobs, entropy = logprobs_and_entropy(
        logits, token_ids[keep], temperature=temperature, vocab_size=vocab_size
    )
    of_labels = torch.zeros(token_ids.shape, dtype=dtype, device=hidden.device)
    of_rows = torch.zeros(keep.shape, dtype=dtype, device=hidden.device)
    return of_labels.index_put((keep,), logprobs), of_rows.index_put((keep,), entropy)


def ban_tokens_(
    logits: Tensor, token_ids: Tensor, *, enabled: Tensor | None = None, vocab_start: int = 0
) -> Tensor:
    """Set logits[..., token_ids - vocab_start] to -inf in place where `enabled` [...] is not 0."""
    local = token_ids.reshape(-1).to(torch.int64) - vocab_start
    local = local[(local >= 0) & (local < logits.shape[-1])]
    banned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    banned[local] = True
    if enabled is not None:
        banned = banned & (enabled != 0)[..., None]
    return logits.masked_fill_(banned, -torch.inf)


# The weights of tokens are integers of two parts; the upper one counts 2^36 of the lower.
SAMPLE_BITS = 36
# Largest logits of a row that are sorted before all of them are.
NUCLEUS = 1024
LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453


def sample_scale(temperature: Tensor) -> Tensor:
    """Factor [n], float64, that makes logits exponents of 2; temperature 0 has that of 1."""
    return (LOG2_E / torch.where(temperature == 0, 1.0, temperature)).clamp(max=1e269)


def ban_mask(columns: Tensor, width: int) -> Tensor:
    """bool [width], True at the int64 columns that are there. Nothing waits for a device."""
    there = torch.where((columns >= 0) & (columns < width), columns, width)
    mask = torch.zeros(width + 1, dtype=torch.bool, device=columns.device)
    return mask.index_fill_(0, there, True)[:width]


def sampled_logits(
    x: Tensor,
    first: int,
    banned: Tensor | None,
    enabled: Tensor | None,
    floor: Tensor | None = None,
) -> Tensor:
    """Rows x [n, V] with -inf where a token is banned or its logit is below the floor [n]."""
    if banned is not None:
        mask = ban_mask(banned - first, x.shape[1])
        x = x.masked_fill(mask if enabled is None else mask & enabled[:, None], -torch.inf)
    return x if floor is None else torch.where(x < floor[:, None], -torch.inf, x)


def truncation_floor(
    x: Tensor, temperature: Tensor, top_k: int | None, top_p: float | None, min_p: float | None
) -> Tensor:
    """The smallest logit [n] (float64) that is drawn, from the logits x [n, V] after the ban.

    min_p, top_k and top_p act in this order, each on what the one before left.
    """
    scale, top = sample_scale(temperature)[:, None], x.amax(-1).double()
    floor = torch.full_like(top, -torch.inf)
    if min_p is not None:
        floor = torch.maximum(floor, top + math.log2(min_p) / scale[:, 0])
    if top_k is not None:
        values = x.topk(min(top_k, x.shape[1])).values
        floor = torch.maximum(floor, values[:, -1].double())
    if top_p is not None and top_k is not None:
        ties = (x >= floor[:, None]).sum(-1) - (values >= floor[:, None]).sum(-1)
        weights = _kept_weights(values, scale, top, floor)
        reach = top_p * (weights.cumsum(-1)[:, -1] + ties * weights[:, -1])
        floor = torch.maximum(floor, _nucleus(values, scale, top, floor, reach)[0])
    elif top_p is not None:
        # Sums in order, unlike those of `sum`, whatever the batch.
        reach = top_p * _kept_weights(x, scale, top, floor).cumsum(-1)[:, -1]
        few = x.shape[1] if x.is_cuda else min(NUCLEUS, x.shape[1])
        values = x.topk(few).values if few < x.shape[1] else x.sort(descending=True).values
        cut, reached = _nucleus(values, scale, top, floor, reach)
        if few < x.shape[1] and not bool(reached.all()):
            rest = (~reached).nonzero().squeeze(1)
            whole = x[rest].sort(descending=True).values
            cut[rest] = _nucleus(whole, scale[rest], top[rest], floor[rest], reach[rest])[0]
        floor = torch.maximum(floor, cut)
    return torch.where(floor.isnan() | (temperature == 0), -torch.inf, floor)


def _kept_weights(x: Tensor, scale: Tensor, top: Tensor, floor: Tensor) -> Tensor:
    """Float64 weights, of which the largest of a row is 1, and those below the floor 0."""
    weights = ((x.double() - top[:, None]) * scale).exp2()
    return torch.where(x < floor[:, None], 0.0, weights)


def _nucleus(
    values: Tensor, scale: Tensor, top: Tensor, floor: Tensor, reach: Tensor
) -> tuple[Tensor, Tensor]:
    """The first of the descending values [n, k] at which their weights reach `reach` [n].

    And whether they do; where they do not, the last value.
    """
    weights = _kept_weights(values, scale, top, floor)
    sums = weights.cumsum(-1)
    last = (sums - weights < reach[:, None]).sum(-1) - 1
    cut = values.gather(1, last.clamp(min=0)[:, None]).squeeze(1).double()
    return cut, sums[:, -1] >= reach


def sample_weights(x: Tensor, scale: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights 2^z of x [n, V], z = x scale, in units of 2^(reference - 72): upper and lower part.

    Both are integers, whose sums are exact in float64 for up to 370,000 tokens: no order and no
    partition of the vocabulary changes them. References are multiples of 36 (`_reference_of`).
    Raising one by 36 turns upper parts into lower ones, so a sum under a lower reference becomes
    that under a higher one without its terms. The third result is the weight times
    z - reference, in units of the upper part.
    """
    z = (x.double() * scale[:, None]).clamp(min=-1e300)
    n = z.round()
    k = (n - reference[:, None]).clamp(min=-200)
    weight = (z - n).exp2() * (k + SAMPLE_BITS).exp2()
    upper = weight.round()
    lower = ((weight - upper) * 2.0**SAMPLE_BITS).round()
    return upper, lower, weight * (k + (z - n))


def _reference_of(top: Tensor, scale: Tensor) -> Tensor:
    """The least multiple of 36 that is 2 above top * scale, or that itself beyond 2^50."""
    n = (top.double() * scale).clamp(min=-1e300).round()
    reference = torch.where(n.abs() < 2.0**50, ((n + 2) / SAMPLE_BITS).ceil() * SAMPLE_BITS, n)
    return torch.where(top == -torch.inf, -torch.inf, reference)


def sample_statistics(x: Tensor, scale: Tensor, first: int) -> Tensor:
    """Statistics of a shard x [n, V] of the vocabulary for the other shards, [n, 7] float64.

    (reference, sum of upper parts, of lower parts, of weight times z - reference, largest logit,
    its id, first id of a NaN or +inf); -inf for the reference of a row of -inf, NaN for its sums
    where there is a NaN or +inf, -1 for an id that is not there.
    """
    bad = ~(x < torch.inf)
    clean = torch.where(bad, -torch.inf, x)
    top = clean.amax(-1) if x.shape[1] else x.new_full(x.shape[:1], -torch.inf)
    reference = _reference_of(top, scale)
    sums = sample_weights(clean, scale, torch.where(top == -torch.inf, 0.0, reference))
    upper, lower, weighted = (part.sum(-1) for part in sums)
    broken = bad.any(-1) | scale.isnan()
    reference = torch.where(broken, -torch.inf, reference)
    upper = torch.where(broken, torch.nan, upper)
    top_id = torch.where(top == -torch.inf, -1, _first(clean == top[:, None], first))
    stats = [reference, upper, lower, weighted, top.double(), top_id, _first(bad, first)]
    return torch.stack([value.double() for value in stats], -1)


def sample_choose(
    x: Tensor,
    scale: Tensor,
    greedy: Tensor,
    first: int,
    rows: Tensor,
    rank: int,
    uniforms: Tensor,
    forced: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities and entropy [n] from the rows [ranks, n, 7] of all shards.

    A token is the first at which the sum of weights passes uniform * total. One of another shard
    is -1, with the log-probability 0.

    Args:
        x: [n, V] this shard's logits, -inf where nothing is drawn; `rank` is its place in rows.
        greedy: bool [n], where the token is the first of the largest.
        forced: int64 [n], -1 where the token is not given.
    """
    unit = 2.0**SAMPLE_BITS
    reference = rows[..., 0].amax(0)
    upper, lower, weighted = _aligned(rows, reference)
    before = (upper[:rank].sum(0), lower[:rank].sum(0))
    total = upper.sum(0) * unit + lower.sum(0)
    broken, dead = rows[..., 1].isnan().any(0), total == 0
    limit = (uniforms * total).clamp(min=0)
    limit = torch.where(limit < total * (1 - 2.0**-53), limit, total * (1 - 2.0**-53))
    here = sample_weights(x, scale, reference)
    sums = [b[:, None] + part.cumsum(-1) for b, part in zip(before, here[:2], strict=True)]
    passed = sums[0] * unit + sums[1] > limit[:, None]
    tokens = torch.where(before[0] * unit + before[1] > limit, -1, _first(passed, first))
    top, bad = rows[..., 4], rows[..., 6]
    largest = _first_of(rows[..., 5], top == top.amax(0))
    tokens = torch.where(greedy, largest, tokens)
    tokens = torch.where(broken | dead, _first_of(bad, bad >= 0).clamp(min=0), tokens)
    tokens = tokens if forced is None else torch.where(forced >= 0, forced, tokens)
    column = tokens - first
    mine = (column >= 0) & (column < x.shape[1])
    log2_total = torch.where(dead, 1.0, total).log2() - 2 * SAMPLE_BITS
    entropy = LN_2 * (log2_total - weighted.sum(0) * unit / torch.where(dead, 1.0, total))
    entropy = torch.where(dead, 0.0, entropy.clamp(min=0))
    logprobs = torch.zeros_like(entropy)
    if x.shape[1]:
        logit = x.gather(1, torch.where(mine, column, 0)[:, None]).squeeze(1).double()
        logprobs = (LN_2 * (logit * scale - reference - log2_total)).clamp(max=0)
        logprobs = torch.where(dead | (logit == -torch.inf), -torch.inf, logprobs)
        logprobs = torch.where(mine, torch.where(broken, torch.nan, logprobs), 0.0)
    return torch.where(mine, tokens, -1), logprobs, torch.where(broken, torch.nan, entropy)


def _aligned(rows: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [ranks, n] of upper parts, lower parts and weight times z - reference, of one reference.

    The reference is the highest of the ranks'.
    """
    there = rows[..., 0] > -torch.inf
    distance = torch.where(there, reference - rows[..., 0], 0.0)
    same, below = there & (distance == 0), there & (distance == SAMPLE_BITS)
    upper = torch.where(same, rows[..., 1], 0.0)
    lower = torch.where(same, rows[..., 2], torch.where(below, rows[..., 1], 0.0))
    weight = rows[..., 1] + rows[..., 2] / 2.0**SAMPLE_BITS
    weighted = (-distance).exp2() * (rows[..., 3] - distance * weight)
    return upper, lower, torch.where(there & (distance < 1000), weighted, 0.0)


def _first(mask: Tensor, offset: int) -> Tensor:
    """Index of the first True of each row of mask [n, V], plus offset; -1 for none."""
    if mask.shape[1] == 0:
        return torch.full(mask.shape[:1], -1, device=mask.device)
    return torch.where(mask.any(-1), mask.to(torch.uint8).argmax(-1) + offset, -1)


def _first_of(ids: Tensor, mask: Tensor) -> Tensor:
    """The id [n] (of [ranks, n]) of the first rank where the mask is True, -1 for none."""
    return torch.where(mask, ids, torch.inf).amin(0).nan_to_num(posinf=-1).to(torch.int64)


def group_advantages(
    rewards: Tensor,
    order: Tensor,
    offsets: Tensor,
    *,
    baseline: str = "mean",
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: str = "zero",
) -> Tensor:
    """Group-relative advantages (eq. 6): (r - mean) / (std + eps) within each group.

    Rewards are shifted by their group's first member before the mean is taken, so a constant
    group gives exactly 0 and a large common offset costs no digits.

    Args:
        rewards: [N] float.
        order: [N] int64, sample indices sorted by group.
        offsets: [G + 1] int64, where each group starts in `order`; empty groups are allowed.
    Returns:
        [N] float32 (float64 for float64 rewards), without gradient.
    """
    dtype = accumulation_dtype(rewards)
    r = rewards.detach().to(dtype)
    out = torch.empty_like(r)
    batch_std = standard_deviation(r, ddof) if scale == "batch" and r.numel() else r.new_zeros(())
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        members = order[start:end]
        n = end - start
        if n == 0:
            continue
        group = r[members]
        if n == 1 and (baseline != "none" or scale == "group"):
            out[members] = group if singleton == "raw" else _zero_like(group)
            continue
        shifted = group - group[0]
        centered = shifted - shifted.mean()
        if baseline == "none":
            centered = group
        elif baseline == "leave_one_out":
            centered = centered * (n / (n - 1))
        if scale != "none":
            std = standard_deviation(group, ddof) if scale == "group" else batch_std
            # std is NaN, not 0, when a reward is: NaN must not turn into a plausible 0.
            centered = torch.where(std == 0, _zero_like(centered), centered / (std + eps))
        out[members] = centered
    return out


def standard_deviation(r: Tensor, ddof: int) -> Tensor:
    """0-d standard deviation of r [N], N >= 1, exactly 0 if all are equal."""
    shifted = r - r[0]
    centered = shifted - shifted.mean()
    return (centered.square().sum() / max(r.numel() - ddof, 1)).sqrt()


def _zero_like(r: Tensor) -> Tensor:
    """0, or NaN where r is not finite."""
    return r * 0.0


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    offsets: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_clip: str = "ppo",
    kl_coef: float = 0.0,
    kl: str = "k3",
    unbiased_kl: bool = False,
    aggregation: str = "sequence-mean",
    normalizer: Tensor | float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped policy loss (eq. 4, 5 and 7) over flat tokens, differentiable in `logprobs`.

    With ratio_clip "cispo" the policy term is that of MiniMax-M1 (arXiv:2506.13585), with
    unbiased_kl the KL term that of DeepSeek-V3.2 (arXiv:2512.02556).

    Args:
        logprobs, old_logprobs, loss_mask: [N]; old_logprobs None means on-policy.
        offsets: [S + 1] int64 with offsets[S] <= N, where each sequence starts.
        advantages, weights: [N], or [S] (a value per sequence).
        ref_logprobs: [N] or None.
    Returns:
        the loss (0-d, with aggregation "none" [N]; differentiable), its gradient [N] in closed
        form (of each token's own loss), the metrics [len(METRICS)].
    """
    dtype = accumulation_dtype(logprobs)
    tokens, sequences = logprobs.shape[0], offsets.shape[0] - 1
    position = torch.arange(tokens, device=logprobs.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
    valid = (loss_mask != 0) & (sequence < sequences) & (position >= offsets[0])
    row_index = valid.nonzero().squeeze(-1)
    sequence = sequence[row_index]

    def per_token(values: Tensor) -> Tensor:
        index = row_index if values.shape[0] == tokens else sequence
        return values.detach()[index].to(dtype)

    new, a = logprobs[row_index].to(dtype), per_token(advantages)
    raw = new - new.detach() if old_logprobs is None else new - per_token(old_logprobs)
    log_ratio = raw.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    if ratio_clip == "cispo":
        policy, grad, low, high, dual = _cispo(new, ratio, a, clip_low, clip_high)
    else:
        policy, grad, low, high, dual = _surrogate(raw, ratio, a, clip_low, clip_high, dual_clip)
    finite = raw.isfinite() & a.isfinite()
    if weights is not None:
        w = per_token(weights)
        policy, grad = policy * w, grad * w
        finite = finite & w.isfinite()
    divergence = torch.zeros_like(policy)
    if ref_logprobs is not None:
        gap = per_token(ref_logprobs) - new
        finite = finite & gap.isfinite()
        divergence, grad_kl = _penalty(gap, raw, ratio, kl, unbiased_kl)
        # Not 0 * NaN: without a coefficient a broken reference only shows in the metrics.
        if kl_coef != 0:
            policy, grad = policy + kl_coef * divergence, grad + kl_coef * grad_kl
    scale = _loss_scale(sequence, sequences, aggregation, normalizer, dtype)
    scaled, zeros = policy * scale, torch.zeros_like(logprobs, dtype=dtype)
    loss = zeros.index_copy(0, row_index, scaled) if aggregation == "none" else scaled.sum()
    with torch.no_grad():
        gradient = zeros.index_copy(0, row_index, grad * scale)
        metrics = _metrics(low, high, dual, log_ratio, divergence, ratio, finite)
    return loss, gradient, metrics


def _surrogate(
    raw: Tensor,
    ratio: Tensor,
    a: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, ...]:
    """Per-token loss, its derivative by the log-probability, and where which of the clips acts."""
    clipped = ratio.detach().clamp(1 - clip_low, 1 + clip_high)
    constant = ratio * a > clipped * a
    policy = -torch.where(constant, clipped * a, ratio * a)
    low, high = (a < 0) & (ratio < 1 - clip_low), (a > 0) & (ratio > 1 + clip_high)
    dual = torch.zeros_like(constant)
    if dual_clip is not None:
        dual = (a < 0) & (policy > -dual_clip * a)
        policy = torch.where(dual, -dual_clip * a, policy)
    grad = torch.where(constant | dual | _clamped(raw), 0.0, -ratio * a)
    return policy, grad, low, high, dual


def _cispo(
    logprobs: Tensor, ratio: Tensor, a: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, ...]:
    """Per-token loss, its derivative by the log-probability, and where which of the clips acts."""
    slope = -ratio.detach().clamp(1 - clip_low, 1 + clip_high) * a
    low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
    return slope * logprobs, slope, low, high, torch.zeros_like(low)


def _clamped(log_ratio: Tensor) -> Tensor:
    """Where the clamp takes the gradient away; NaN is not clamped and stays visible."""
    return log_ratio.abs() > LOG_RATIO_LIMIT


def _penalty(
    gap: Tensor, raw: Tensor, ratio: Tensor, kl: str, unbiased: bool
) -> tuple[Tensor, Tensor]:
    """Per-token estimate of the KL and its derivative by the log-probability."""
    divergence, grad = _kl(gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), kl)
    grad = torch.where(_clamped(gap), 0.0, grad)
    if unbiased:
        grad = ratio * (grad + torch.where(_clamped(raw), 0.0, divergence))
        divergence = ratio * divergence
    return divergence, grad


def _kl(gap: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Per-token estimator of KL(policy || reference) and its derivative by the log-probability.

    gap = ref_logprob - logprob; k1, k2, k3 of Schulman, "Approximating KL divergence" (2020).
    """
    if kind == "k1":
        return -gap, torch.ones_like(gap)
    if kind == "k2":
        return 0.5 * gap.square(), -gap
    return gap.expm1() - gap, -gap.expm1()


def _loss_scale(
    sequence: Tensor,
    sequences: int,
    aggregation: str,
    normalizer: Tensor | float | None,
    dtype: torch.dtype,
) -> Tensor:
    """The factor of each valid token's loss in the total, or of its own."""
    if aggregation == "none":
        return torch.ones_like(sequence, dtype=dtype)
    counts = torch.zeros(sequences, dtype=dtype, device=sequence.device)
    counts = counts.index_add(0, sequence, torch.ones_like(sequence, dtype=dtype))
    if normalizer is None:
        tokens = aggregation == "token-mean"
        normalizer = (counts.sum() if tokens else (counts > 0).sum()).clamp(min=1)
    scale = (
        counts[sequence] if aggregation == "sequence-mean" else torch.ones_like(counts[sequence])
    )
    return 1.0 / (scale * normalizer)


def _metrics(
    low: Tensor,
    high: Tensor,
    dual: Tensor,
    log_ratio: Tensor,
    divergence: Tensor,
    ratio: Tensor,
    finite: Tensor,
) -> Tensor:
    count = torch.tensor(float(low.shape[0]), dtype=ratio.dtype, device=ratio.device)
    fractions = [
        term.to(ratio.dtype).sum() / count.clamp(min=1)
        for term in (low, high, dual, -log_ratio, divergence, ratio)
    ]
    biggest = ratio.max() if ratio.numel() else torch.zeros_like(count)
    values = [*fractions, biggest, count, (~finite).to(ratio.dtype).sum()]
    assert len(values) == len(METRICS)
    return torch.stack(values)
