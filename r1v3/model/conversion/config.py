"""config.json in both layouts: InternVLChatConfig (remote code) and InternVLConfig (transformers).

The two describe one architecture in different words. Fields of the original that the native one
has no word for (chat template, tiling, drop path, what the Qwen2 config was saved with) are kept in
the native file under `original_config` and come back in the other direction.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import InternVLConfig

from r1v3.files import read_json_object

Json = dict[str, Any]

ARCHITECTURE = "InternVLForConditionalGeneration"
KEPT = "original_config"
IMAGE_TOKEN = "<IMG_CONTEXT>"
# Original name, native name, and the value that the remote code's class has when it is not written.
_VISION = (
    ("hidden_size", "hidden_size", 3200),
    ("intermediate_size", "intermediate_size", 12800),
    ("num_hidden_layers", "num_hidden_layers", 48),
    ("num_attention_heads", "num_attention_heads", 25),
    ("num_channels", "num_channels", 3),
    ("image_size", "image_size", 224),
    ("patch_size", "patch_size", 14),
    ("hidden_act", "hidden_act", "gelu"),
    ("norm_type", "norm_type", "rms_norm"),
    ("layer_norm_eps", "layer_norm_eps", 1e-6),
    ("qkv_bias", "attention_bias", False),
    ("qk_normalization", "use_qk_norm", True),
    ("dropout", "hidden_dropout_prob", 0.0),
    ("attention_dropout", "attention_dropout", 0.0),
    ("initializer_range", "initializer_range", 0.02),
    ("initializer_factor", "layer_scale_init_value", 0.1),
)
_PAIRS = ("image_size", "patch_size")  # one number in the original, [height, width] in the native
# Fields of Qwen2Config that mean the same in both; a missing one has the same default.
_TEXT = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
)
_TOP = (
    ("downsample_ratio", "downsample_ratio", 0.5),
    ("select_layer", "vision_feature_layer", -1),
)
# Fields of tiling, which a native file may hold as well.
_TILING = ("max_dynamic_patch", "min_dynamic_patch", "use_thumbnail", "dynamic_image_size")
_DEFAULT_ORIGINAL: Json = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
    },
    "dynamic_image_size": True,
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "model_type": "internvl_chat",
    "pad2square": False,
    "ps_version": "v2",
    "template": "internvl2_5",
    "use_thumbnail": True,
    "vision_config": {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b"},
    "llm_config": {"architectures": ["Qwen2ForCausalLM"]},
}


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is the remote code's; the native one is recognized by its model type.

    Raises:
        ValueError: it is neither.
    """
    if config.get("model_type") == "internvl":
        return False
    if "llm_config" in config and "vision_config" in config:
        return True
    raise ValueError(
        f"config.json has model_type {config.get('model_type')!r}; it is neither 'internvl' nor "
        "an InternVLChatConfig (with vision_config and llm_config)"
    )


def to_native(original: Mapping[str, Any], image_token_id: int) -> Json:
    """The InternVLConfig of an InternVLChatConfig.

    Args:
        image_token_id: of <IMG_CONTEXT>; the original has it in its tokenizer only.
    Raises:
        ValueError: the original is a model that `InternVLForConditionalGeneration` is not.
    """
    rest: Json = copy.deepcopy(dict(original))
    vision, text = rest.pop("vision_config"), rest.pop("llm_config")
    _require("llm_config.model_type", text.get("model_type"), "qwen2")
    _require("ps_version", rest.get("ps_version", "v1"), "v2")
    native_vision: Json = {
        native: vision.pop(name, default) for name, native, default in _VISION
    } | {"model_type": "internvl_vision", "use_mean_pooling": True}
    if native_vision["use_qk_norm"]:
        _require("vision_config.layer_norm_eps", native_vision["layer_norm_eps"], 1e-6)
    side = rest.get("force_image_size") or native_vision["image_size"]
    for field in _PAIRS:
        native_vision[field] = [native_vision[field]] * 2
    tied = bool(text.get("tie_word_embeddings", rest.get("tie_word_embeddings", False)))
    native_text: Json = {field: text.pop(field) for field in _TEXT if field in text}
    native_text |= {
        "model_type": text.pop("model_type"),
        "tie_word_embeddings": tied,
        "rope_parameters": _rope_parameters(text),
    }
    for derived in ("tie_word_embeddings", "image_token_id"):
        rest.pop(derived, None)
    native: Json = {new: rest.pop(old, default) for old, new, default in _TOP}
    cells = round(side // native_vision["patch_size"][0] * native["downsample_ratio"])
    dtype = rest.pop("torch_dtype", None) or rest.pop("dtype", None)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "internvl",
        **({"dtype": dtype} if dtype else {}),
        "image_seq_length": cells**2,
        "image_token_id": image_token_id,
        "projector_hidden_act": "gelu",
        "text_config": native_text,
        "tie_word_embeddings": tied,
        "vision_config": native_vision,
        "vision_feature_select_strategy": "default",
        **native,
        KEPT: {**rest, "vision_config": vision, "llm_config": text},
    }


