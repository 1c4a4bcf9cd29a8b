"""A model folder against all that vLLM 0.32 reads of it, without vLLM."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from r1v3.data.encoding import model_image_shape
from r1v3.data.images import normalize
from r1v3.model.conversion import load_config

# Two pictures that are cut into whole tiles, and one that is resized.
SIZES = ((32, 32), (64, 32), (50, 41))


def assert_served(folder: Path, *, max_tiles: int) -> None:
    """Hold architecture, processors, tokens, tiles and pixels against the model's own."""
    assert AutoConfig.from_pretrained(folder).architectures == ["InternVLForConditionalGeneration"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    marks = [tokenizer.start_image_token, tokenizer.context_image_token, tokenizer.end_image_token]
    assert marks == ["<img>", "<IMG_CONTEXT>", "</img>"]
    ids = [tokenizer.convert_tokens_to_ids(mark) for mark in (*marks, tokenizer.video_token)]
    assert len(set(ids)) == 4 and max(ids) < load_config(folder).text_config.vocab_size
    processor = json.loads((folder / "processor_config.json").read_text())
    shape = model_image_shape(load_config(folder))
    assert processor["image_seq_length"] == shape.tokens_per_tile and shape.max_tiles == max_tiles
    assert processor["processor_class"] == "InternVLProcessor"
    cut = AutoImageProcessor.from_pretrained(folder)
    for width, height in SIZES:
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        theirs = cut(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        ours = normalize(np.stack(shape.cut(file.getvalue())))
        assert torch.allclose(theirs, ours, atol=1e-5), (width, height)
