"""Triton kernels that draw a token per row: statistics of parts, their merge, and the choice.

The arithmetic is that of `reference.sample_weights`, in float64: integers whose sums depend on no
order, so parts, shards and the order in which a reduction adds change no bit. A row is cut into
parts of 2,048 logits, one program each; the choice reads one of them again. Nothing is allocated
that depends on a value, and nothing waits for the device.
"""
# mypy: allow-untyped-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1v3.kernels import devices, reference

BLOCK = 2048
WARPS = 8
NUMBERS = tl.constexpr(7)  # of `reference.sample_statistics`
BITS = tl.constexpr(36.0)
UNIT = tl.constexpr(68719476736.0)  # 2^36
MAGIC = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
BELOW_ONE = tl.constexpr(0.99999999999999988898)  # 1 - 2^-53


@triton.jit
def _nearest(z):
    rounded = (z + MAGIC) - MAGIC
    return tl.where(tl.abs(z) < 2251799813685248.0, rounded, z)


@triton.jit
def _horner(p, r, coefficient: tl.constexpr):
    return tl.fma(p, r, tl.full(r.shape, coefficient, tl.float64))


@triton.jit
def _weights(x, scale, reference):
    """Upper and lower parts of the weights of x, and weight times z - reference."""
    z = tl.maximum(x.to(tl.float64) * scale, -1e300)
    n = _nearest(z)
    r = z - n
    k = tl.maximum(n - reference, -200.0)
    p = tl.full(r.shape, 1.5196156503210004e-05, tl.float64)
    p = _horner(p, r, 0.00015466756336833445)
    p = _horner(p, r, 0.001333393505581506)
    p = _horner(p, r, 0.009618038131988825)
    p = _horner(p, r, 0.05550410365990974)
    p = _horner(p, r, 0.2402265106656165)
    p = _horner(p, r, 0.693147180704533)
    p = _horner(p, r, 1.0)
    power = ((k + 1059.0).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    weight = p * power
    upper = _nearest(weight)
    return upper, _nearest((weight - upper) * UNIT), weight * (k + r)


@triton.jit
def _scale_of(temperature_ptr, row):
    temperature = tl.load(temperature_ptr + row)
    bits = tl.full([], LOG2_E, tl.float64)
    scale = tl.where(temperature == 0, bits, bits / temperature)
    return tl.minimum(scale, 1e269, propagate_nan=tl.PropagateNan.ALL), temperature


@triton.jit
def _load(x_ptr, mask_ptr, enabled_ptr, floor_ptr, row, column, inside, HAS_BAN: tl.constexpr,
          HAS_ENABLED: tl.constexpr, HAS_FLOOR: tl.constexpr):  # fmt: skip
    """Logits of a row as they are drawn from; x_ptr points to the row."""
    x = tl.load(x_ptr + column, mask=inside, other=-float("inf")).to(tl.float32)
    if HAS_BAN:
        banned = tl.load(mask_ptr + column, mask=inside, other=0) != 0
        if HAS_ENABLED:
            banned = banned & (tl.load(enabled_ptr + row) != 0)
        x = tl.where(banned, -float("inf"), x)
    if HAS_FLOOR:
        x = tl.where(x.to(tl.float64) < tl.load(floor_ptr + row), -float("inf"), x)
    return x


@triton.jit
def _aligned(reference, upper, lower, weighted, highest):
    """Sums under their own references, as sums under the highest."""
    there = reference > -float("inf")
    distance = tl.where(there, highest - reference, 0.0)
    same = there & (distance == 0.0)
    below = there & (distance == BITS)
    moved = weighted - distance * (upper + lower / UNIT)
    shrink = ((tl.maximum(-distance, -1000.0) + 1023.0).to(tl.int64) << 52).to(
        tl.float64, bitcast=True
    )
    return (
        tl.where(same, upper, 0.0),
        tl.where(same, lower, tl.where(below, upper, 0.0)),
        tl.where(there, moved * shrink, 0.0),
    )


@triton.jit
def _first_where(condition, ids):
    """The smallest id where the condition holds, -1 for none."""
    first = tl.min(tl.where(condition, ids, float("inf")), axis=0)
    return tl.where(first < float("inf"), first, -1.0)


@triton.jit
def _bounds(shard_ptr, width, HAS_SHARD: tl.constexpr):
    first = tl.zeros([], tl.int64)
    if HAS_SHARD:
        first = tl.load(shard_ptr)
        width = tl.minimum(width, tl.maximum(tl.load(shard_ptr + 1) - first, 0))
    return first, width


@triton.jit(do_not_specialize=["n_rows"])
def _sample_statistics_kernel(
    x_ptr,
    mask_ptr,
    enabled_ptr,
    floor_ptr,
    temperature_ptr,
    shard_ptr,
    stats_ptr,
    n_rows: tl.int64,
    row_stride: tl.int64,
    width: tl.int64,
    parts,
    HAS_BAN: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_SHARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // parts).to(tl.int64)
    part = pid % parts
    first, vocab = _bounds(shard_ptr, width, HAS_SHARD)
    column = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale, temperature = _scale_of(temperature_ptr, row)
    x = _load(
        x_ptr + row * row_stride, mask_ptr, enabled_ptr, floor_ptr, row, column, column < vocab,
        HAS_BAN, HAS_ENABLED, HAS_FLOOR,
    )  # fmt: skip
    ids = (first + column).to(tl.float64)
    bad = (column < vocab) & ((x < float("inf")) == 0)
    bad_id = _first_where(bad, ids)
    x = tl.where(bad, -float("inf"), x)
    top = tl.max(x, axis=0)
    n = _nearest(tl.maximum(top.to(tl.float64) * scale, -1e300))
    reference = tl.where(tl.abs(n) < 1125899906842624.0, tl.ceil((n + 2.0) / BITS) * BITS, n)
    upper, lower, weighted = _weights(x, scale, reference)
    dead = top == -float("inf")
    out = stats_ptr + (part * n_rows + row) * NUMBERS
    broken = (bad_id >= 0) | (scale != scale)
    nan = tl.full([], float("nan"), tl.float64)
    none = tl.full([], -float("inf"), tl.float64)
    tl.store(out, tl.where(dead | broken, none, reference))
    tl.store(out + 1, tl.where(broken, nan, tl.where(dead, 0.0, tl.sum(upper, axis=0))))
    tl.store(out + 2, tl.where(dead, 0.0, tl.sum(lower, axis=0)))
    tl.store(out + 3, tl.where(dead, 0.0, tl.sum(weighted, axis=0)))
    tl.store(out + 4, top.to(tl.float64))
    tl.store(out + 5, tl.where(dead, -1.0, _first_where(x == top, ids)))
    tl.store(out + 6, bad_id)


@triton.jit
def _merged(at, there):
    """The seven numbers of the union of parts, and whether a logit of it is NaN or +inf."""
    none = -float("inf")
    references = tl.load(at, mask=there, other=none)
    uppers = tl.load(at + 1, mask=there, other=0.0)
    lowers = tl.load(at + 2, mask=there, other=0.0)
    weighteds = tl.load(at + 3, mask=there, other=0.0)
    tops = tl.load(at + 4, mask=there, other=none)
    top_ids = tl.load(at + 5, mask=there, other=-1.0)
    bad_ids = tl.load(at + 6, mask=there, other=-1.0)
    reference = tl.max(references, axis=0)
    broken = tl.max((uppers != uppers).to(tl.int32), axis=0) != 0
    uppers, lowers, weighteds = _aligned(references, uppers, lowers, weighteds, reference)
    top = tl.max(tops, axis=0)
    top_id = _first_where((tops == top) & (top_ids >= 0), top_ids)
    bad_id = _first_where(bad_ids >= 0, bad_ids)
    return reference, uppers, lowers, weighteds, top, top_id, bad_id, broken


@triton.jit(do_not_specialize=["n_rows"])
def _sample_merge_kernel(stats_ptr, merged_ptr, n_rows: tl.int64, parts, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    at = stats_ptr + (part * n_rows + row) * NUMBERS
    reference, upper, lower, weighted, top, top_id, bad_id, broken = _merged(at, part < parts)
    nan = tl.full([], float("nan"), tl.float64)
    out = merged_ptr + row * NUMBERS
    tl.store(out, reference)
    tl.store(out + 1, tl.where(broken, nan, tl.sum(upper, axis=0)))
    tl.store(out + 2, tl.sum(lower, axis=0))
    tl.store(out + 3, tl.sum(weighted, axis=0))
    tl.store(out + 4, top)
    tl.store(out + 5, top_id)
    tl.store(out + 6, bad_id)


@triton.jit(do_not_specialize=["n_rows", "ranks", "rank"])
def _sample_choose_kernel(
    x_ptr,
    mask_ptr,
    enabled_ptr,
    floor_ptr,
    temperature_ptr,
    shard_ptr,
    stats_ptr,
    rows_ptr,
    uniforms_ptr,
    forced_ptr,
    tokens_ptr,
    logprobs_ptr,
    entropy_ptr,
    n_rows: tl.int64,
    row_stride: tl.int64,
    width: tl.int64,
    parts,
    ranks,
    rank,
    HAS_BAN: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_SHARD: tl.constexpr,
    HAS_FORCED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first, vocab = _bounds(shard_ptr, width, HAS_SHARD)
    scale, temperature = _scale_of(temperature_ptr, row)
    q = tl.arange(0, RANKS)
    reference, uppers, lowers, weighteds, top, top_id, bad_id, broken = _merged(
        rows_ptr + (q * n_rows + row) * NUMBERS, q < ranks
    )
    total = tl.sum(uppers, axis=0) * UNIT + tl.sum(lowers, axis=0)
    dead = total == 0.0
    upper = tl.sum(tl.where(q < rank, uppers, 0.0), axis=0)
    lower = tl.sum(tl.where(q < rank, lowers, 0.0), axis=0)
    below = total * BELOW_ONE
    limit = tl.load(uniforms_ptr + row) * total
    limit = tl.where(limit < below, tl.maximum(limit, 0.0), below)

    # The part in which the sum of weights passes the limit, then the column.
    part = tl.arange(0, PARTS)
    at = stats_ptr + (part * n_rows + row) * NUMBERS
    there = part < parts
    part_reference = tl.load(at, mask=there, other=-float("inf"))
    part_upper = tl.load(at + 1, mask=there, other=0.0)
    part_lower = tl.load(at + 2, mask=there, other=0.0)
    part_upper, part_lower, _ = _aligned(
        part_reference, part_upper, part_lower, part_lower, reference
    )
    passed = (upper + tl.cumsum(part_upper, 0)) * UNIT + (lower + tl.cumsum(part_lower, 0)) > limit
    chosen = tl.min(tl.where(passed & there, part, PARTS), axis=0)
    mine = (upper * UNIT + lower <= limit) & (chosen < PARTS)
    upper += tl.sum(tl.where(part < chosen, part_upper, 0.0), axis=0)
    lower += tl.sum(tl.where(part < chosen, part_lower, 0.0), axis=0)
    column = tl.where(mine, chosen, 0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = _load(
        x_ptr + row * row_stride, mask_ptr, enabled_ptr, floor_ptr, row, column, column < vocab,
        HAS_BAN, HAS_ENABLED, HAS_FLOOR,
    )  # fmt: skip
    here_upper, here_lower, _ = _weights(x, scale, reference)
    sums = (upper + tl.cumsum(here_upper, 0)) * UNIT + (lower + tl.cumsum(here_lower, 0))
    drawn = tl.min(tl.where(sums > limit, column, vocab), axis=0)

    token = tl.where(mine & (drawn < vocab), first + drawn, -1)
    token = tl.where(temperature == 0, top_id.to(tl.int64), token)
    token = tl.where(broken | dead, tl.maximum(bad_id, 0.0).to(tl.int64), token)
    if HAS_FORCED:
        forced = tl.load(forced_ptr + row)
        token = tl.where(forced >= 0, forced, token)
    owned = (token >= first) & (token < first + vocab)
    one = tl.full([], 1.0, tl.float64)
    log2_total = tl.log2(tl.where(dead, one, total)) - 72.0
    share = tl.sum(weighteds, axis=0) * UNIT / tl.where(dead, one, total)
    nan = tl.full([], float("nan"), tl.float64)
    entropy = tl.where(dead, 0.0, tl.maximum((log2_total - share) * LN_2, 0.0))
    logit = _load(
        x_ptr + row * row_stride, mask_ptr, enabled_ptr, floor_ptr, row,
        tl.where(owned, token - first, 0), owned, HAS_BAN, HAS_ENABLED, HAS_FLOOR,
    )  # fmt: skip
    gone = dead | (logit == -float("inf"))
    z = tl.where(gone, 0.0, logit.to(tl.float64)) * scale
    logprob = tl.minimum((z - tl.where(dead, 0.0, reference) - log2_total) * LN_2, 0.0)
    logprob = tl.where(gone, -float("inf"), logprob)
    logprob = tl.where(broken | ((ranks == 1) & (owned == 0)), nan, logprob)
    logprob = tl.where(owned | (ranks == 1), logprob, 0.0)
    tl.store(tokens_ptr + row, tl.where(owned, token, -1))
    tl.store(logprobs_ptr + row, logprob.to(tl.float32))
    tl.store(entropy_ptr + row, tl.where(broken, nan, entropy).to(tl.float32))


class Rows:
    """Rows x [n, width] that are drawn from, contiguous in the last dimension, and their kernels.

    Args:
        shard: int64 [2] on the device, (first id, true vocabulary), or None for a whole one.
        temperature: float64 [n]; floor: float64 [n] or None.
        banned: int64 [K] or None; enabled: bool [n] or None.
    """

    def __init__(
        self,
        x: Tensor,
        shard: Tensor | None,
        temperature: Tensor,
        banned: Tensor | None,
        enabled: Tensor | None,
        floor: Tensor | None,
    ) -> None:
        self.x, self.n, self.width = x, *x.shape
        self.parts = max(1, triton.cdiv(self.width, BLOCK))
        mask = None if banned is None else _ban_mask(banned, self.width, shard)
        flags = None if enabled is None else enabled.view(torch.uint8)
        self.inputs = x, mask, flags, floor, temperature, shard
        self.kinds = {
            "HAS_BAN": banned is not None,
            "HAS_ENABLED": enabled is not None and banned is not None,
            "HAS_FLOOR": floor is not None,
            "HAS_SHARD": shard is not None,
        }

    def statistics(self) -> tuple[Tensor, Tensor]:
        """`reference.sample_statistics` of the parts [parts, n, 7] and of the rows [n, 7]."""
        parts = torch.empty(self.parts, self.n, 7, dtype=torch.float64, device=self.x.device)
        rows = parts.new_empty(self.n, 7)
        if self.n:
            with devices.launching_on(self.x):
                _sample_statistics_kernel[(self.n * self.parts,)](
                    *self.inputs, parts, self.n, self.x.stride(0), self.width, self.parts,
                    **self.kinds, BLOCK=BLOCK, num_warps=WARPS,
                )  # fmt: skip
                _sample_merge_kernel[(self.n,)](
                    parts, rows, self.n, self.parts, PARTS=triton.next_power_of_2(self.parts),
                    num_warps=4,
                )  # fmt: skip
        return parts, rows

    def choose(
        self, parts: Tensor, rows: Tensor, rank: int, uniforms: Tensor, forced: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`reference.sample_choose` from the rows [ranks, n, 7] of all shards."""
        tokens = torch.empty(self.n, dtype=torch.int64, device=self.x.device)
        logprobs = torch.empty(self.n, dtype=torch.float32, device=self.x.device)
        entropy = torch.empty_like(logprobs)
        if self.n:
            with devices.launching_on(self.x):
                _sample_choose_kernel[(self.n,)](
                    *self.inputs, parts, rows, uniforms, forced, tokens, logprobs, entropy, self.n,
                    self.x.stride(0), self.width, self.parts, rows.shape[0], rank, **self.kinds,
                    HAS_FORCED=forced is not None, BLOCK=BLOCK,
                    PARTS=triton.next_power_of_2(self.parts),
                    RANKS=triton.next_power_of_2(rows.shape[0]), num_warps=WARPS,
                )  # fmt: skip
        return tokens, logprobs, entropy


def _ban_mask(banned: Tensor, width: int, shard: Tensor | None) -> Tensor:
    local = banned if shard is None else banned - shard[0]
    return reference.ban_mask(local, width).view(torch.uint8)
