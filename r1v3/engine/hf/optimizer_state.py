"""The state of an AdamW-like optimizer as named tensors, and back, bit for bit."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_PREFIX = "optimizer."
_UNUSED = "unused"
NamedParameters = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: NamedParameters
) -> dict[str, Tensor]:
    """Return the state of an AdamW-like optimizer by parameter name, for a checkpoint.

    Args:
        named_parameters: `model.named_parameters()` or a dict; others than the optimizer's
            are ignored.
    Returns:
        "optimizer.<field>.<parameter>" for each tensor of the state (AdamW: exp_avg, exp_avg_sq
        and step), and an empty "optimizer.unused.<parameter>" where no step has used one yet.
        The tensors are the optimizer's own, not copies. Learning rates are not part of it.
    Raises:
        ValueError: a parameter without a name, or a state that is not made of tensors.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter, _ in _optimized(optimizer, named_parameters):
        state = optimizer.state.get(parameter, {})
        if not state:
            tensors[f"{_PREFIX}{_UNUSED}.{name}"] = torch.empty(0, dtype=torch.uint8)
        for field, value in state.items():
            if not isinstance(value, Tensor) or "." in field:
                raise ValueError(f"optimizer state {field!r} of {name} must be a tensor: {value!r}")
            tensors[f"{_PREFIX}{field}.{name}"] = value
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    named_parameters: NamedParameters,
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `optimizer_tensors` gave, bit for bit; keys of other things are ignored.

    Raises:
        ValueError: a parameter without saved state, saved state without its parameter, or a
            shape that is not the parameter's; the optimizer is unchanged.
    """
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(_PREFIX):
            field, _, name = key.removeprefix(_PREFIX).partition(".")
            saved.setdefault(name, {})[field] = tensor
    optimized = _optimized(optimizer, named_parameters)
    names = {name for name, _, _ in optimized}
    missing, unknown = names - saved.keys(), saved.keys() - names
    if missing:
        raise ValueError(f"no saved optimizer state for {_some(missing)}")
    if unknown:
        raise ValueError(f"saved optimizer state for {_some(unknown)}, which it does not optimize")
    restored = []
    for name, parameter, group in optimized:
        fields = saved[name]
        for field, tensor in fields.items():
            if field not in (_UNUSED, "step") and tensor.shape != parameter.shape:
                raise ValueError(
                    f"saved optimizer state {field!r} of {name} has shape {tuple(tensor.shape)}, "
                    f"the parameter has {tuple(parameter.shape)}"
                )
        on_device = group.get("capturable") or group.get("fused")
        state = {}
        for field, tensor in fields.items():
            if field != _UNUSED:
                device = parameter.device if field != "step" or on_device else "cpu"
                state[field] = tensor.detach().to(device, copy=True)
        restored.append((parameter, state))
    optimizer.state.clear()
    for parameter, state in restored:
        if state:
            optimizer.state[parameter] = state


def _optimized(
    optimizer: torch.optim.Optimizer, named_parameters: NamedParameters
) -> list[tuple[str, Tensor, dict[str, Any]]]:
    names: dict[int, str] = {}
    for name, parameter in dict(named_parameters).items():
        names.setdefault(id(parameter), name)
    optimized = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is "
                    "not in named_parameters"
                )
            optimized.append((names[id(parameter)], parameter, group))
    return optimized


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:5])
    return first if len(names) <= 5 else f"{first} and {len(names) - 5} more"
