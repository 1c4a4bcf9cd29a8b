"""Prompts and responses as tensors, the input of every engine."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r1v3.data.images import normalize
from r1v3.data.tiles import PictureTiles, TileCache

Tiles = np.ndarray | PictureTiles


@dataclass(frozen=True)
class Batch:
    """P prompts with G responses each; row p * G + g of the responses answers prompt p.

    Attributes:
        prompt_ids: int64 [P, L], padded on the left.
        prompt_mask: bool [P, L], True at real tokens.
        pixels: float32 [tiles, 3, S, S] of all prompts in order; or the tiles of each prompt, which
            `pixel_values` makes it of; or None (text only).
        tiles: int64 [P], tiles of each prompt.
        response_ids: int64 [P * G, R], padded on the right.
        loss_mask: bool [P * G, R], True at response tokens that count.
        group_size: G. The samples of one prompt share its image and its keys and values.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    pixels: Tensor | tuple[Tiles, ...] | None
    tiles: Tensor
    response_ids: Tensor
    loss_mask: Tensor
    group_size: int = 1

    def __post_init__(self) -> None:
        rows, prompts = len(self.response_ids), len(self.prompt_ids)
        if rows != prompts * self.group_size:
            raise ValueError(
                f"{rows} responses do not belong to {prompts} prompts x {self.group_size} samples"
            )
        if self.loss_mask.shape != self.response_ids.shape:
            raise ValueError(
                f"loss_mask {tuple(self.loss_mask.shape)} must have the shape of response_ids "
                f"{tuple(self.response_ids.shape)}"
            )

    @property
    def pixel_values(self) -> Tensor | None:
        """Pixels of all tiles, float32 [tiles, 3, S, S], cut now where they are not yet.

        Raises:
            ValueError: a picture can no longer be read; as `PictureTiles.cut`.
        """
        if self.pixels is None or isinstance(self.pixels, Tensor):
            return self.pixels
        return normalize(np.concatenate([np.asarray(tiles) for tiles in self.pixels if len(tiles)]))

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device, its tiles cut."""
        whole = replace(self, pixels=self.pixel_values)
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(whole)
            if isinstance(value := getattr(whole, field.name), Tensor)
        }
        return replace(whole, **moved)

    def input_lengths(self) -> Tensor:
        """Return the tokens of each response that are inputs, int64 [P * G].

        They end before the last token that counts, which is predicted and never an input.
        """
        columns = torch.arange(self.loss_mask.shape[1], device=self.loss_mask.device)
        counting = self.loss_mask * columns
        return torch.cat([counting, counting.new_zeros(len(counting), 1)], 1).amax(1)

    def slice(self, start: int, stop: int) -> "Batch":
        """Prompts start to stop with their responses, trimmed to the longest of each."""
        g = self.group_size
        rows = slice(start * g, stop * g)
        # Up to the last token that counts; tokens before it are context, whether they count or not.
        counting = self.loss_mask[rows].any(0).nonzero()
        longest = int(counting.amax()) + 1 if len(counting) else 0
        first = int(self.prompt_mask[start:stop].long().argmax(1).amin())
        pixels, here = self.pixels, int(self.tiles[start:stop].sum())
        if isinstance(pixels, Tensor):
            before = int(self.tiles[:start].sum())
            pixels = pixels[before : before + here]
        elif pixels is not None:
            pixels = pixels[start:stop]
        return replace(
            self,
            prompt_ids=self.prompt_ids[start:stop, first:],
            prompt_mask=self.prompt_mask[start:stop, first:],
            pixels=pixels if here else None,
            tiles=self.tiles[start:stop],
            response_ids=self.response_ids[rows, :longest],
            loss_mask=self.loss_mask[rows, :longest],
        )


def cut_ahead(batches: Iterable[Batch]) -> None:
    """Begin to cut the tiles of batches in the background, in this order."""
    by_cache: dict[TileCache, list[PictureTiles]] = {}
    for batch in batches:
        if isinstance(batch.pixels, tuple):
            for tiles in batch.pixels:
                if isinstance(tiles, PictureTiles) and tiles.cache is not None:
                    by_cache.setdefault(tiles.cache, []).append(tiles)
    for cache, coming in by_cache.items():
        cache.ahead(coming)
