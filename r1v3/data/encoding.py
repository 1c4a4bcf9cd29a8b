"""From samples to tensors: token ids, pixel values and left-padded batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import InternVLConfig, PreTrainedTokenizerFast

from r1v3.config import DEFAULT_PICTURES, Pictures
from r1v3.cores import cores_of_rank
from r1v3.data.batch import Batch, Tiles
from r1v3.data.images import TruncatedImage
from r1v3.data.sample import IMAGE_PLACEHOLDER, Sample
from r1v3.data.special_tokens import SPECIAL_TOKENS, TURN_END
from r1v3.data.tiles import ImageShape, PictureTiles, TileCache
from r1v3.data.tokenizer import render_prompt, token_id
from r1v3.progress import say
from r1v3.ranks import ALONE, Ranks


def _tiling_fields(config: InternVLConfig) -> dict[str, Any]:
    """Where a model's configuration keeps InternVL's fields of tiling; writes go there too."""
    fields: dict[str, Any] = getattr(config, "original_config", None) or vars(config)
    return fields


def model_image_shape(
    config: InternVLConfig, max_tiles: int | None = None, pictures: Pictures = DEFAULT_PICTURES
) -> ImageShape:
    """The tiling that a model was trained with.

    From config.json, in either layout: `max_dynamic_patch`, `min_dynamic_patch`, `use_thumbnail`
    and `dynamic_image_size`. Without `max_dynamic_patch` a picture is one tile.

    Args:
        max_tiles: in place of the model's own number.

    Raises:
        ValueError: a field is not a whole number of at least 1, or the bounds contradict.
    """
    fields, vision = _tiling_fields(config), cast(Any, config.vision_config)
    most, least = fields.get("max_dynamic_patch", 1), fields.get("min_dynamic_patch", 1)
    for name, value in {"max_dynamic_patch": most, "min_dynamic_patch": least}.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"config.json: {name} is {value!r}; it must be a number from 1 on")
    if not fields.get("dynamic_image_size", True):
        most = least = 1
    if max_tiles is not None:
        most, least = max_tiles, min(least, max_tiles)
    if least > most:
        raise ValueError(
            f"config.json: min_dynamic_patch {least} is above max_dynamic_patch {most}"
        )
    thumbnail = bool(fields.get("use_thumbnail", True))
    return ImageShape(
        vision.image_size[0], most, config.image_seq_length, least, thumbnail, pictures
    )


def record_max_tiles(config: InternVLConfig, max_tiles: int) -> None:
    """Make `max_tiles` the model's own number: its config.json says what it was trained with."""
    if model_image_shape(config).max_tiles != max_tiles:
        _tiling_fields(config).update(max_dynamic_patch=max_tiles, dynamic_image_size=True)


