"""Terms of the GRPO loss: its options, its checked arguments, and both for each token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r1v3.kernels import devices
from r1v3.kernels.arguments import as_scalar, check_choice, check_shape
from r1v3.kernels.registration import register_op

# The position of a name is the number that ops and compiled kernels take for it.
RATIO_CLIPS = ("ppo", "cispo")
KL_ESTIMATORS = ("k1", "k2", "k3")
AGGREGATIONS = ("sequence-mean", "token-mean", "sequence-sum", "constant", "none")
# Tokens that one program of the loss kernel works on, where no sequence matters.
LOSS_BLOCK = 1024


@dataclass(frozen=True)
class GrpoOptions:
    """Options of the loss, as `grpo_loss` documents them.

    Raises:
        ValueError: for a name that is not known, a negative clip range, a dual_clip up to 1, or one
            with ratio_clip "cispo".
    """

    clip_low: float
    clip_high: float
    dual_clip: float | None
    ratio_clip: str
    kl_coef: float
    kl: str
    unbiased_kl: bool
    aggregation: str

    def __post_init__(self) -> None:
        check_choice("ratio_clip", self.ratio_clip, RATIO_CLIPS)
        check_choice("kl", self.kl, KL_ESTIMATORS)
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        if self.clip_low < 0 or self.clip_high < 0:
            raise ValueError(
                "clip_low and clip_high must be >= 0, "
                f"got clip_low={self.clip_low}, clip_high={self.clip_high}"
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be > 1 or None, got {self.dual_clip}")
        if self.dual_clip is not None and self.ratio_clip == "cispo":
            raise ValueError(
                'dual_clip bounds the loss of ratio_clip "ppo" and must be None with '
                f'ratio_clip "cispo", got {self.dual_clip}'
            )

    def as_floats(self) -> list[float]:
        """The options as ops and compiled kernels take them; a dual_clip of None is 0."""
        return [
            self.clip_low,
            self.clip_high,
            self.dual_clip or 0.0,
            float(RATIO_CLIPS.index(self.ratio_clip)),
            self.kl_coef,
            float(KL_ESTIMATORS.index(self.kl)),
            float(self.unbiased_kl),
            float(AGGREGATIONS.index(self.aggregation)),
        ]

    @classmethod
    def of_floats(cls, floats: list[float]) -> "GrpoOptions":
        """The options from which `as_floats` made these."""
        clip_low, clip_high, dual_clip, ratio_clip, kl_coef, kl, unbiased_kl, aggregation = floats
        return cls(
            clip_low,
            clip_high,
            dual_clip or None,
            RATIO_CLIPS[int(ratio_clip)],
            kl_coef,
            KL_ESTIMATORS[int(kl)],
            bool(unbiased_kl),
            AGGREGATIONS[int(aggregation)],
        )


def gives_token_losses(options: list[float]) -> bool:
    """Whether the options, as floats, ask for the loss of each token."""
    return int(options[-1]) == AGGREGATIONS.index("none")


@dataclass(frozen=True)
class GrpoInputs:
    """Arguments of `grpo_loss` besides log-probabilities, checked, flat and without gradient.

    Attributes:
        dtype: of the terms.
        mask: bool [N], which tokens count.
        terms: advantages [N] or [S], old log-probabilities [N] or None, reference
            log-probabilities [N] or None, importance weights [N], [S] or None.
        offsets: int64 [S + 1] of packed sequences, or None for sequences of `length` tokens.
        normalizer: 0-d or None.
    """

    dtype: torch.dtype
    mask: Tensor
    terms: list[Tensor | None]
    offsets: Tensor | None
    length: int
    sequences: int
    normalizer: Tensor | None
    options: GrpoOptions

    @classmethod
    def of(
        cls,
        like: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        loss_mask: Tensor,
        ref_logprobs: Tensor | None,
        weights: Tensor | None,
        cu_seqlens: Tensor | None,
        normalizer: Tensor | float | None,
        options: GrpoOptions,
    ) -> "GrpoInputs":
        """Check the arguments of `grpo_loss` against `like`.

        Args:
            like: any tensor of the shape, dtype and device that the log-probabilities have.
        """
        offsets, length, sequences = _sequence_layout(like, cu_seqlens)
        shape, dtype = tuple(like.shape), like.dtype
        check_shape("loss_mask", loss_mask, shape)
        for name, tensor in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs)):
            if tensor is not None:
                check_shape(name, tensor, shape)
        for name, tensor in (("advantages", advantages), ("weights", weights)):
            if tensor is not None:
                _check_per_sequence_or_token(name, tensor, shape, sequences)
        mask = loss_mask if loss_mask.dtype == torch.bool else loss_mask != 0
        return cls(
            dtype,
            mask.reshape(-1).contiguous(),
            [
                None if x is None else x.detach().reshape(-1).to(dtype).contiguous()
                for x in (advantages, old_logprobs, ref_logprobs, weights)
            ],
            offsets,
            length,
            sequences,
            _checked_normalizer(normalizer, options.aggregation, like.device),
            options,
        )


@dataclass(frozen=True)
class TokenTerms:
    """Terms of the loss of each token [n] that are known before its log-probability.

    Attributes:
        loss_scale: the factor of the token's loss in the total; zero where the mask is False.
        options: from `GrpoOptions.as_floats`.
    """

    loss_scale: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    options: list[float]

    @classmethod
    def of(cls, inputs: GrpoInputs) -> tuple[Tensor, "TokenTerms"]:
        """Mask [N] of the tokens that count, which are in a sequence, and the terms of all.

        Raises:
            ValueError: for aggregation "none": there is no total of which a token is a part.
        """
        if inputs.options.aggregation == "none":
            raise ValueError(
                'an op that computes the gradient with the loss takes no aggregation "none": give '
                "the log-probabilities of logprobs_and_entropy or linear_logprobs_and_entropy to "
                "grpo_loss"
            )
        advantages, old, ref, weights = inputs.terms
        assert advantages is not None
        n = inputs.mask.shape[0]
        short_advantages = None if advantages.shape[0] == n else advantages
        short_weights = None if weights is None or weights.shape[0] == n else weights
        compute: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = (
            _token_terms_op if devices.runs_triton(advantages) else _token_terms_by_torch
        )
        mask, scale, long_advantages, long_weights = compute(
            inputs.mask, short_advantages, short_weights, inputs.offsets, inputs.length,
            inputs.sequences, inputs.normalizer, AGGREGATIONS.index(inputs.options.aggregation),
            inputs.dtype,
        )  # fmt: skip
        if short_advantages is not None:
            advantages = long_advantages
        if short_weights is not None:
            weights = long_weights
        tensors = [scale, advantages, old, ref, weights]
        return mask, cls.of_tensors(tensors, inputs.options.as_floats())

    def tensors(self) -> list[Tensor | None]:
        """The terms as ops take them: all attributes but the options."""
        return [
            self.loss_scale,
            self.advantages,
            self.old_logprobs,
            self.ref_logprobs,
            self.importance_weights,
        ]

    @classmethod
    def of_tensors(cls, tensors: list[Tensor | None], options: list[float]) -> "TokenTerms":
        """The terms from which `tensors` made these."""
        scale, advantages, old, ref, weights = tensors
        assert scale is not None and advantages is not None
        return cls(scale, advantages, old, ref, weights, options)

    def __getitem__(self, rows: slice | Tensor) -> "TokenTerms":
        """The terms of these tokens."""
        some = [None if x is None else x[rows] for x in self.tensors()]
        return self.of_tensors(some, self.options)

    def grad_logprobs(self, logprobs: Tensor, mask: Tensor | None = None) -> Tensor:
        """d loss / d logprob [n]; zero where the mask is False, None for a mask of all tokens."""
        if mask is None:
            mask = torch.ones_like(logprobs, dtype=torch.bool)
        options = [*self.options[:-1], float(AGGREGATIONS.index("constant"))]
        _, gradient, _ = torch.ops.r1v3.grpo_loss(
            logprobs, self.tensors()[1:], mask, None, LOSS_BLOCK, logprobs.new_ones(()), options
        )
        return gradient.mul_(self.loss_scale)  # type: ignore[no-any-return]


def _sequence_layout(like: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor | None, int, int]:
    """int64 offsets [S + 1] of packed sequences, or None; the length of all others, or 0; S."""
    if cu_seqlens is None:
        if like.dim() != 2:
            raise ValueError(
                "logprobs must be [B, T], or [N] together with cu_seqlens, "
                f"got shape {list(like.shape)}"
            )
        rows, length = like.shape
        return None, length, rows
    if like.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            "packed logprobs must be [N] and cu_seqlens [S + 1], "
            f"got {list(like.shape)} and {list(cu_seqlens.shape)}"
        )
    offsets = cu_seqlens.to(device=like.device, dtype=torch.int64).contiguous()
    return offsets, 0, cu_seqlens.shape[0] - 1


def _check_per_sequence_or_token(
    name: str, values: Tensor, shape: tuple[int, ...], sequences: int
) -> None:
    if tuple(values.shape) not in (shape, (sequences,), (sequences, 1)):
        raise ValueError(
            f"{name} must have shape {[sequences]} (per sequence) or {list(shape)} (per token), "
            f"got {list(values.shape)}"
        )


def _checked_normalizer(
    normalizer: Tensor | float | None, aggregation: str, device: torch.device
) -> Tensor | None:
    """A 0-d tensor on the device, without gradient, or None."""
    if aggregation == "none" and normalizer is not None:
        raise ValueError('aggregation "none" divides by no normalizer: it must be None')
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer must be one number, got a tensor of shape {list(normalizer.shape)}"
            )
        return normalizer.detach().reshape(()).to(device, non_blocking=True)
    if normalizer is None:
        if aggregation == "constant":
            raise ValueError('aggregation "constant" needs a normalizer, got None')
        return None
    if not normalizer > 0:
        raise ValueError(f"normalizer must be > 0, got {normalizer}")
    # Not copied there from the host, which a CUDA graph cannot capture.
    return as_scalar(normalizer, device)


def _token_terms(
    mask: Tensor,
    advantages: Tensor | None,
    weights: Tensor | None,
    offsets: Tensor | None,
    length: int,
    sequences: int,
    normalizer: Tensor | None,
    aggregation: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask of the tokens that count, their loss scale, advantages and weights, [N] each or [0].

    One launch where the normalizer is given; `_token_terms_by_torch` says the same.

    Args:
        mask, offsets, length, sequences, normalizer: as `GrpoInputs` has them.
        advantages, weights: [S], or None where there is no value for each sequence.
        aggregation: the position in `AGGREGATIONS`.
        dtype: of the results.
    """
    if not devices.runs_triton(mask.new_empty(0, dtype=dtype)):
        found = _token_terms_by_torch(
            mask, advantages, weights, offsets, length, sequences, normalizer, aggregation, dtype
        )
        counted, scale, *by_token = (x.clone() for x in found)
        return counted, scale, by_token[0], by_token[1]
    from r1v3.kernels.triton.token_terms import token_terms

    name = AGGREGATIONS[aggregation]
    if normalizer is None:
        normalizer = _divisor(_counts(mask, offsets, length, sequences), name)
    return token_terms(
        mask, advantages, weights, offsets, length, sequences, normalizer.to(torch.float32),
        by_sequence=name == "sequence-mean",
    )  # fmt: skip


