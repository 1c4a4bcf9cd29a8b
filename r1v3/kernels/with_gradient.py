"""A loss whose gradients were computed together with it: its backward multiplies them in place.

The multiplication costs nothing where the upstream gradient is 1, as it usually is.
"""

import torch
from torch import Tensor

from r1v3.kernels import devices
from r1v3.kernels.registration import register_op


def _scale(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor [], without touching the tensor where factor is 1, and without waiting."""
    if devices.runs_triton(tensor) and tensor.is_contiguous():
        from r1v3.kernels.triton import scale as triton

        triton.scale_(tensor, factor)
    elif tensor.device.type != "cpu" or float(factor) != 1:
        tensor.mul_(factor)


def _with_gradient(
    loss: Tensor, x: Tensor, grad_x: Tensor, y: Tensor | None, grad_y: Tensor | None
) -> Tensor:
    """The loss [], with its gradients by x and y, empty where one is not needed.

    Not lists of tensors: flattening them takes autograd longer than a small loss.
    """
    return loss.clone()


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, x, grad_x, y, grad_y = inputs
    ctx.consumed = False
    ctx.dtypes = x.dtype, None if y is None else y.dtype
    ctx.save_for_backward(grad_x, grad_y)


def _backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
    if ctx.consumed:
        raise RuntimeError(
            "the gradient that was computed with this loss exists once and has been handed out, "
            "scaled in-place; a second backward needs a second call"
        )
    ctx.consumed = True
    given = []
    for gradient, dtype, wanted in zip(
        ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[1::2], strict=True
    ):
        if wanted:
            _scale_op(gradient, grad_loss)
        given.append(gradient.to(dtype).detach() if wanted else None)
    return None, given[0], None, given[1], None


_scale_op = register_op("scale_", _scale, fake=lambda *_: None, mutates_args=("tensor",))
with_gradient_op = register_op(
    "with_gradient", _with_gradient, fake=lambda loss, *rest: torch.empty_like(loss),
    backward=_backward, setup_context=_save,
)  # fmt: skip
