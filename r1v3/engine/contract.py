"""What an engine is: the batch it takes and the calls a trainer makes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import InternVLConfig, PreTrainedTokenizerFast

from r1v3.engine.head import Head
from r1v3.engine.ranks import Ranks
from r1v3.model.internvl import PARTS


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

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

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


# loss_fn(head, index of the micro-batch) -> (scalar loss, tensors to hand back). The loss comes
# divided by the global normaliser, so that micro-batch losses add up to the step's loss.
LossFn = Callable[[Head, int], tuple[Tensor, dict[str, Tensor]]]


class Decoder(Protocol):
    """Live weights that extend rows of prompts, one token at a time.

    Logits are float32 [rows, V] over the true vocabulary, the same bits on every rank of a model.
    """

    def prefill(self, prompts: Batch, group_size: int, capacity: int) -> Tensor:
        """Forget earlier rows and read prompts; logits of row p * group_size + g for prompt p.

        Args:
            prompts: a batch whose responses are not looked at.
            capacity: most tokens that will follow a prompt.
        """
        ...

    def step(self, token_ids: Tensor) -> Tensor:
        """Append one token to every row; logits of the next."""
        ...

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        ...


class Writing(Protocol):
    """Files being written in the background, by all ranks together."""

    def done(self) -> bool:
        """Whether all is written; the same on every rank."""
        ...

    def wait(self) -> None:
        """Return once all is written."""
        ...


class Engine(Protocol):
    """One model with its optimizer, wherever it runs.

    Every method is collective where the engine spans processes, and takes and gives the same
    values on each of them.

    Attributes:
        config: the model's.
        tokenizer: stored beside the weights.
        temperature: of the distributions that log-probs and entropies are of.
        ranks: all processes of the job; the first one writes files.
        replicas: the processes that hold this rank's part of the weights, each in a replica of
            the model of its own (data parallelism).
    """

    config: InternVLConfig
    tokenizer: PreTrainedTokenizerFast
    temperature: float
    ranks: Ranks
    replicas: Ranks

    def evaluate(self, micro_batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
        """Log-probs of the response tokens and entropies of the distributions that emitted them.

        Returns:
            (logprobs, entropy) of each micro-batch, float32 [P * G, R] in nats without gradient;
            0 where the mask is False.
        """
        ...

    def train_step(
        self, micro_batches: Sequence[Batch], loss_fn: LossFn, *, learning_rate: float
    ) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
        """One optimizer step.

        Returns:
            metrics: "loss", "learning_rate", "grad_norm" before clipping, "grad_norm_<part>".
            outputs: what `loss_fn` handed back for each micro-batch, in their order.
        Raises:
            FloatingPointError: the gradient norm is not finite; the weights are as they were.
        """
        ...

    def decoder(self) -> Decoder:
        """The weights, as they are at each call, ready to decode."""
        ...

    def export_hf(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its HF-native name."""
        ...

    def save(self, directory: Path) -> None:
        """Write a model folder that transformers loads into an existing directory."""
        ...

    def optimizer_tensors(self) -> Mapping[str, Tensor]:
        """Optimizer state for the checkpoint to store; empty where `save_state` writes it."""
        ...

    def save_state(self, directory: Path) -> Writing | None:
        """Write what `save` does and whatever else `load_state` needs to go on bit for bit.

        Returns:
            None when all is written; otherwise what to wait for. The engine may train meanwhile.
        """
        ...

    def load_state(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `save_state` wrote and `optimizer_tensors` gave."""
        ...

    def load_weights(self, directory: Path) -> None:
        """Copy the weights of a model folder of the same configuration into the live model."""
        ...


def check_modules(modules: Mapping[str, bool] | None) -> dict[str, bool]:
    """Whether each part of the model is trained; parts that are not named are, None trains none.

    Raises:
        ValueError: an unknown part, or no part left to train.
    """
    if modules is None:
        return dict.fromkeys(PARTS, False)
    if unknown := set(modules) - set(PARTS):
        raise ValueError(f"modules names {sorted(unknown)}; parts are {', '.join(PARTS)}")
    trained = {part: modules.get(part, True) for part in PARTS}
    if not any(trained.values()):
        raise ValueError("modules switches every part off: nothing is left to train")
    return trained
