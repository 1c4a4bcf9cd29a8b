"""Layer specs of the two towers, and InternViT's layer."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor, nn

from r1v3.model.megatron.attention import CoreAttention
from r1v3.model.megatron.norms import FullWidthNorm, Norm

_Residual = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class LanguageLayer(TransformerLayer):
    """megatron-core's layer, whose residual additions record no graph under torch.no_grad()."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.bias_dropout_add_exec_handler = nullcontext


class VisionLayer(LanguageLayer):
    """InternViT's layer: each branch is scaled by a vector before it is added."""

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        super().__init__(config, *args, **kwargs)
        for name in ("ls1", "ls2"):
            scale = torch.ones(config.hidden_size, dtype=config.params_dtype)
            self.register_parameter(name, nn.Parameter(scale))
        self.self_attn_bda = lambda training, fused: self._add(self.ls1)
        self.mlp_bda = lambda training, fused: self._add(self.ls2)

    @staticmethod
    def _add(scale: Tensor) -> _Residual:
        def add(branch: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = branch
            return residual + scale * (output if bias is None else output + bias)

        return add


class VisionAttention(SelfAttention):
    """Self-attention whose QKV has a bias or not, independently of the other linears."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        *args: object,
        **kwargs: object,
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        if not config.add_qkv_bias:
            self.linear_qkv = submodules.linear_qkv(
                config.hidden_size,
                self.query_projection_size + 2 * self.kv_projection_size,
                config=config,
                init_method=config.init_method,
                gather_output=False,
                bias=False,
                skip_bias_add=False,
                is_expert=False,
                tp_comm_buffer_name="qkv",
            )


def mlp_submodules() -> MLPSubmodules:
    """Column-parallel, then row-parallel."""
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _layer_spec(
    layer: type[TransformerLayer],
    attention: type[SelfAttention],
    mask: AttnMaskType,
    query_key_norm: type[nn.Module] | None,
) -> ModuleSpec:
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=attention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=CoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=query_key_norm,
                    k_layernorm=query_key_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp_submodules()),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def vision_block(layers: int, *, query_key_norm: bool) -> TransformerBlockSubmodules:
    """InternViT's layers; it has no final norm."""
    norm = FullWidthNorm if query_key_norm else None
    spec = _layer_spec(VisionLayer, VisionAttention, AttnMaskType.no_mask, norm)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=None)


def language_block(layers: int) -> TransformerBlockSubmodules:
    """Qwen2's layers and its final norm."""
    spec = _layer_spec(LanguageLayer, SelfAttention, AttnMaskType.causal, None)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=Norm)
