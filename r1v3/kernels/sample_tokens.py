"""Drawing the next token of every row, with its log-probability and entropy, from one read.

The weight of a token, exp(logit / temperature), is an integer of 72 bits and more below the
largest; the drawn token is the first at which the sum of weights passes uniform * total. Sums of
integers depend on no order: neither other rows, nor threads, nor the number of shards of the
vocabulary change a token or the bits of its log-probability.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1v3.kernels import cpu, devices, reference, vocab_parallel
from r1v3.kernels.arguments import as_scalar, check_logits, check_shape, check_temperature
from r1v3.kernels.registration import register_op
from r1v3.kernels.vocab_parallel import columns

Results = tuple[Tensor, Tensor, Tensor]


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    banned: Tensor | None = None,
    enabled: Tensor | None = None,
    forced: Tensor | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token per row by inverse CDF, and return what a policy gradient needs to know of it.

    The logits are not changed. Banned tokens go first, then the temperature, then min_p, top_k
    and top_p in the order of vLLM, each on the distribution that the one before left. The log-
    probability and the entropy, in nats, are those of the distribution that was drawn from, after
    all of these. Nothing carries a gradient.

    A row's results depend on its own logits and its own uniform number: the other rows, the
    number of threads and the number of shards change no bit of a token or its log-probability
    (with vocabularies up to 370,000). A -inf logit is never drawn.

    Temperature 0 takes the first of the largest logits; its log-probability and entropy are those
    of temperature 1, and top_k, top_p and min_p do not act. A row without a legal token gives
    token 0, log-probability -inf and entropy 0. A row with NaN or +inf gives the first such token
    and NaN for both.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, any strides.
        uniforms: [...] floating point in [0, 1), one random number per row.
        temperature: finite and >= 0, one for all rows or a tensor [...].
        banned: [K] integers, ids of the whole vocabulary that are not drawn; those outside it are
            ignored.
        enabled: [...], nonzero where the ban holds; None bans in every row.
        forced: [...] integers, the token of a row whose token is given, -1 where one is drawn.
            The log-probability of a forced token that cannot be drawn is -inf. One outside the
            vocabulary raises for CPU tensors, and gives token -1 and NaN for CUDA tensors.
        top_k: only the k largest logits are drawn, and what equals the last of them.
        top_p: only the largest logits that together reach this probability are drawn, and what
            equals the last of them; in (0, 1].
        min_p: only tokens of at least this fraction of the largest probability are drawn; in
            (0, 1].
        vocab_size: the true vocabulary where columns are padded; padding is not drawn.
        group: the vocabulary is sharded over this group, in rank order; every rank must call with
            the same arguments but its own logits, and gets the same results. The ranks exchange 56
            bytes per row, and then 16 more from the one that owns the token. With top_k, top_p or
            min_p they exchange the logits instead, and a CUDA tensor waits for the shards' widths.

    Returns:
        tokens int64 [...], logprobs and entropy [...] float32 (float64 for float64 logits),
        within 1e-6 of the exact ones.

    Raises:
        ValueError: if shapes or dtypes do not match, there are no columns, a setting is out of
            its range, or, on the CPU, a temperature or forced token of a tensor is.
    """
    rows = tuple(logits.shape[:-1])
    check_logits(logits, vocab_size if group is None else None)
    if logits.shape[-1] == 0 and group is None:
        raise ValueError(f"logits must have columns, got shape {list(logits.shape)}")
    _check_rows("uniforms", uniforms, rows, floating=True)
    if isinstance(temperature, Tensor):
        _check_rows("temperature", temperature, rows, floating=True)
    else:
        check_temperature(temperature)
        # On the device, so that a graph's replay reads what it captured
        temperature = as_scalar(temperature, logits.device)
    if forced is not None:
        _check_rows("forced", forced, rows, floating=False)
    if enabled is not None:
        check_shape("enabled", enabled, rows)
        enabled = enabled != 0
    if banned is not None and (banned.dim() != 1 or not _is_integer(banned)):
        raise ValueError(
            f"banned must be integers [K], got {banned.dtype} of shape {list(banned.shape)}"
        )
    _check_truncation(top_k, top_p, min_p)
    tokens, logprobs, entropy = _sample_op(
        logits, uniforms, temperature, banned, enabled, forced, top_k,
        None if top_p == 1 else top_p, min_p, vocab_size, vocab_parallel.group_name(group),
    )  # fmt: skip
    return tokens.view(rows), logprobs.view(rows), entropy.view(rows)


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _check_rows(name: str, tensor: Tensor, rows: tuple[int, ...], *, floating: bool) -> None:
    check_shape(name, tensor, rows)
    if not (tensor.is_floating_point() if floating else _is_integer(tensor)):
        kind = "floating point" if floating else "integers"
        raise ValueError(f"{name} must be {kind}, got {tensor.dtype}")


def _check_truncation(top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {value}")


def _sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    temperature: Tensor,
    banned: Tensor | None,
    enabled: Tensor | None,
    forced: Tensor | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    vocab_size: int | None,
    group: str,
) -> Results:
    """Tokens, log-probabilities and entropy, [n] each."""
    x = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])
    truncation = top_k, top_p, min_p
    truncated = truncation != (None, None, None)
    if group and truncated:
        x, group = vocab_parallel.gather_columns(x, group), ""
        check_logits(x, vocab_size)
    draw = _Draw.of(x, uniforms, temperature, banned, enabled, forced)
    shard = vocab_parallel.shard_bounds(x.shape[1], vocab_size, group, x.device)
    if not group:
        x = x[:, :vocab_size]
        if truncated:
            draw = draw.truncated(x, *truncation)
    if devices.runs_triton(x):
        results = _by_triton(_contiguous_rows(x), draw, shard, group)
    else:
        first, vocab, true_size = columns(x.shape[1], vocab_size if group else None, shard)
        if x.device.type == "cpu":
            _check_values(temperature, draw.forced, true_size)
        compute = _by_compiled if cpu.supports(x) else _by_reference
        results = compute(_contiguous_rows(x[:, :vocab]), draw, first, group)
    return _from_owners(*results, group) if group else results


