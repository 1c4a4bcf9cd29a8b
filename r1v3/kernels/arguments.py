"""Checks on arguments that several kernels share, and the names they accept."""

from collections.abc import Collection

import torch
from torch import Tensor

# The position of a name is the code the compiled kernels use for it.
BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("group", "batch", "none")
SINGLETONS = ("zero", "raw")
METRICS = (
    "clip_low_fraction",
    "clip_high_fraction",
    "dual_clip_fraction",
    "approx_kl",
    "ref_kl",
    "ratio_mean",
    "ratio_max",
    "tokens",
    "nonfinite",
)


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise ValueError unless value is one of allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless tensor has exactly this shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def check_logits(logits: Tensor, vocab_size: int | None) -> None:
    """Raise ValueError for logits or a vocab_size that no kernel takes."""
    if logits.dim() == 0 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a floating-point tensor [..., V], got {logits.dtype} "
            f"of shape {list(logits.shape)}"
        )
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size must be >= 1, got {vocab_size}")
    if vocab_size is not None and vocab_size > logits.shape[-1]:
        raise ValueError(
            f"vocab_size must be at most the {logits.shape[-1]} columns of logits, got {vocab_size}"
        )


def as_temperature(
    temperature: float | Tensor, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Return a temperature as ops take it: 0-d in host memory, or float64 [rows] on the device.

    Raises:
        ValueError: for a number that is negative or not finite, or a tensor that does not hold one
            floating-point number, or one for each row of this shape, on this device. Its values
            are checked by the op, and on the CPU alone: see `check_temperature`.
    """
    if not isinstance(temperature, Tensor):
        check_temperature(temperature)
        return as_scalar(temperature)
    if not temperature.is_floating_point() or temperature.device != device:
        raise ValueError(
            f"temperature must be a number or a floating-point tensor on {device}, "
            f"got {temperature.dtype} on {temperature.device}"
        )
    if temperature.dim() == 0:
        temperature = temperature.expand(shape)
    check_shape("temperature", temperature, shape)
    return temperature.detach().reshape(-1).to(torch.float64).contiguous()


def number_or_rows(temperature: Tensor) -> float | Tensor:
    """Return what `as_temperature` made as a number, where there is one for all rows."""
    return float(temperature) if temperature.dim() == 0 else temperature


def is_zero(temperature: float | Tensor) -> bool:
    """Whether one temperature of 0 is that of all rows."""
    return not isinstance(temperature, Tensor) and temperature == 0


def check_temperature(temperature: float | Tensor) -> None:
    """Raise ValueError for a temperature that is negative or not finite, of a row too, on a CPU."""
    if not isinstance(temperature, Tensor):
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be finite and >= 0, got {temperature}")
        return
    good = (temperature >= 0) & (temperature < torch.inf)
    if not bool(good.all()):
        raise ValueError(
            f"temperature must be finite and >= 0, got {temperature[~good][:8].tolist()}"
        )


def check_token_ids(token_ids: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return () for one label in each row of this shape, and (K,) for K of them.

    Raises:
        ValueError: for labels of another shape, or that are no integers.
    """
    labels = token_ids.shape[len(shape) :]
    if tuple(token_ids.shape[: len(shape)]) != tuple(shape) or len(labels) > 1:
        rows = list(shape)
        raise ValueError(
            f"token_ids must have shape {rows}, or {[*rows, 'K']} of K labels for each row, "
            f"got {list(token_ids.shape)}"
        )
    if token_ids.is_floating_point() or token_ids.is_complex():
        raise ValueError(f"token_ids must be integers, got {token_ids.dtype}")
    return tuple(labels)


def check_one_label(token_ids: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless token_ids are integers, one in each row of this shape."""
    if check_token_ids(token_ids, shape):
        raise ValueError(
            f"token_ids must have shape {list(shape)}: the policy loss is of one token in each "
            f"row, got {list(token_ids.shape)}; log-probabilities of several come from "
            "logprobs_and_entropy and linear_logprobs_and_entropy"
        )


def check_rows(rows: Tensor | None) -> None:
    """Raise ValueError unless rows are int64 [n] or None."""
    if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1):
        raise ValueError(f"rows must be int64 [n], got {rows.dtype} of shape {list(rows.shape)}")


def as_scalar(value: float, device: torch.device | str = "cpu") -> Tensor:
    """Return value as a 0-d float64 tensor.

    A custom op that took the float itself would be compiled again for every value; written as a
    product, torch.compile keeps it a run-time input.
    """
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64, device=device) * value
    return torch.full((), value, dtype=torch.float64, device=device)
