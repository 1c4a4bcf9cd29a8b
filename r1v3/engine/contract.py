"""What an engine is: the batch it takes and the calls a trainer makes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """P prompts with G responses each; row p * G + g of the responses answers prompt p.

    Attributes:
        prompt_ids: int64 [P, L], padded on the left.
        prompt_mask: bool [P, L], True at real tokens.
        pixel_values: float32 [tiles, 3, S, S] of all prompts in order, or None (text only).
        tiles: int64 [P], tiles of each prompt.
        response_ids: int64 [P * G, R], padded on the right.
        loss_mask: bool [P * G, R], True at response tokens that count.
        group_size: G. The samples of one prompt share its image and its keys and values.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    pixel_values: Tensor | None
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

    def slice(self, start: int, stop: int) -> "Batch":
        """Prompts start to stop with their responses, trimmed to the longest of each."""
        g = self.group_size
        rows = slice(start * g, stop * g)
        # Up to the last token that counts; tokens before it are context, whether they count or not.
        counting = self.loss_mask[rows].any(0).nonzero()
        longest = int(counting.amax()) + 1 if len(counting) else 0
        first = int(self.prompt_mask[start:stop].long().argmax(1).amin())
        before = int(self.tiles[:start].sum())
        here = int(self.tiles[start:stop].sum())
        return replace(
            self,
            prompt_ids=self.prompt_ids[start:stop, first:],
            prompt_mask=self.prompt_mask[start:stop, first:],
            pixel_values=None
            if self.pixel_values is None or not here
            else self.pixel_values[before : before + here],
            tiles=self.tiles[start:stop],
            response_ids=self.response_ids[rows, :longest],
            loss_mask=self.loss_mask[rows, :longest],
        )


# loss_fn(logprobs [N, R], entropy [N, R], index of the micro-batch) -> scalar loss, already divided
# by the global normaliser, so that micro-batch losses add up to the step's loss.
LossFn = Callable[[Tensor, Tensor, int], Tensor]


class Engine(Protocol):
    """One model with its optimizer, wherever it runs."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probs of the response tokens and entropies of the distributions that emitted them.

        Returns:
            (logprobs, entropy), float32 [P * G, R] in nats; 0 where the mask is False.
        """
        ...

    def train_step(
        self, micro_batches: Sequence[Batch], loss_fn: LossFn, *, learning_rate: float
    ) -> dict[str, float]:
        """One optimizer step; returns loss and gradient norms (total before clipping, per part)."""
        ...

    def export_hf(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its HF-native name."""
        ...

    def save(self, directory: Path) -> None:
        """Write a model folder that transformers loads."""
        ...