@dataclass(frozen=True)
class _Draw:
    """Settings of a draw of n rows.

    Attributes:
        uniforms, temperature: float64 [n].
        banned: int64 [K] or None; enabled: bool [n] or None.
        forced: int64 [n] or None.
        floor: float64 [n], smaller logits are not drawn, or None.
    """

    uniforms: Tensor
    temperature: Tensor
    banned: Tensor | None
    enabled: Tensor | None
    forced: Tensor | None
    floor: Tensor | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        uniforms: Tensor,
        temperature: Tensor,
        banned: Tensor | None,
        enabled: Tensor | None,
        forced: Tensor | None,
    ) -> "_Draw":
        n = x.shape[0]
        degrees = temperature.to(torch.float64)
        return cls(
            uniforms.reshape(n).to(torch.float64).contiguous(),
            (degrees.expand(n) if degrees.dim() == 0 else degrees.reshape(n)).contiguous(),
            None if banned is None else banned.to(torch.int64).contiguous(),
            None if enabled is None else enabled.reshape(n).contiguous(),
            None if forced is None else forced.reshape(n).to(torch.int64).contiguous(),
        )

    def truncated(
        self, x: Tensor, top_k: int | None, top_p: float | None, min_p: float | None
    ) -> "_Draw":
        """The same with the floor of x [n, V] that the truncation sets."""
        legal = reference.sampled_logits(x, 0, self.banned, self.enabled)
        floor = reference.truncation_floor(legal, self.temperature, top_k, top_p, min_p)
        return replace(self, floor=floor)


def _by_triton(x: Tensor, draw: _Draw, shard: Tensor, group: str) -> Results:
    from r1v3.kernels.triton.sample_tokens import Rows

    rows = Rows(
        x, shard if group else None, draw.temperature, draw.banned, draw.enabled, draw.floor
    )
    parts, mine = rows.statistics()
    return rows.choose(parts, _of_all_ranks(mine, group), _rank(group), draw.uniforms, draw.forced)


def _by_compiled(x: Tensor, draw: _Draw, first: int, group: str) -> Results:
    options = draw.temperature, draw.banned, draw.enabled
    if not group:
        return cpu.sample_tokens(x, *options, draw.floor, draw.uniforms, draw.forced)
    parts, mine = cpu.sample_statistics(x, first, *options)
    rows = _of_all_ranks(mine, group)
    return cpu.sample_choose(
        x, first, *options, parts, rows, _rank(group), draw.uniforms, draw.forced
    )


def _by_reference(x: Tensor, draw: _Draw, first: int, group: str) -> Results:
    legal = reference.sampled_logits(x, first, draw.banned, draw.enabled, draw.floor)
    scale, greedy = reference.sample_scale(draw.temperature), draw.temperature == 0
    rows = _of_all_ranks(reference.sample_statistics(legal, scale, first), group)
    tokens, logprobs, entropy = reference.sample_choose(
        legal, scale, greedy, first, rows, _rank(group), draw.uniforms, draw.forced
    )
    dtype = reference.accumulation_dtype(x)
    return tokens, logprobs.to(dtype), entropy.to(dtype)


def _rank(group: str) -> int:
    return vocab_parallel.group_rank(group) if group else 0


def _of_all_ranks(rows: Tensor, group: str) -> Tensor:
    return vocab_parallel.gather_statistics(rows, group) if group else rows[None]


def _from_owners(tokens: Tensor, logprobs: Tensor, entropy: Tensor, group: str) -> Results:
    """Tokens and log-probabilities of the rank that owns each token: not -1 there."""
    mine = torch.stack([tokens.to(torch.float64), logprobs.to(torch.float64)], -1)
    every = vocab_parallel.gather_statistics(mine, group)
    owned = every[..., 0] >= 0
    of_owner = torch.where(owned, every[..., 1], 0.0).sum(0)
    of_owner = torch.where(owned.any(0), of_owner, torch.nan)
    return every[..., 0].amax(0).to(torch.int64), of_owner.to(logprobs.dtype), entropy


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _check_values(temperature: Tensor, forced: Tensor | None, vocab: int) -> None:
    """Raise ValueError for a temperature or forced token of a CPU tensor that is out of range."""
    if temperature.dim():
        check_temperature(temperature)
    if forced is None or (cpu.built() and cpu.first_outside(forced, vocab, -1) < 0):
        return
    outside = forced[(forced < -1) | (forced >= vocab)]
    if outside.numel():
        raise ValueError(f"forced must be in [0, {vocab}) or -1, got {outside[:8].tolist()}")


def _fake_sample_tokens(logits: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    n = math.prod(logits.shape[:-1])
    logprobs = logits.new_empty(n, dtype=reference.accumulation_dtype(logits))
    return logits.new_empty(n, dtype=torch.int64), logprobs, torch.empty_like(logprobs)


_sample_op = register_op("sample_tokens", _sample_tokens, fake=_fake_sample_tokens)
