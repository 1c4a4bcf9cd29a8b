"""What an engine is: the batch it takes and the calls a trainer makes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import InternVLConfig, PreTrainedTokenizerFast

from r1v3.data.batch import Batch
from r1v3.engine.head import Head
from r1v3.ranks import Ranks

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