def to_original(native: Mapping[str, Any]) -> Json:
    """The InternVLChatConfig of an InternVLConfig; fields that it came with are restored.

    A model that never was in the original layout gets InternVL3's defaults for those.

    Raises:
        ValueError: the native one is a model that the remote code is not.
    """
    vision, text = dict(native["vision_config"]), dict(native["text_config"])
    _require("text_config.model_type", text.get("model_type"), "qwen2")
    _require("projector_hidden_act", native.get("projector_hidden_act", "gelu"), "gelu")
    strategy = native.get("vision_feature_select_strategy", "default")
    _require("vision_feature_select_strategy", strategy, "default")
    kept: Json = copy.deepcopy(native.get(KEPT) or _DEFAULT_ORIGINAL)
    for field in _PAIRS:
        if isinstance(vision[field], list):
            height, width = vision[field]
            _require(f"vision_config.{field}", [height, width], [height, height])
            vision[field] = height
    kept["vision_config"] |= {
        name: vision[native] for name, native, _ in _VISION if native in vision
    }
    kept["llm_config"] |= {field: text[field] for field in _TEXT if field in text}
    kept["llm_config"] |= {"model_type": "qwen2"} | _rope_fields(text)
    kept |= {old: native.get(new, default) for old, new, default in _TOP}
    kept |= {field: native[field] for field in _TILING if field in native}
    if KEPT not in native:
        kept["image_token_id"] = native["image_token_id"]
    if dtype := native.get("dtype") or native.get("torch_dtype"):
        kept["torch_dtype"] = dtype
    kept.setdefault("force_image_size", vision["image_size"])
    kept["tie_word_embeddings"] = bool(native.get("tie_word_embeddings", False))
    return kept


def _require(field: str, found: object, needed: object) -> None:
    if found != needed:
        raise ValueError(f"config.json: {field} is {found!r}; conversion knows {needed!r} only")


def _rope_parameters(text: Json) -> Json:
    """transformers 5 has theta and scaling in one field; takes both out of `text`."""
    if written := text.pop("rope_parameters", None):
        return written
    scaling = dict(text.pop("rope_scaling", None) or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    return {"rope_type": kind, "rope_theta": text.pop("rope_theta", 10000.0), **scaling}


def _rope_fields(text: Mapping[str, Any]) -> Json:
    parameters = dict(text.get("rope_parameters") or {})
    theta = parameters.pop("rope_theta", text.get("rope_theta", 10000.0))
    kind = parameters.pop("rope_type", "default")
    scaling = None if kind == "default" else {"type": kind, "rope_type": kind, **parameters}
    return {"rope_theta": theta, "rope_scaling": scaling}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        ValueError: it is missing or no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"model folder {folder} has no config.json")
    try:
        return read_json_object(file)
    except ValueError as error:
        raise ValueError(f"{file} cannot be used: {error}") from error


def native_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder in either layout, as that of an InternVLConfig.

    Raises:
        ValueError: it is missing, damaged or describes another model; or the folder is in the
            original layout and no tokenizer file in it says which token <IMG_CONTEXT> is.
    """
    written = read_config(folder)
    try:
        if not is_original(written):
            return written
        return to_native(written, _image_token_id(folder, written))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{folder / 'config.json'} cannot be used: {reason}") from error


def load_config(folder: Path | str) -> InternVLConfig:
    """The configuration of a model folder in either layout.

    Where it says nothing of tiles and transformers' image processor does, the processor's numbers
    are added as `max_dynamic_patch` and `min_dynamic_patch`.

    Raises:
        ValueError: as `native_config`, or transformers refuses a value.
    """
    folder = Path(folder)
    native = native_config(folder)
    if "max_dynamic_patch" not in {**native, **(native.get(KEPT) or {})}:
        native = {**native, **_processor_tiles(folder)}
    try:
        return InternVLConfig.from_dict(native)
    except Exception as error:  # transformers raises many types on values it cannot use
        raise ValueError(f"{folder / 'config.json'} cannot be used: {error}") from error


def _processor_tiles(folder: Path) -> Json:
    """The numbers of tiles in a native model's preprocessor_config.json; none if it has none.

    The processor cuts tiles by default, whatever `crop_to_patches` in that file says.
    """
    try:
        written = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        most = written["max_patches"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {"max_dynamic_patch": most, "min_dynamic_patch": written.get("min_patches", 1)}


def _image_token_id(folder: Path, original: Mapping[str, Any]) -> int:
    """The id of <IMG_CONTEXT>, from config.json or the tokenizer's files."""
    if isinstance(known := original.get("image_token_id"), int):
        return known
    if (found := added_tokens(folder).get(IMAGE_TOKEN)) is not None:
        return found
    raise ValueError(
        f"no tokenizer file beside it says which token {IMAGE_TOKEN} is; copy the tokenizer of the "
        "model into the folder, or write image_token_id into config.json"
    )


def added_tokens(folder: Path) -> dict[str, int]:
    """The ids of the tokens that a model's tokenizer has beside its vocabulary.

    From the first of its files that has them; files that cannot be read are passed over.
    """
    for name, read in (
        ("added_tokens.json", lambda data: data),
        ("tokenizer.json", lambda data: {t["content"]: t["id"] for t in data["added_tokens"]}),
        (
            "tokenizer_config.json",
            lambda data: {t["content"]: i for i, t in data["added_tokens_decoder"].items()},
        ),
    ):
        try:
            found = read(json.loads((folder / name).read_text(encoding="utf-8")))
            if IMAGE_TOKEN in found:
                return {str(token): int(place) for token, place in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return {}