def _token_terms_by_torch(
    mask: Tensor,
    advantages: Tensor | None,
    weights: Tensor | None,
    offsets: Tensor | None,
    length: int,
    sequences: int,
    normalizer: Tensor | None,
    aggregation: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = AGGREGATIONS[aggregation]
    if offsets is None:
        shape = sequences, length
        counts = mask.view(shape).sum(1).to(dtype)

        def spread(values: Tensor) -> Tensor:
            return values[:, None].expand(shape).reshape(-1)
    else:
        position = torch.arange(mask.shape[0], device=mask.device)
        sequence = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
        mask = mask & (sequence < sequences) & (position >= offsets[0])
        counts = torch.zeros(sequences + 1, dtype=dtype, device=mask.device)
        counts = counts.index_add(0, sequence, mask.to(dtype))

        def spread(values: Tensor) -> Tensor:
            # The last value stands for tokens in no sequence, which do not count.
            return values[sequence.clamp(max=values.shape[0] - 1)]

    divisor = _divisor(counts, name) if normalizer is None else normalizer.to(dtype)
    if name == "sequence-mean":
        divisor = spread(divisor * counts.clamp(min=1))
    scale = torch.where(mask, 1.0, 0.0).to(dtype) / divisor
    nothing = scale.new_empty(0)
    by_token = [nothing if x is None else spread(x) for x in (advantages, weights)]
    return mask, scale, by_token[0], by_token[1]


def _counts(mask: Tensor, offsets: Tensor | None, length: int, sequences: int) -> Tensor:
    """Valid tokens of each sequence, int64 [S], without waiting for a device."""
    if offsets is None:
        return mask.view(sequences, length).sum(1)
    running = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    return running[offsets[1:]] - running[offsets[:-1]]


def _divisor(counts: Tensor, aggregation: str) -> Tensor:
    """The normalizer that nobody names: valid tokens, or sequences that have one."""
    return (counts.sum() if aggregation == "token-mean" else (counts > 0).sum()).clamp(min=1)


def _fake_token_terms(
    mask: Tensor, advantages: Tensor | None, weights: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale = mask.new_empty(mask.shape, dtype=rest[-1])
    by_token = [
        scale.new_empty(mask.shape if x is not None else (0,)) for x in (advantages, weights)
    ]
    return torch.empty_like(mask), scale, by_token[0], by_token[1]


_token_terms_op = register_op("token_terms", _token_terms, fake=_fake_token_terms)