def share_tiles(shape: ImageShape, pictures: int, budget: int | None) -> ImageShape:
    """The shape for a prompt of several pictures, whose tiles together are at most `budget`.

    Thumbnails are not counted, and every picture has a tile. None takes the shape's `max_tiles`.
    """
    tiles = min(shape.max_tiles, max(1, (budget or shape.max_tiles) // max(pictures, 1)))
    return replace(shape, max_tiles=tiles, min_tiles=min(shape.min_tiles, tiles))


def escape(text: str) -> str:
    """Text in which special tokens stand as text: `<img>` becomes `< img>`."""
    for literal in (IMAGE_PLACEHOLDER, *SPECIAL_TOKENS):
        text = text.replace(literal, f"< {literal[1:]}")
    return text


@dataclass(frozen=True)
class Example:
    """One encoded sample; `tiles` uint8 [n, S, S, 3], `response_ids` empty when there is none."""

    prompt_ids: tuple[int, ...]
    tiles: Tiles
    response_ids: tuple[int, ...] = ()


def encode_sample(
    sample: Sample,
    tokenizer: PreTrainedTokenizerFast,
    shape: ImageShape,
    *,
    thinking: bool = True,
    name: str = "",
    cache: TileCache | None = None,
) -> Example:
    """Encode prompt and, where there is one, the response with its end-of-turn token.

    Of the pictures only the headers are read, which say how many tiles there will be. The thinking
    template already opens `<think>`, so an opening tag in the response is dropped.

    Args:
        name: of the sample, for errors of its tiles.
        cache: where its tiles are kept.

    Raises:
        TruncatedImage: the file of a picture ends within its header.
        ValueError: as `upright_size` and `render_prompt`, or the response contains a special token.
    """
    tiles = PictureTiles(sample.images, shape, name=name, cache=cache)
    tokens = [count * shape.tokens_per_tile for count in tiles.counts]
    prompt = encode_prompt(sample, tokenizer, tokens, thinking=thinking)
    return Example(tuple(prompt), tiles, encode_response(sample, tokenizer, thinking=thinking))


def verify(example: Example) -> None:
    """Read all data of the pictures; raises as `PictureTiles.verify`."""
    if isinstance(example.tiles, PictureTiles):
        example.tiles.verify()


def encode_prompt(
    sample: Sample,
    tokenizer: PreTrainedTokenizerFast,
    image_tokens: list[int],
    *,
    thinking: bool = True,
) -> list[int]:
    """Encode the prompt, whose pictures take so many tokens each; raises as `render_prompt`."""
    messages = [{"role": m["role"], "content": m["content"]} for m in sample.prompt]
    return render_prompt(tokenizer, messages, image_tokens, thinking=thinking)


def encode_response(
    sample: Sample, tokenizer: PreTrainedTokenizerFast, *, thinking: bool = True
) -> tuple[int, ...]:
    """Encode the response with its end-of-turn token, where there is one; see `encode_sample`.

    Raises:
        ValueError: the response contains a special token.
    """
    text = sample.response
    if text is None:
        return ()
    if smuggled := [token for token in SPECIAL_TOKENS if token in text]:
        raise ValueError(f"the response contains the special token {smuggled[0]}")
    if thinking:
        text = text.removeprefix("<think>").removeprefix("\n")
    ids = tokenizer.encode(text, add_special_tokens=False)
    return (*ids, token_id(tokenizer, TURN_END))


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
    counts = [len(e.tiles) for e in examples]
    return Batch(
        prompt_ids,
        prompt_mask,
        tuple(e.tiles for e in examples) if any(counts) else None,
        torch.tensor(counts),
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
    path: Path,
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerFast,
    shape: ImageShape,
    *,
    thinking: Callable[[Sample], bool] = lambda sample: True,
    ranks: Ranks = ALONE,
    cache: TileCache | None = None,
) -> dict[int, Example]:
    """Encode the samples of a file, by row; without truncated pictures where the shape skips them.

    All data of every picture is read once, a part of the rows by each rank, so that a picture that
    cannot be decoded is told now and not in the midst of a stage.

    Args:
        thinking: whether a sample's prompt opens a thought.
        ranks: processes that all encode these samples.
        cache: where their tiles are kept.

    Raises:
        ValueError: as `encode_sample` and `PictureTiles.verify`, of the first such row, with the
            file and the row in front; or no sample is left.
    """
    examples: dict[int, Example] = {}
    failures: dict[int, ValueError] = {}
    for row, sample in enumerate(samples):
        name = f"{path} row {row}"
        try:
            examples[row] = encode_sample(
                sample, tokenizer, shape, thinking=thinking(sample), name=name, cache=cache
            )
        except ValueError as error:
            failures[row] = error
            if _is_fatal(error, shape):
                break
    failures |= _verify_all(examples, shape, ranks)
    for row in sorted(failures):
        if _is_fatal(failures[row], shape):
            with in_row(path, row):
                raise failures[row]
        examples.pop(row, None)
    if failures:
        told = f"{len(failures)} of {len(samples)} samples of {path} have a truncated picture"
        if not examples:
            raise ValueError(f"{told}; none is left")
        say(f"{told} and are left out", shown=ranks.is_main)
    return examples


def _is_fatal(error: ValueError, shape: ImageShape) -> bool:
    return not isinstance(error, TruncatedImage) or shape.pictures.truncated != "skip"


def _verify_all(
    examples: Mapping[int, Example], shape: ImageShape, ranks: Ranks
) -> dict[int, ValueError]:
    """Verify the pictures of rows, up to a fatal error; return the errors by row.

    Decoders work outside of Python's lock, so a rank's rows are divided among threads.
    """
    found: dict[int, ValueError] = {}

    def check(row: int) -> None:
        if any(first < row and _is_fatal(found[first], shape) for first in list(found)):
            return
        try:
            verify(examples[row])
        except ValueError as error:
            found[row] = error

    rows = list(examples)[ranks.rank :: ranks.size]
    with ThreadPoolExecutor(cores_of_rank()) as pool:
        list(pool.map(check, rows))
    return {row: error for one in ranks.gather(found) for row, error in one.items()}
