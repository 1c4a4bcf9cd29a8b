"""The numbers of a configuration that the shapes of its weights are made of."""

from dataclasses import dataclass
from typing import Any

from transformers import InternVLConfig


@dataclass(frozen=True)
class Sizes:
    """The numbers of a configuration that shapes are made of; `Rule.shapes` names its fields."""

    vision_layers: int
    vision: int
    vision_heads: int
    vision_ffn: int
    vision_positions: int
    channels: int
    patch_height: int
    patch_width: int
    vision_qkv_bias: bool
    vision_qk_norm: bool
    vision_norm_bias: bool
    shuffled: int
    layers: int
    text: int
    text_queries: int
    text_keys: int
    text_groups: int
    text_ffn: int
    vocabulary: int
    tied: bool
    one: int = 1

    @classmethod
    def of(cls, config: InternVLConfig) -> "Sizes":
        """Read a configuration.

        Raises:
            ValueError: the configuration describes a model that this table does not cover.
        """
        vision: Any = config.vision_config
        text: Any = config.text_config
        _require("text_config.model_type", text.model_type, "qwen2")
        _require("vision_config.use_mean_pooling", vision.use_mean_pooling, True)
        _require("vision_config.use_mask_token", vision.use_mask_token, False)
        absolute = vision.use_absolute_position_embeddings
        _require("vision_config.use_absolute_position_embeddings", absolute, True)
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        (height, width), (patch_height, patch_width) = vision.image_size, vision.patch_size
        return cls(
            vision_layers=vision.num_hidden_layers,
            vision=vision.hidden_size,
            vision_heads=vision.num_attention_heads,
            vision_ffn=vision.intermediate_size,
            vision_positions=(height // patch_height) * (width // patch_width) + 1,
            channels=vision.num_channels,
            patch_height=patch_height,
            patch_width=patch_width,
            vision_qkv_bias=vision.attention_bias,
            vision_qk_norm=vision.use_qk_norm,
            vision_norm_bias=vision.norm_type == "layer_norm",
            shuffled=vision.hidden_size * int(1 / config.downsample_ratio) ** 2,
            layers=text.num_hidden_layers,
            text=text.hidden_size,
            text_queries=text.num_attention_heads * head,
            text_keys=text.num_key_value_heads * head,
            text_groups=text.num_key_value_heads,
            text_ffn=text.intermediate_size,
            vocabulary=text.vocab_size,
            tied=config.tie_word_embeddings,
        )


def _require(field: str, found: object, needed: object) -> None:
    if found != needed:
        raise ValueError(f"config {field} is {found!r}; conversion knows {needed!r} only")
