"""Drawing the next token of every row, with its log-probability and entropy, from one read.

The weight of a token, exp(logit / temperature), is an integer of 72 bits and more below the
largest; the drawn token is the first at which the sum of weights passes uniform * total. Sums of
integers depend on no order: neither other rows, nor threads, nor the number of shards of the
vocabulary change a token or the bits of its log-probability.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1v3.kernels import cpu, reference, vocab_parallel
from r1v3.kernels.arguments import check_logits, check_shape
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
            The log-probability of a forced token that cannot be drawn is -inf.
        top_k: only the k largest logits are drawn, and what equals the last of them.
        top_p: only the largest logits that together reach this probability are drawn, and what
            equals the last of them; in (0, 1].
        min_p: only tokens of at least this fraction of the largest probability are drawn; in
            (0, 1].
        vocab_size: the true vocabulary where columns are padded; padding is not drawn.
        group: the vocabulary is sharded over this group, in rank order; every rank must call with
            the same arguments but its own logits, and gets the same results. The ranks exchange 56
            bytes per row, and then 16 more from the one that owns the token. With top_k, top_p or
            min_p they exchange the logits instead.

    Returns:
        tokens int64 [...], logprobs and entropy [...] float32 (float64 for float64 logits),
        within 1e-6 of the exact ones.

    Raises:
        ValueError: if shapes or dtypes do not match, there are no columns, a setting is out of
            its range, or, on the CPU, a temperature or forced token of a tensor is.
    """
    rows = tuple(logits.shape[:-1])
    degrees = 1.0 if isinstance(temperature, Tensor) else temperature
    check_logits(logits, degrees, vocab_size if group is None else None)
    if logits.shape[-1] == 0 and group is None:
        raise ValueError(f"logits must have columns, got shape {list(logits.shape)}")
    _check_rows("uniforms", uniforms, rows, floating=True)
    if isinstance(temperature, Tensor):
        _check_rows("temperature", temperature, rows, floating=True)
    else:  # on the device, so that a graph's replay reads what it captured
        temperature = torch.ones((), dtype=torch.float64, device=logits.device) * temperature
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
    if group and (top_k, top_p, min_p) != (None, None, None):
        x, group = vocab_parallel.gather_columns(x, group), ""
    shard = vocab_parallel.shard_bounds(x.shape[1], vocab_size, group, x.device)
    first, vocab, true_size = columns(x.shape[1], vocab_size, shard)
    x = x[:, :vocab]
    draw = _Draw.of(x, uniforms, temperature, banned, enabled, forced)
    if x.device.type == "cpu":
        _check_values(temperature, draw.forced, true_size)
    if group:
        return _of_shards(x, first, draw, group)
    floor = None
    if (top_k, top_p, min_p) != (None, None, None):
        legal = reference.sampled_logits(x, 0, draw.banned, draw.enabled)
        floor = reference.truncation_floor(legal, draw.temperature, top_k, top_p, min_p)
    if cpu.supports(x):
        return cpu.sample_tokens(
            _contiguous_rows(x), draw.temperature, draw.banned, draw.enabled, floor, draw.uniforms,
            draw.forced,
        )  # fmt: skip
    legal = reference.sampled_logits(x, 0, draw.banned, draw.enabled, floor)
    rows = reference.sample_statistics(legal, draw.scale, 0)[None]
    return draw.choose(legal, 0, rows, 0)


@dataclass(frozen=True)
class _Draw:
    """Settings of a draw of n rows.

    Attributes:
        uniforms, temperature: float64 [n].
        banned: int64 [K] or None; enabled: bool [n] or None.
        forced: int64 [n] or None.
    """

    uniforms: Tensor
    temperature: Tensor
    banned: Tensor | None
    enabled: Tensor | None
    forced: Tensor | None

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

    @property
    def scale(self) -> Tensor:
        return reference.sample_scale(self.temperature)

    def choose(self, x: Tensor, first: int, rows: Tensor, rank: int) -> Results:
        """The results by the reference, of x [n, V] without what is not drawn."""
        tokens, logprobs, entropy = reference.sample_choose(
            x, self.scale, self.temperature == 0, first, rows, rank, self.uniforms, self.forced
        )
        dtype = reference.accumulation_dtype(x)
        return tokens, logprobs.to(dtype), entropy.to(dtype)


def _of_shards(x: Tensor, first: int, draw: _Draw, group: str) -> Results:
    rank = vocab_parallel.group_rank(group)
    if cpu.supports(x):
        x = _contiguous_rows(x)
        options = first, draw.temperature, draw.banned, draw.enabled
        parts, mine = cpu.sample_statistics(x, *options)
        rows = vocab_parallel.gather_statistics(mine, group)
        results = cpu.sample_choose(x, *options, parts, rows, rank, draw.uniforms, draw.forced)
    else:
        legal = reference.sampled_logits(x, first, draw.banned, draw.enabled)
        mine = reference.sample_statistics(legal, draw.scale, first)
        rows = vocab_parallel.gather_statistics(mine, group)
        results = draw.choose(legal, first, rows, rank)
    return _from_owners(*results, group)


def _from_owners(tokens: Tensor, logprobs: Tensor, entropy: Tensor, group: str) -> Results:
    """Tokens and log-probabilities of the rank that owns each token: not -1 there."""
    mine = torch.stack([tokens.to(torch.float64), logprobs.to(torch.float64)], -1)
    every = vocab_parallel.gather_statistics(mine, group)
    owned = every[..., 0] >= 0
    found = every[..., 0].amax(0).clamp(min=0).to(torch.int64)
    of_owner = torch.where(owned, every[..., 1], 0.0).sum(0).to(logprobs.dtype)
    return found, of_owner, entropy


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _check_values(temperature: Tensor, forced: Tensor | None, vocab: int) -> None:
    """Raise ValueError for a temperature or forced token of a CPU tensor that is out of range."""
    if temperature.dim() and not bool(((temperature >= 0) & (temperature < torch.inf)).all()):
        raise ValueError(f"temperature must be finite and >= 0, got {temperature.tolist()[:8]}")
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
