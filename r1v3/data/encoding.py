"""From samples to tensors: token ids, pixel values and left-padded batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import InternVLConfig, PreTrainedTokenizerFast

from r1v3.data.batch import Batch
from r1v3.data.images import load_image, normalize, tile_image
from r1v3.data.sample import Sample
from r1v3.data.tokenizer import SPECIAL_TOKENS, TURN_END, render_prompt, token_id


@dataclass(frozen=True)
class ImageShape:
    """The tiling of pictures: tile size in pixels, most tiles, tokens per tile."""

    tile_size: int
    max_tiles: int
    tokens_per_tile: int


def model_image_shape(config: InternVLConfig, max_tiles: int) -> ImageShape:
    """The tiling that a model was trained with."""
    vision: Any = config.vision_config
    return ImageShape(vision.image_size[0], max_tiles, config.image_seq_length)


@dataclass(frozen=True)
class Example:
    """One encoded sample; `tiles` uint8 [n, S, S, 3], `response_ids` empty when there is none."""

    prompt_ids: tuple[int, ...]
    tiles: np.ndarray
    response_ids: tuple[int, ...] = ()


def encode_sample(
    sample: Sample,
    tokenizer: PreTrainedTokenizerFast,
    shape: ImageShape,
    *,
    thinking: bool = True,
) -> Example:
    """Encode prompt, pictures and, where there is one, the response with its end-of-turn token.

    The thinking template already opens `<think>`, so an opening tag in the response is dropped.

    Raises:
        ValueError: as `render_prompt`, or the response contains a special token.
    """
    tiles: list[np.ndarray] = []
    counts: list[int] = []
    for data in sample.images:
        cut = tile_image(load_image(data), tile_size=shape.tile_size, max_tiles=shape.max_tiles)
        counts.append(len(cut) * shape.tokens_per_tile)
        tiles.extend(np.asarray(tile) for tile in cut)
    messages = [{"role": m["role"], "content": m["content"]} for m in sample.prompt]
    prompt = render_prompt(tokenizer, messages, counts, thinking=thinking)
    response: tuple[int, ...] = ()
    if sample.response is not None:
        text = sample.response
        if smuggled := [token for token in SPECIAL_TOKENS if token in text]:
            raise ValueError(f"the response contains the special token {smuggled[0]}")
        if thinking:
            text = text.removeprefix("<think>").removeprefix("\n")
        ids = tokenizer.encode(text, add_special_tokens=False)
        response = (*ids, token_id(tokenizer, TURN_END))
    size = shape.tile_size
    stacked = np.stack(tiles) if tiles else np.zeros((0, size, size, 3), dtype=np.uint8)
    return Example(tuple(prompt), stacked, response)


def _pad(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(1, max((len(row) for row in rows), default=1))
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.int64)
        mask[i, where] = True
    return ids, mask


def collate(
    examples: Sequence[Example],
    pad_id: int,
    *,
    responses: Sequence[Sequence[int]] | None = None,
    group_size: int = 1,
) -> Batch:
    """Make a batch of prompts and responses: the examples' own, or G given ones per prompt."""
    given = [e.response_ids for e in examples] if responses is None else responses
    prompt_ids, prompt_mask = _pad([e.prompt_ids for e in examples], pad_id, left=True)
    response_ids, loss_mask = _pad(given, pad_id, left=False)
    tiles = np.concatenate([e.tiles for e in examples])
    return Batch(
        prompt_ids,
        prompt_mask,
        normalize(tiles) if len(tiles) else None,
        torch.tensor([len(e.tiles) for e in examples]),
        response_ids,
        loss_mask,
        group_size,
    )


@contextmanager
def in_row(path: Path, row: int) -> Iterator[None]:
    """Put file and row in front of the message of a ValueError raised within."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} row {row}: {error}") from error


def encode_all(
    path: Path, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerFast, shape: ImageShape
) -> list[Example]:
    """Encode the samples of a file.

    Raises:
        ValueError: as `encode_sample`, with the file and the row in front.
    """
    examples = []
    for row, sample in enumerate(samples):
        with in_row(path, row):
            examples.append(encode_sample(sample, tokenizer, shape))
    return examples
