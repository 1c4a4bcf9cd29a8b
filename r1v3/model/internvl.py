"""InternVL shaped like the 38B, in any size: building, loading, and its three parts."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration

from r1v3.model.conversion import Checkpoint, load_config, weights
from r1v3.model.conversion.match import require_match
from r1v3.model.parts import PARTS, part_of


def internvl_config(
    *,
    vocab_size: int,
    image_token_id: int,
    image_size: int,
    patch_size: int,
    vision: Mapping[str, int],
    text: Mapping[str, int],
    rope_theta: float = 1e6,
) -> InternVLConfig:
    """A configuration with the 38B's architecture in the given size.

    InternViT with RMS norm, QK norm over the whole width, layer scale and no final norm; pixel
    shuffle by 2; Qwen2 with QKV bias, grouped-query attention and an untied head. `vision` and
    `text` take transformers' names (hidden_size, num_hidden_layers, num_attention_heads,
    intermediate_size; and num_key_value_heads, max_position_embeddings for the text). The 38B has
    a `rope_theta` of 1e6; short contexts want less.
    """
    side = image_size // patch_size
    if image_size % patch_size or side % 2:
        raise ValueError(
            f"image size {image_size} must be an even multiple of the patch size {patch_size}"
        )
    return InternVLConfig(
        vision_config={
            "image_size": [image_size, image_size],
            "patch_size": [patch_size, patch_size],
            "norm_type": "rms_norm",
            "use_qk_norm": True,
            "attention_bias": False,
            "layer_scale_init_value": 1.0,
            **vision,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": vocab_size,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
            "rms_norm_eps": 1e-6,
            **text,
        },
        image_token_id=image_token_id,
        image_seq_length=(side // 2) ** 2,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def build_model(
    config: InternVLConfig, seed: int, *, device: str = "cpu"
) -> InternVLForConditionalGeneration:
    """A randomly initialized model; matrices are scaled by fan-in, as small models need."""
    generator = torch.Generator().manual_seed(seed)
    config._attn_implementation = "sdpa"
    model = InternVLForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or "cls_token" in name:
            continue
        embedding = "embed" in name or "lm_head" in name
        fan_in = parameter[0].numel()
        std = 0.02 if embedding and "projection" not in name else 0.7 * fan_in**-0.5
        nn.init.normal_(parameter, std=std, generator=generator)
    nn.Module.to(model, device=torch.device(device), dtype=torch.float32)
    return model


def load_model(
    directory: Path | str, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> InternVLForConditionalGeneration:
    """Load a model folder (config.json and safetensors) into memory.

    The weights may be in one file or in shards, under native or original names; see
    `r1v3.model.conversion`.

    Raises:
        ValueError: a file is missing, cut short or does not fit the configuration; the message
            names it and all tensors that are wrong.
    """
    config = load_config(directory)
    config._attn_implementation = "sdpa"
    try:
        model = InternVLForConditionalGeneration(config)
    except Exception as error:  # transformers raises many types on values it cannot use
        raise ValueError(f"{Path(directory) / 'config.json'} cannot be used: {error}") from error
    nn.Module.to(model, device=torch.device(device), dtype=dtype)
    with Checkpoint(directory) as checkpoint, torch.no_grad():
        sources, _ = require_match(checkpoint, weights(config))
        for name, parameter in model.named_parameters():
            source = sources[name]
            checkpoint.copy_into(parameter, source.stored.name, start=source.row)
    return model


def named_part_parameters(
    model: InternVLForConditionalGeneration,
) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(name, part, parameter) of every parameter."""
    for name, parameter in model.named_parameters():
        yield name, part_of(name), parameter


def count_parameters(model: InternVLForConditionalGeneration) -> dict[str, int]:
    """Number of parameters of each part."""
    counts = dict.fromkeys(PARTS, 0)
    for _, part, parameter in named_part_parameters(model):
        counts[part] += parameter.numel()
    return counts


def image_features(model: InternVLForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Connector outputs [tiles, tokens per tile, H] of pixel values [tiles, 3, S, S]."""
    return model.model.get_image_features(pixel_values=pixel_values).pooler_output


def embed_prompts(
    model: InternVLForConditionalGeneration, prompt_ids: Tensor, features: Tensor | None
) -> Tensor:
    """Input embeddings [P, L, H] of prompts, with image features put at the image tokens.

    Image positions come from the prompt alone; responses are embedded as text whatever they hold.

    Raises:
        ValueError: the prompts have more or fewer image tokens than there are features.
    """
    embeddings = model.get_input_embeddings()(prompt_ids)
    slots = prompt_ids == model.config.image_token_id
    available = 0 if features is None else features.shape[:-1].numel()
    if int(slots.sum()) != available:
        raise ValueError(
            f"prompts have {int(slots.sum())} image tokens for {available} image features"
        )
    if features is None:
        return embeddings
    return embeddings.masked_scatter(slots.unsqueeze(-1), features.to(embeddings.dtype))
