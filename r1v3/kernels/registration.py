"""Registration of custom ops."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_LIBRARY = torch.library.Library("r1v3", "FRAGMENT")


def register_small_op(
    name: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    mutates_args: Sequence[str] = (),
) -> Callable[..., Any]:
    """Register an op without a gradient as `register_op` does, and return how to call it.

    The dispatcher takes ten microseconds, longer than the smallest kernels. Where nothing between
    the caller and the kernel wants to see the call, it goes past the dispatcher: no compiler, mode
    or transformation is active, and all tensors are plain ones.
    """
    op = register_op(name, kernel, fake=fake, mutates_args=mutates_args)
    run = _below_autograd(kernel, _written(op, mutates_args))

    def call(*arguments: Any) -> Any:
        return run(*arguments) if _unobserved(arguments) else op(*arguments)

    return call


def _unobserved(arguments: Sequence[Any]) -> bool:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(x) is Tensor for x in arguments if isinstance(x, Tensor))


def _written(op: OpOverload, mutates_args: Sequence[str]) -> list[int]:
    return [i for i, x in enumerate(op._schema.arguments) if x.name in mutates_args]


def _below_autograd(kernel: Callable[..., Any], written: Sequence[int]) -> Callable[..., Any]:
    """The kernel without autograd, which is told what was written."""

    def run(*arguments: Any) -> Any:
        for i in written:
            if arguments[i] is not None:
                torch.autograd.graph.increment_version(arguments[i])
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*arguments)

    return run


def register_op(
    name: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    mutates_args: Sequence[str] = (),
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    reads_on_host: bool = False,
) -> OpOverload:
    """Register `kernel` as the op r1v3::`name` and return that op.

    `torch.library.custom_op` would do the same, with wrappers that take longer than the small
    kernels. Arguments are positional.

    Args:
        kernel: typed, runs on CPU and CUDA tensors; the schema is inferred from its annotations.
        fake: computes shapes and dtypes alone.
        mutates_args: names of the tensors that `kernel` writes to.
        backward, setup_context: as in `torch.library.register_autograd`; without them the results
            carry no gradient.
        reads_on_host: the kernel looks at a number in host memory or waits for one on the device.
            torch.compile then records no CUDA graph over it, whose replays would launch the
            kernels with the number of the recording.
    """
    schema = torch.library.infer_schema(kernel, mutates_args=mutates_args)
    tags = [torch.Tag.pt2_compliant_tag]
    if reads_on_host and hasattr(torch.Tag, "cudagraph_unsafe"):
        tags.append(torch.Tag.cudagraph_unsafe)
    _LIBRARY.define(name + schema, tags=tuple(tags))
    op: OpOverload = getattr(torch.ops.r1v3, name).default
    run = _below_autograd(kernel, _written(op, mutates_args))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(op, fake, lib=_LIBRARY)
    if backward is None:
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_LIBRARY)
    return op
