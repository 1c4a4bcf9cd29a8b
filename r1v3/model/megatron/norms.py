"""Norms of the layer specs: megatron-core's own refuse sequence parallelism or a split width."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional


class Norm(nn.Module):
    """RMSNorm or LayerNorm, as config.normalization says; statistics are float32.

    Under sequence parallelism a rank sees a part of the tokens, so the parameters carry the
    attribute by which megatron-core sums their gradients over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.shape = (hidden_size,)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias: nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        if self.bias is None:
            return functional.rms_norm(hidden, self.shape, self.weight, self.eps)
        return functional.layer_norm(hidden, self.shape, self.weight, self.bias, self.eps)


class _SumOverRanks(torch.autograd.Function):
    """A sum that every rank uses: its gradient is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _SumOverRanks.forward(ctx, gradient)


class FullWidthNorm(nn.Module):
    """RMSNorm of a query or key over all heads together, of which this rank has a part.

    Padded heads are zero and add nothing to the sum of squares, so dividing by the true width is
    all they need.
    """

    EPS = 1e-6  # InternViT's, whatever the layer norms use

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = EPS) -> None:
        super().__init__()
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        self.split = ranks > 1
        self.width = config.hidden_size
        self.weight = nn.Parameter(
            torch.ones(config.num_attention_heads // ranks * hidden_size, dtype=config.params_dtype)
        )
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, heads: Tensor) -> Tensor:
        """[tokens, tiles, heads of this rank, head size], normalized."""
        values = heads.flatten(-2).float()
        squares = values.square().sum(-1, keepdim=True)
        if self.split:
            squares = _SumOverRanks.apply(squares)
        values = values * torch.rsqrt(squares / self.width + self.EPS)
        return (values.to(heads.dtype) * self.weight).view(heads.shape)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, object] | None = None,
    ) -> dict[str, object]:
        """The weight is split with the heads; without this it would be stored as replicated."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )
