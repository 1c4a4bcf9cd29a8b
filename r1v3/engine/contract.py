"""The interface of an engine to trainers and samplers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import InternVLConfig, PreTrainedTokenizerFast

from r1v3.data.batch import Batch
from r1v3.engine.head import Head
from r1v3.files import FileDigest
from r1v3.model.flops import Work
from r1v3.ranks import Ranks

# loss_fn(head, index of the micro-batch among this replica's) -> (scalar loss, tensors to return).
# The loss comes divided by the normalizer of the whole step, so that micro-batch losses add up to
# its loss.
LossFn = Callable[[Head, int], tuple[Tensor, dict[str, Tensor]]]


class Decoder(Protocol):
    """Live weights that extend rows of prompts, one token at a time.

    Logits are float32 [rows, V] over the true vocabulary, the same bits on every rank of a model.
    """

    def prefill(self, prompts: Batch, group_size: int, capacity: int) -> Tensor:
        """Start anew with these prompts; return the logits, in row p * group_size + g for prompt p.

        Args:
            prompts: a batch whose responses are ignored.
            capacity: most tokens that follow a prompt.
        """
        ...

    def step(self, token_ids: Tensor) -> Tensor:
        """Append one token to every row; return the logits of the next."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep these rows only."""
        ...


class Writing(Protocol):
    """Files that all ranks together are writing in the background.

    Attributes:
        digests: after `wait`, of the files that this rank has hashed while it wrote them, by their
            path in the directory.
    """

    digests: Mapping[str, FileDigest]

    def done(self) -> bool:
        """Return whether all files are written; the same on every rank."""
        ...

    def wait(self) -> None:
        """Wait until all files are written."""
        ...


class Engine(Protocol):
    """One model with its optimizer, in one process or over many.

    Every method but `shares` is collective where the engine spans processes, and all have the same
    results on each of them unless they say otherwise. Replicas train on micro-batches of their own,
    all ranks of a replica on the same ones.

    Attributes:
        config: configuration of the model.
        tokenizer: stored beside the weights.
        temperature: of the distributions that log-probs and entropies are of.
        ranks: all processes of the job; the first one writes files.
        replicas: the data-parallel processes that take this rank's part in other micro-batches; its
            rank among them is that of its replica.
        samplers: all processes that hold the same part of the weights as this rank. They share
            prompts to complete; where a context is divided, they are more than the replicas.
    """

    config: InternVLConfig
    tokenizer: PreTrainedTokenizerFast
    temperature: float
    ranks: Ranks
    replicas: Ranks
    samplers: Ranks

    @property
    def reports(self) -> bool:
        """Whether this rank's outputs stand for its replica's, so that sums count them once."""
        ...

    def shares(self, works: Sequence[Work]) -> list[list[int]]:
        """Divide micro-batches of so much work among the replicas; return the numbers of each.

        A replica is given its micro-batches in this order.
        """
        ...

    def prepare(self, micro_batches: Sequence[Batch]) -> None:
        """Begin to cut the pictures that this rank will need of these, in the background.

        `evaluate` and `train_step` do it themselves, for theirs.
        """
        ...

    def evaluate(self, micro_batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
        """Compute log-probs of the response tokens and entropies of their distributions.

        Args:
            micro_batches: of this replica; none is few enough.

        Returns:
            (logprobs, entropy) of each micro-batch, float32 [P * G, R] in nats without gradient;
            zero where the mask is False. Nothing on ranks without the head.
        """
        ...

    def train_step(
        self, micro_batches: Sequence[Batch], loss_fn: LossFn, *, learning_rate: float
    ) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
        """Take one optimizer step; skip it where the gradient norm is not finite.

        A skipped step leaves weights and optimizer state as they were.

        Args:
            micro_batches: of this replica.

        Returns:
            metrics: "loss", "learning_rate", "grad_norm" before clipping, "grad_norm_<part>", of
                all replicas together.
            outputs: the tensors that `loss_fn` returned for each of these micro-batches; nothing on
                ranks without the head.
        """
        ...

    def decoder(self) -> Decoder:
        """Return a decoder over the live weights."""
        ...

    def export_hf(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight under its HF-native name."""
        ...

    def save(self, directory: Path) -> None:
        """Write model files that transformers loads into an existing directory."""
        ...

    def optimizer_tensors(self) -> Mapping[str, Tensor]:
        """Return the optimizer state for the checkpoint; empty where `save_state` writes it."""
        ...

    def state_bytes(self) -> int:
        """Return about how many bytes the files of `save_state` have, of all ranks together."""
        ...

    def save_state(self, directory: Path) -> Writing | None:
        """Write the files of `save`, and all else that `load_state` needs to resume bit for bit.

        Returns:
            None when all files are written; otherwise the writing to wait for, during which the
            engine may train.
        """
        ...

    def load_state(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        """Resume from the files of `save_state` and the tensors of `optimizer_tensors`."""
        ...

    def load_weights(self, directory: Path) -> None:
        """Copy the weights of a model folder of the same configuration into the live model."""
        ...
