"""Options of InternVL on megatron-core, and the configs that follow from them."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import InternVLConfig


@dataclass(frozen=True)
class ModelOptions:
    """Everything about the model that the checkpoint's config does not say.

    Attributes:
        dtype: of parameters, activations and what travels between pipeline stages.
        sequence_parallel: of the language model; the vision tower and the connector run without.
        first_stage_layers, last_stage_layers: language layers of those pipeline stages; None
            divides evenly. The first stage also holds the vision tower and the connector.
        recompute: "full" keeps only the input of every layer, of the vision tower too.
        head_multiple: vision heads are padded to a multiple of it (25 to 32), whatever the
            tensor-parallel size, so that stored shards fit every size that divides it. At 8 ranks
            the padding costs no time: the busiest rank has 4 of 25 heads either way.
        vocab_multiple: vocabulary rows are padded to a multiple of it, whatever the
            tensor-parallel size. 151,674 becomes 151,680, and a shard of 8 starts and ends on
            32 bytes.
    """

    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    recompute: Literal["none", "full"] = "none"
    head_multiple: int = 8
    vocab_multiple: int = 128

    def padded_heads(self, config: InternVLConfig) -> int:
        """Vision heads, padding included."""
        return _round_up(towers(config)[0].num_attention_heads, self.head_multiple)

    def padded_vocab(self, config: InternVLConfig) -> int:
        """Vocabulary rows, padding included."""
        return _round_up(towers(config)[1].vocab_size, self.vocab_multiple)


def towers(config: InternVLConfig) -> tuple[Any, Any]:
    """The configurations of the vision tower and of the language model."""
    return config.vision_config, config.text_config


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def check(config: InternVLConfig, options: ModelOptions) -> None:
    """Check that the model can be built and split so.

    Raises:
        ValueError: names the setting that this model does not support, or what does not divide.
    """
    vision, text = towers(config)
    for name, value, allowed in (
        ("text_config.model_type", text.model_type, ("qwen2",)),
        ("text_config.hidden_act", text.hidden_act, ("silu",)),
        ("vision_config.norm_type", vision.norm_type, ("rms_norm", "layer_norm")),
        ("vision_config.hidden_act", vision.hidden_act, ("gelu",)),
        ("vision_config.use_mean_pooling", vision.use_mean_pooling, (True,)),
        (
            "vision_config.use_absolute_position_embeddings",
            vision.use_absolute_position_embeddings,
            (True,),
        ),
        ("vision_config.use_mask_token", vision.use_mask_token, (False,)),
        ("vision_config.image_size", vision.image_size[1], (vision.image_size[0],)),
        ("projector_hidden_act", config.projector_hidden_act, ("gelu",)),
        ("vision_feature_layer", config.vision_feature_layer, (-1,)),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy, ("default",)),
        ("downsample_ratio", config.downsample_ratio, (0.5,)),
        ("recompute", options.recompute, ("none", "full")),
    ):
        if value not in allowed:
            expected = " or ".join(repr(one) for one in allowed)
            raise ValueError(f"{name} is {value!r}; this model needs {expected}")
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    groups = text.num_key_value_heads
    for name, number in (
        ("vision heads (padded by head_multiple)", options.padded_heads(config)),
        ("vision intermediate_size", vision.intermediate_size),
        ("language heads", text.num_attention_heads),
        ("language intermediate_size", text.intermediate_size),
        ("language hidden_size", text.hidden_size),
        ("vocabulary rows (padded by vocab_multiple)", options.padded_vocab(config)),
    ):
        if number % ranks:
            raise ValueError(f"{number} {name} cannot be split over {ranks} tensor-parallel ranks")
    if groups % ranks and ranks % groups:
        raise ValueError(
            f"{groups} key-value heads neither divide nor are divided by {ranks} tensor-parallel "
            "ranks"
        )
    _check_stages(text.num_hidden_layers, options)


def _check_stages(layers: int, options: ModelOptions) -> None:
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    given = [options.first_stage_layers, options.last_stage_layers]
    ends = [number for number in given if number is not None]
    rest, among = layers - sum(ends), stages - len(ends)
    if among < 0 or rest < 0 or (rest % among if among else rest):
        raise ValueError(
            f"{layers} language layers cannot be split over {stages} pipeline stages with "
            f"first_stage_layers={given[0]} and last_stage_layers={given[1]}: {rest} layers are "
            f"left for {among} stages"
        )


def _common(options: ModelOptions) -> dict[str, Any]:
    """Settings of all three configs: no dropout, and no fusion that needs CUDA extensions."""
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "params_dtype": options.dtype,
        "pipeline_dtype": options.dtype,
        "bf16": options.dtype == torch.bfloat16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
    }


def _recompute(options: ModelOptions) -> dict[str, Any]:
    if options.recompute == "none":
        return {}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }


def language_transformer(config: InternVLConfig, options: ModelOptions) -> TransformerConfig:
    """Qwen2: grouped queries, QKV bias, gated SiLU, RMS norm."""
    _, text = towers(config)
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.hidden_size // text.num_attention_heads,
        add_bias_linear=False,
        add_qkv_bias=True,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        pipeline_model_parallel_size=stages,
        num_layers_in_first_pipeline_stage=options.first_stage_layers,
        num_layers_in_last_pipeline_stage=options.last_stage_layers,
        sequence_parallel=options.sequence_parallel,
        # Packed micro-batches differ in length; the dispatcher is only named to allow that.
        variable_seq_lengths=stages > 1,
        moe_token_dispatcher_type="alltoall",
        **_common(options),
        **_recompute(options),
    )


def vision_transformer(config: InternVLConfig, options: ModelOptions) -> TransformerConfig:
    """InternViT with padded heads, all of it on the first pipeline stage."""
    vision, _ = towers(config)
    heads = options.padded_heads(config)
    return TransformerConfig(
        num_layers=vision.num_hidden_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=vision.hidden_size // vision.num_attention_heads,
        add_bias_linear=True,
        add_qkv_bias=vision.attention_bias,
        normalization="RMSNorm" if vision.norm_type == "rms_norm" else "LayerNorm",
        layernorm_epsilon=vision.layer_norm_eps,
        gated_linear_unit=False,
        activation_func=torch.nn.functional.gelu,
        **_common(options),
        **_recompute(options),
    )


def connector_transformer(config: InternVLConfig, options: ModelOptions) -> TransformerConfig:
    """The two linears of the connector; layers and heads are not used."""
    _, text = towers(config)
    return TransformerConfig(
        num_layers=1,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        add_bias_linear=True,
        gated_linear_unit=False,
        activation_func=torch.nn.functional.gelu,
        **_common(options),
    )
