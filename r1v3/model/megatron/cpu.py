"""megatron-core on a machine without CUDA: stand-ins for the CUDA calls on its training path.

megatron-core computes nothing on the GPU that torch cannot do on the CPU, but it asks for
`torch.cuda.current_device()`, creates small tensors with `device="cuda"`, compares `Tensor.type()`
with CUDA type names and keeps CUDA random states. With these answered, its tensor, sequence and
pipeline parallelism, its optimizers and its checkpoints run on gloo as they are.
"""

import functools
from collections.abc import Callable

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like")
_enabled = False


def enable() -> None:
    """Let megatron-core run on the CPU of this process. Calling it again does nothing.

    Raises:
        RuntimeError: CUDA is available, where the stand-ins would send work to the wrong device.
    """
    global _enabled
    if torch.cuda.is_available():
        raise RuntimeError(
            "CUDA is available: megatron-core needs no CPU stand-ins here, and with them it would "
            "compute on the CPU; set CUDA_VISIBLE_DEVICES= to run on the CPU on purpose"
        )
    if _enabled:
        return
    _enabled = True
    with torch.device("meta"):  # torch notes at its first use which functions such a context is for
        torch.empty(0)
    for name, stand_in in {
        "current_device": lambda: _CPU,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }.items():
        setattr(torch.cuda, name, stand_in)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda module, *_, **__: module  # type: ignore[method-assign]
    torch.Tensor.type = _cuda_type_names(torch.Tensor.type)  # type: ignore[method-assign,assignment]
    _keep_random_states_on_cpu()


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: object, **kwargs: object) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


def _cuda_type_names(original: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(original)
    def named(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        result = original(tensor, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return named


def _keep_random_states_on_cpu() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
