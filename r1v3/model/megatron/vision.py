"""InternViT and the connector on megatron-core.

The heads of InternViT are split over the tensor-parallel ranks, like every other matrix. Sharding
tiles over ranks instead would need no padded heads and no reduction of the QK norm, but the 5.5 B
parameters would be whole on every rank of the first stage: 11 GB of bfloat16 weights and 22 GB of
float32 gradients, against 1.5 GB and 3 GB at 8 ranks, padding included.
"""

from math import isqrt

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn
from torch.nn import functional
from transformers import InternVLConfig

from r1v3.model.megatron.layers import mlp_submodules, vision_block
from r1v3.model.megatron.options import (
    ModelOptions,
    connector_transformer,
    towers,
    vision_transformer,
)


class InternViT(MegatronModule):
    """Patch, class and position embeddings, then layers without a final norm."""

    def __init__(self, config: InternVLConfig, options: ModelOptions) -> None:
        transformer = vision_transformer(config, options)
        super().__init__(config=transformer)
        vision, _ = towers(config)
        width, dtype = vision.hidden_size, options.dtype
        self.image_size, self.patch_size = vision.image_size[0], vision.patch_size[0]
        patches = (self.image_size // self.patch_size) ** 2
        self.conv1 = nn.Conv2d(
            vision.num_channels, width, self.patch_size, stride=self.patch_size, dtype=dtype
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, width, dtype=dtype))
        self.position_embeddings = nn.Parameter(torch.zeros(1, patches + 1, width, dtype=dtype))
        self.decoder = TransformerBlock(
            transformer,
            vision_block(vision.num_hidden_layers, query_key_norm=vision.use_qk_norm),
            pre_process=True,
            post_process=False,
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Patch features [tiles, patches, width] of pixel values [tiles, 3, S, S].

        Raises:
            ValueError: the tiles are not squares of an even number of patches.
        """
        height, width = pixel_values.shape[-2:]
        if height != width or height % (2 * self.patch_size):
            raise ValueError(
                f"tiles of {height} x {width} pixels; they must be square and a multiple of "
                f"{2 * self.patch_size}"
            )
        patches = self.conv1(pixel_values.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], 1)
        tokens = tokens + self._positions(height // self.patch_size)
        hidden = self.decoder(tokens.transpose(0, 1).contiguous(), None)
        return hidden.transpose(0, 1)[:, 1:]

    def _positions(self, side: int) -> Tensor:
        """Position embeddings [1, 1 + side * side, width], interpolated to another tile size."""
        trained = self.image_size // self.patch_size
        if side == trained:
            return self.position_embeddings
        first, grid = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        grid = grid.float().view(1, trained, trained, -1).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        return torch.cat([first, grid.flatten(2).transpose(1, 2).to(first.dtype)], 1)

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """The tower is whole on the first stage and receives nothing."""


def pixel_shuffle(features: Tensor) -> Tensor:
    """Four neighboring patches become one token: [tiles, n, c] to [tiles, n / 4, 4 c]."""
    tiles, patches, width = features.shape
    half = isqrt(patches) // 2
    squares = features.reshape(tiles, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5)
    return squares.reshape(tiles, half * half, 4 * width)


class Connector(MegatronModule):
    """Layer norm, linear, GELU, linear: image features in the language model's width."""

    def __init__(self, config: InternVLConfig, options: ModelOptions) -> None:
        transformer = connector_transformer(config, options)
        super().__init__(config=transformer)
        width = 4 * towers(config)[0].hidden_size
        self.norm = nn.LayerNorm(width, dtype=options.dtype)
        self.encoder = MLP(
            transformer,
            mlp_submodules(),
            input_size=width,
            ffn_hidden_size=transformer.ffn_hidden_size,
        )

    def forward(self, features: Tensor) -> Tensor:
        """[tiles, n, H] of pixel-shuffled features [tiles, n, 4 x vision width]."""
        hidden, bias = self.encoder(self.norm(features))
        return hidden + bias


def clear_padded_heads(tower: InternViT, heads: int) -> None:
    """Zero the weights of heads beyond the first `heads`; they then stay zero in training.

    Their queries, keys and values are zero, so the attention output and with it the gradient of
    the projection is zero; the projection is zero, so every other gradient is.
    """
    for layer in tower.decoder.layers:
        attention = layer.self_attention
        local = attention.num_attention_heads_per_partition
        first = torch.distributed.get_rank(attention.tp_group) * local
        padded = slice(max(0, min(local, heads - first)), local)
        by_rows = [attention.linear_qkv.weight, attention.linear_qkv.bias]
        if attention.q_layernorm is not None:
            by_rows += [attention.q_layernorm.weight, attention.k_layernorm.weight]
        for parameter in by_rows:
            if parameter is not None:
                parameter.data.view(local, -1)[padded].zero_()
        projection = attention.linear_proj.weight.data
        projection.view(len(projection), local, -1)[:, padded].zero_()
