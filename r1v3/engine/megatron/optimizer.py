"""The optimizer of a Megatron model: AdamW on float32 main parameters, norms per part, clipping."""

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from r1v3.model.megatron.internvl import InternVL
from r1v3.model.parts import PARTS, part_of

# Key of a state without a parameter in torch's optimizer.
_NOTHING = "nothing"


def wrap(model: InternVL, *, distributed_optimizer: bool) -> DistributedDataParallel:
    """Wrap the model with float32 gradient buffers that are reduced over the replicas.

    Gradients are reduced once, after the last micro-batch, without overlap: a micro-batch without
    images leaves the vision tower without a gradient.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=distributed_optimizer,
    )
    return DistributedDataParallel(model.config, config, model)


class MegatronAdamW:
    """AdamW over the trainable parameters of a wrapped model.

    Args:
        weight_decay: of matrices; biases and vectors are never decayed.
        max_grad_norm: total norm to clip to.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        *,
        weight_decay: float,
        betas: tuple[float, float],
        max_grad_norm: float,
        bf16: bool,
        distributed: bool,
    ) -> None:
        self.model, self.distributed = model, distributed
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm
        config = OptimizerConfig(
            optimizer="adam",
            lr=0.0,
            weight_decay=weight_decay,
            adam_beta1=betas[0],
            adam_beta2=betas[1],
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=distributed,
            clip_grad=0.0,
        )
        self.optimizer: ChainedOptimizer = get_megatron_optimizer(config, [model])
        self._allocate()

    def _allocate(self) -> None:
        """Allocate torch's moments now: megatron-core saves and loads only those that exist."""
        for chained in self.optimizer.chained_optimizers:
            if not isinstance(chained.optimizer, torch.optim.AdamW):
                continue
            for group in chained.optimizer.param_groups:
                for parameter in group["params"]:
                    chained.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    }
            state: dict[Any, Any] = chained.optimizer.state
            if not state:
                # A rank without trained parameters counts too: megatron-core wants a count to save.
                state[_NOTHING] = {"step": torch.tensor(0.0)}

    def state_bytes(self) -> int:
        """Return the bytes of the state that this rank has to store."""
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        if not self.distributed and replica:
            return 0  # the same as the first one's
        return sum(
            tensor.nbytes
            for chained in self.optimizer.chained_optimizers
            if chained.optimizer is not None
            for parameter, state in chained.optimizer.state.items()
            for tensor in (parameter, *state.values())
            if isinstance(tensor, Tensor)
        )

    def zero_grad(self) -> None:
        """Zero the gradients of the previous step."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, learning_rate: float) -> dict[str, float]:
        """Clip and update; return gradient norms before clipping, in total and per part.

        Where the norm is not finite, which every rank finds, nothing is updated.
        """
        norms = self._norms()
        norm = math.sqrt(sum(value**2 for value in norms.values()))
        if math.isfinite(norm):
            self._update(norm, learning_rate)
        return {
            "learning_rate": learning_rate,
            "grad_norm": norm,
            **{f"grad_norm_{part}": value for part, value in norms.items()},
        }

    def _update(self, norm: float, learning_rate: float) -> None:
        if norm > self.max_grad_norm:
            self.model.scale_gradients(self.max_grad_norm / (norm + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            # megatron-core leaves it to its scheduler that biases and vectors are not decayed.
            group["weight_decay"] = self.weight_decay * group["wd_mult"]
        self.optimizer.prepare_grads()
        self.optimizer.step_with_ready_grads()
        for chained in self.optimizer.chained_optimizers:
            if chained.optimizer is not None and _NOTHING in chained.optimizer.state:
                chained.optimizer.state[_NOTHING]["step"] += 1

    def _norms(self) -> dict[str, float]:
        """Norm of each part's gradient over all ranks; duplicated parameters count once."""
        device = next(self.model.parameters()).device
        squares = torch.zeros(len(PARTS), dtype=torch.float64, device=device)
        for name, parameter in self.model.module.named_parameters():
            if not parameter.requires_grad or not param_is_not_shared(parameter):
                continue
            if not tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter):
                continue
            gradient = self._owned_gradient(parameter)
            squares[PARTS.index(part_of(name))] += gradient.double().square().sum()
        everyone = None if self.distributed else parallel_state.get_model_parallel_group()
        dist.all_reduce(squares, group=everyone)
        return dict(zip(PARTS, squares.sqrt().tolist(), strict=True))

    def _owned_gradient(self, parameter: nn.Parameter) -> Tensor:
        """The reduced gradient: all of it, or with a distributed optimizer this rank's shard."""
        gradient: Tensor = parameter.main_grad.view(-1)  # type: ignore[attr-defined]
        if not self.distributed:
            return gradient
        [optimizer] = self.optimizer.chained_optimizers
        assert isinstance(optimizer, DistributedOptimizer)
        if parameter not in optimizer.model_param_gbuf_map:
            return gradient[:0]
        shard = optimizer._get_model_param_range_map(parameter)["param"]
        return gradient[shard.start : shard.end]
