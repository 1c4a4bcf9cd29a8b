"""Tiny InternVLs on disk in both layouts, and what Megatron's tensors have to be, by plain torch.

Nothing here reads the table under test: names are rewritten and weights fused by code of its own,
after OpenGVLab's InternVLChatModel and Megatron-core's documentation of its QKV layout.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedConfig

from r1v3.model.internvl import build_model, internvl_config

IMAGE_TOKEN_ID = 500
VISION_HEADS, KV_GROUPS = 5, 2


def tiny_config(**vision: object) -> InternVLConfig:
    """Five vision heads, two KV groups, 509 tokens: nothing divides evenly."""
    config = internvl_config(
        vocab_size=509,
        image_token_id=IMAGE_TOKEN_ID,
        image_size=32,
        patch_size=8,
        vision={
            "hidden_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": VISION_HEADS,
            "intermediate_size": 48,
        },
        text={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": KV_GROUPS,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
        },
    )
    for field, value in vision.items():
        setattr(config.vision_config, field, value)
    return config


def tiny_model(
    config: InternVLConfig | None = None, seed: int = 0
) -> InternVLForConditionalGeneration:
    """Every weight random, so that no two are interchangeable; float32."""
    model = build_model(config or tiny_config(), seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise + ("norm" in name and name.endswith("weight")))
    return model


_ORIGINAL_NAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^model\.multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^model\.vision_tower\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (
        r"^model\.vision_tower\.embeddings\.position_embeddings$",
        "vision_model.embeddings.position_embedding",
    ),
    (
        r"^model\.vision_tower\.embeddings\.patch_embeddings\.projection\.",
        "vision_model.embeddings.patch_embedding.",
    ),
    (r"^model\.vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".ls\1"),
)


def original_tensors(native: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under InternVLChatModel's names, its q, k and v stacked."""
    renamed = {}
    for name, tensor in native.items():
        for pattern, replacement in _ORIGINAL_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attn.q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        renamed[name.replace("q_proj", "qkv")] = torch.cat(parts)
    return renamed


def _original_text_config(text: PreTrainedConfig) -> dict[str, object]:
    return {
        "_name_or_path": "./pretrained/Qwen2.5-32B-Instruct",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "model_type": "qwen2",
        "moe_config": None,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": text.vocab_size,
    }


def original_config(model: InternVLForConditionalGeneration) -> dict[str, object]:
    """config.json as Skywork publishes it: with fields that no native config has."""
    vision, text = model.config.vision_config, model.config.text_config
    return {
        "_commit_hash": None,
        "architectures": ["SkyworkR1VChatModel"],
        "auto_map": {"AutoModel": "modeling_skywork_chat.SkyworkR1VChatModel"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size[0],
        "freeze_llm": False,
        "image_token_id": IMAGE_TOKEN_ID,
        "llm_config": _original_text_config(text),
        "max_dynamic_patch": 12,
        "model_type": "skywork_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "drop_path_rate": 0.4,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size[0],
            "initializer_factor": 0.1,
            "initializer_range": 1e-10,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": 1e-6,
            "model_type": "intern_vit_6b",
            "norm_type": vision.norm_type,
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": vision.patch_size[0],
            "qk_normalization": vision.use_qk_norm,
            "qkv_bias": vision.attention_bias,
            "use_flash_attn": True,
        },
    }


def parameters_of(model: InternVLForConditionalGeneration) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def write_original(model: InternVLForConditionalGeneration, folder: Path) -> Path:
    """A folder as the remote code's save_pretrained would leave it, in one file."""
    folder.mkdir(parents=True)
    tensors = {
        name: tensor.contiguous() for name, tensor in original_tensors(parameters_of(model)).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(original_config(model)))
    return folder


def write_native(
    model: InternVLForConditionalGeneration, folder: Path, shard: str = "30KB"
) -> Path:
    """A folder as transformers writes it, in several shards."""
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def fused_qkv(q: Tensor, k: Tensor, v: Tensor, groups: int, padded: int) -> Tensor:
    """Megatron's QKV: for each group its queries, its key, its value; then groups of zeros."""
    rows = [torch.cat([part.chunk(groups)[group] for part in (q, k, v)]) for group in range(groups)]
    return torch.cat(rows + [torch.zeros_like(rows[0])] * (padded - groups))


def megatron_shard(
    native: dict[str, Tensor], name: str, ranks: int, rank: int, padded_heads: int, rows: int
) -> Tensor | None:
    """Shard of Megatron weight `name` on rank `rank` of `ranks`; None: not written here.

    The weights whose layout is not simply that of the native tensor.
    """
    if matched := re.fullmatch(r"(vision|language)_model\.decoder\.layers\.(\d+)\.(.*)", name):
        vision, layer, kind = matched[1] == "vision", matched[2], matched[3]
        prefix = "model.vision_tower.encoder.layer." if vision else "model.language_model.layers."
        attention = f"{prefix}{layer}.{'attention' if vision else 'self_attn'}."
        if kind.startswith("self_attention.linear_qkv."):
            end = kind.rsplit(".", 1)[1]
            q, k, v = (native[f"{attention}{letter}_proj.{end}"] for letter in "qkv")
            groups = (VISION_HEADS, padded_heads) if vision else (KV_GROUPS, KV_GROUPS)
            return fused_qkv(q, k, v, *groups).chunk(ranks)[rank]
        if vision and kind == "self_attention.linear_proj.weight":
            whole = native[f"{attention}projection_layer.weight"]
            width = whole.shape[1] // VISION_HEADS
            zeros = whole.new_zeros(len(whole), (padded_heads - VISION_HEADS) * width)
            return torch.cat([whole, zeros], 1).chunk(ranks, 1)[rank]
        if not vision and kind == "mlp.linear_fc1.weight":
            gate, up = (native[f"{prefix}{layer}.mlp.{one}_proj.weight"] for one in ("gate", "up"))
            return torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]])
        if not vision and kind == "mlp.linear_fc2.weight":
            return native[f"{prefix}{layer}.mlp.down_proj.weight"].chunk(ranks, 1)[rank]
    if name == "language_model.output_layer.weight":
        head = native["lm_head.weight"]
        return torch.cat([head, head.new_zeros(rows - len(head), head.shape[1])]).chunk(ranks)[rank]
    return None
