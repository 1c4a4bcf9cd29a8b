"""The files of a native model folder that transformers' processor and vLLM read beside its weights.

vLLM 0.32 takes a folder whose config.json names no architecture for an embedding model, cuts
pictures as preprocessor_config.json says (transformers' own numbers are CLIP's), and asks the
tokenizer by attribute which of its tokens stand for pictures and videos.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1v3.data.encoding import model_image_shape
from r1v3.data.images import IMAGENET_MEAN, IMAGENET_STD
from r1v3.data.special_tokens import IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from r1v3.files import write_json
from r1v3.model.conversion.config import ARCHITECTURE, added_tokens, load_config, read_config

_BICUBIC = 3  # PIL's number
# A token that the processor must have for videos: InternVL's for them, or one that nothing uses.
_VIDEO_TOKENS = ("<video>", "<quad>")


def write_serving_files(folder: Path) -> None:
    """Complete a native model folder, so that vLLM serves it as it is.

    config.json gets its architecture, tokenizer_config.json the names of the tokens of pictures,
    and the files of transformers' processors are written with the model's tiles, whatever they
    were before.

    Raises:
        ValueError: config.json is missing or unusable.
        OSError: writing failed.
    """
    written = read_config(folder)
    if not written.get("architectures"):
        write_json(folder / "config.json", {**written, "architectures": [ARCHITECTURE]})
    for name, content in _processor_files(folder).items():
        write_json(folder / name, content)
    _name_picture_tokens(folder)


def _processor_files(folder: Path) -> Mapping[str, Any]:
    """The files of InternVLProcessor and of its processors of images and videos."""
    config = load_config(folder)
    shape = model_image_shape(config)
    picture = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "processor_class": "InternVLProcessor",
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"height": shape.tile_size, "width": shape.tile_size},
    }
    tiles = {
        "crop_to_patches": True,
        "min_patches": shape.min_tiles,
        "max_patches": shape.max_tiles,
    }
    image = {"image_processor_type": "GotOcr2ImageProcessor", **tiles, **picture}
    video = {"video_processor_type": "InternVLVideoProcessor", **picture}
    whole = {"image_seq_length": shape.tokens_per_tile, "processor_class": "InternVLProcessor"}
    return {
        "preprocessor_config.json": image,
        "video_preprocessor_config.json": video,
        "processor_config.json": whole,
    }


def _name_picture_tokens(folder: Path) -> None:
    """Name the tokens that the vocabulary has; other tokenizers stay as they are."""
    file, held = folder / "tokenizer_config.json", added_tokens(folder)
    video = next((token for token in _VIDEO_TOKENS if token in held), None)
    names = {
        "start_image_token": IMAGE_START,
        "end_image_token": IMAGE_END,
        "context_image_token": IMAGE_CONTEXT,
        "video_token": video,
    }
    if all(token in held for token in names.values()) and file.is_file():
        write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **names})
