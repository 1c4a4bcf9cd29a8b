"""lm_head, log-probability and entropy without keeping the logits."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import (
    VOCABULARY,
    Function,
    Mode,
    Problem,
    Size,
    random_ids,
    random_normal,
)
from r1v3 import kernels
from r1v3.kernels import reference
from r1v3.kernels.arguments import as_scalar
from r1v3.kernels.linear.head import TiledHead
from r1v3.kernels.linear.logprobs import linear_gradient_op
from r1v3.kernels.linear.rows import SelectedRows

MODES: tuple[Mode, ...] = ("forward", "backward", "forward+backward")
# Tensor cores cut off what does not fit the 24 bits of a sum (Fasi et al., Numerical behavior of
# NVIDIA tensor cores, 2021), once per 16 products, where the reference on float32 rounds. Simulated
# for H = 5,120, this moves logits of standard deviation 3 by 1e-4, and by 2e-4 the log-probability
# of a token that is far less likely than one with a logit of 22.
TENSOR_CORE_TOLERANCE = 2e-4


def eager(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """All logits, also of the rows that label -100 then drops."""
    logp = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    chosen = logp.gather(-1, token_ids.clamp(min=0)[:, None]).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    kept = token_ids >= 0
    return torch.where(kept, chosen, 0.0), torch.where(kept, entropy, 0.0)


def persistent_row_results(head: TiledHead, rows: SelectedRows) -> tuple[Tensor, Tensor, Tensor]:
    """`row_results` by the one kernel of `linear_forward_triton` instead of products of tiles.

    The op takes the tiles. This benchmark runs both, and is what decides: the other one is to be
    deleted.
    """
    from benchmarks import linear_forward_triton
    from r1v3.kernels.triton import logits_statistics

    stats = linear_forward_triton.row_statistics(
        rows.states(head.weight.dtype), head.weight, head.bias, rows.token_ids, head.temperature,
        head.bounds,
    )  # fmt: skip
    return logits_statistics.finalize(stats[None], rows.token_ids, head.temperature, 0, head.bounds)


class _PersistentForward(torch.autograd.Function):
    """The op with its other forward, and its own backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, token_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = SelectedRows(hidden, token_ids)
        head = TiledHead(weight, None, hidden.dtype, 1.0)
        results = persistent_row_results(head, rows)
        logprobs, entropy, saved = (rows.scatter(x) for x in results)
        ctx.save_for_backward(hidden, weight, token_ids, head.bounds, saved)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        hidden, weight, token_ids, bounds, saved = ctx.saved_tensors
        grad_hidden, grad_weight, _ = linear_gradient_op(
            hidden, weight, None, token_ids, None, None, as_scalar(1.0), bounds, saved,
            [grad_logprobs, grad_entropy], [True, True, False], "", True, 0, 0.0,
        )  # fmt: skip
        return grad_hidden, grad_weight, None


def persistent_forward(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """`linear_logprobs_and_entropy` with the forward of `linear_forward_triton`."""
    logprobs, entropy = _PersistentForward.apply(hidden, weight, token_ids)
    return logprobs, entropy


def _other_forwards(hidden: Tensor, weight: Tensor, mode: Mode) -> dict[str, Function]:
    if mode == "backward" or not hidden.is_cuda:
        return {}
    from benchmarks import linear_forward_triton

    supported = linear_forward_triton.supports(hidden, weight, 1.0)
    return {"r1v3, persistent forward": persistent_forward} if supported else {}


def shapes(device: str, size: Size) -> list[dict[str, int]]:
    """T tokens of width H, `masked` percent of them with label -100, `bits` per number.

    V is 18,976 for one of eight tensor-parallel shards of the 38B model. On the CPU a quarter of
    Qwen3's vocabulary: of all of it, the float64 gradient alone takes gigabytes.
    """
    if device == "cpu":
        small = [{"T": 128, "H": 1024, "V": 18_976, "bits": 16}]
        quarter = {"T": 512, "H": 1024, "V": 151_936 // 4}
        large = [
            {**quarter, "bits": bits, "masked": masked} for bits in (32, 16) for masked in (0, 50)
        ]
        return small if size == "small" else [*small, *large]
    small = [{"T": 1024, "H": 5120, "V": 18_976, "bits": 16}]
    large = [
        {"T": rows, "H": 5120, "V": vocab, "bits": 16}
        for vocab in (VOCABULARY, 18_976)
        for rows in (8192, 1024, 32_768)
    ]
    masked = {"T": 8192, "H": 5120, "V": VOCABULARY, "bits": 16, "masked": 50}
    return small if size == "small" else [large[0], masked, *small, *large[1:]]


def head(rows: int, width: int, vocab: int, bits: int, device: str) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight whose logits have a standard deviation of 3."""
    dtype = {16: torch.bfloat16, 32: torch.float32}[bits]
    hidden = random_normal(rows, width, device=device, seed=5).to(dtype)
    weight = random_normal(vocab, width, device=device, seed=6).mul_(3 * width**-0.5).to(dtype)
    return hidden, weight


def product_tolerance(hidden: Tensor) -> float:
    """Error that products of these hidden states may add to log-probabilities."""
    return TENSOR_CORE_TOLERANCE if hidden.is_cuda and hidden.element_size() == 2 else 0.0


def problem(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    """One product makes the logits, two make the gradients.

    Rows that are dropped are not counted as work, and neither is computing the logits again in
    the backward: it is the price of not keeping them. On an H100, the forward that the op does
    not take is timed beside it.
    """
    rows, width, vocab = shape["T"], shape["H"], shape["V"]
    hidden, weight = head(rows, width, vocab, shape.get("bits", 16), device)
    token_ids = random_ids(rows, vocab, device)
    dropped = torch.arange(rows, device=device) * 100 < rows * shape.get("masked", 0)
    token_ids[dropped] = reference.IGNORED_TOKEN
    products = {"forward": 1, "backward": 2, "forward+backward": 3}[mode]
    return Problem(
        op="linear_logprobs_and_entropy",
        mode=mode,
        shape=shape,
        dtype=hidden.dtype,
        inputs={"hidden": hidden, "weight": weight, "token_ids": token_ids},
        ours=kernels.linear_logprobs_and_entropy,
        eager=eager,
        reference=reference.linear_logprobs_and_entropy,
        upstream=(random_normal(rows, device=device), random_normal(rows, device=device, seed=3)),
        differentiated=("hidden", "weight"),
        row_inputs=("hidden", "token_ids"),
        restated=_other_forwards(hidden, weight, mode),
        flops=products * 2 * int((~dropped).sum()) * width * vocab,
        tolerance=product_tolerance(hidden),
    )
