"""Supervised training on responses: cold-start SFT, connector-only tuning and pre-training."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from r1v3.balance import runs, shared_budget, worthwhile
from r1v3.config import Supervised
from r1v3.data.batch import Batch
from r1v3.data.encoding import (
    Example,
    collate,
    encode_all,
    in_row,
    model_image_shape,
    record_max_tiles,
)
from r1v3.data.lengths import PositionLimit, TooLong, check_micro_batch_tokens
from r1v3.data.sample import Sample
from r1v3.data.schema import load_samples
from r1v3.data.thoughts import THINK_OPEN
from r1v3.data.tiles import ImageShape, TileCache
from r1v3.data.tokenizer import SYSTEM_PROMPT, train_tokenizer
from r1v3.data.words import expand_words
from r1v3.engine.build import Training, build_engine, resolve_max_tiles
from r1v3.engine.contract import Engine
from r1v3.engine.head import Head
from r1v3.model.flops import Work, work_of
from r1v3.progress import say
from r1v3.trainer.critical_tokens import CriticalTokenMonitor
from r1v3.trainer.loop import DUE, Skipped, run_steps
from r1v3.trainer.randomness import order
from r1v3.trainer.record import NothingToDo, write_finished
from r1v3.trainer.schedule import learning_rate
from r1v3.trainer.stage import open_stage, publish, resume
from r1v3.trainer.telemetry import Telemetry

_SHOWN = ("loss", "validation_loss", "grad_norm")


@dataclass
class Best:
    """The best validation so far; `stale` counts the validations since."""

    loss: float | None = None
    step: int = 0
    stale: int = 0

    def update(self, loss: float, step: int) -> bool:
        """Record a validation; return whether it is the best so far."""
        if self.loss is None or loss < self.loss:
            self.loss, self.step, self.stale = loss, step, 0
            return True
        self.stale += 1
        return False


def encode_examples(
    path: Path,
    samples: Sequence[Sample],
    engine: Engine,
    shape: ImageShape,
    *,
    too_long: TooLong = "error",
    max_length: int | None = None,
    cache: TileCache | None = None,
) -> tuple[list[Example], int]:
    """Encode the samples of a file, each in the template (thinking or not) it was written for.

    Samples of more than `max_length` tokens, prompt and response together, are left out; so are
    those beyond the model's positions if `too_long` is "drop", and those with a truncated picture
    if `shape` skips them.

    Args:
        cache: where tiles are kept.

    Returns:
        The examples, and how many samples were left out, which is printed as well.

    Raises:
        ValueError: a sample has no response or is beyond the model's positions (named by file and
            row), or no sample is left.
    """
    for row, sample in enumerate(samples):
        with in_row(path, row):
            if not sample.response:
                raise ValueError("extra_info.response is empty; there is no target")
    encoded = encode_all(
        path,
        samples,
        engine.tokenizer,
        shape,
        thinking=lambda sample: sample.thinking,
        ranks=engine.ranks,
        cache=cache,
    )
    examples: dict[int, Example] = {}
    left_out = 0
    for row, example in encoded.items():
        length = len(example.prompt_ids) + len(example.response_ids)
        if max_length is None or length <= max_length:
            examples[row] = example
        else:
            left_out += 1
    if left_out:
        told = f"{left_out} of {left_out + len(examples)} samples of {path} have more than "
        told += f"max_length {max_length} tokens"
        if not examples:
            raise ValueError(f"{told}; none is left")
        say(f"{told} and are left out", shown=engine.ranks.is_main)
    limit = PositionLimit.of(engine.config, too_long)
    kept = limit.rows(path, examples, shown=engine.ranks.is_main)
    return [examples[row] for row in kept], len(samples) - len(kept)


def sum_loss(logprobs: Tensor, tokens: int) -> Tensor:
    """Return the cross-entropy: minus the summed log-probs over the `tokens` of the whole batch."""
    return -logprobs.sum() / tokens


def micro_batches(
    examples: list[Example], size: int, pad: int, tokens: int | None = None, least: int = 1
) -> list[Batch]:
    """Collate examples into batches of like length, so that few are padded.

    Args:
        size: most rows of a batch.
        tokens: most positions of the language model, or None; see `Episode.micro_batches`.
        least: batches that are worth smaller ones than `tokens`.
    """
    ordered = sorted(
        examples, key=lambda example: (len(example.response_ids), len(example.prompt_ids))
    )
    lengths = [len(one.prompt_ids) + max(0, len(one.response_ids) - 1) for one in ordered]
    budget = sum(lengths)
    if tokens is not None and lengths:
        budget = shared_budget(budget, max(lengths), tokens, least)
    return [collate(ordered[run.start : run.stop], pad) for run in runs(lengths, budget, most=size)]


def validation_loss(
    engine: Engine, examples: list[Example], size: int, tokens: int | None = None
) -> float:
    """Return the mean cross-entropy per response token, in nats."""
    batches = micro_batches(examples, size, engine.tokenizer.pad_token_id, tokens)
    mine = own_numbers(engine, batches)
    found = engine.evaluate([batches[i] for i in mine])
    sums = {
        i: logprobs.sum()[None].double()
        for i, (logprobs, _) in zip(mine, found, strict=False)
        if engine.reports
    }
    total = sum(engine.ranks.table(sums, len(batches), 1)[:, 0].tolist())
    counted = sum(int(batch.loss_mask.sum()) for batch in batches)
    return -total / max(1, counted)


def own_numbers(engine: Engine, batches: Sequence[Batch]) -> list[int]:
    """Return the numbers of this replica's micro-batches."""
    return engine.shares([work_of(batch) for batch in batches])[engine.replicas.rank]


class SupervisedTrainer:
    """A supervised stage, one step at a time; see `loop.Steps`."""

    def __init__(self, name: str, config: Supervised, *, resuming: bool) -> None:
        config = resolve_max_tiles(config)
        self.name, self.config, self.run = name, config, Path(config.run)
        stage = open_stage(name, config, resuming=resuming)
        tokenizer = None
        if config.architecture is not None:
            tokenizer = train_tokenizer(
                corpus(config.architecture.tokenizer_data), config.architecture.vocab_size
            )
        self.engine = build_engine(
            config,
            stage.ranks,
            Training(config.modules, config.optimizer),
            architecture=config.architecture,
            tokenizer=tokenizer,
        )
        self.shape = model_image_shape(self.engine.config, config.max_tiles, config.pictures)
        record_max_tiles(self.engine.config, self.shape.max_tiles)
        self.cache = TileCache()
        self.train, self.dropped = self.encode(config.train_data, stage.train)
        self.validation, _ = self.encode(config.validation_data, stage.validation)
        words = expand_words(self.engine.tokenizer, config.monitor.words)
        self.monitor = CriticalTokenMonitor(
            words, high_entropy_nats=config.monitor.high_entropy_nats
        )
        self.telemetry = Telemetry(
            self.engine.config,
            config.modules.model_dump(),
            device=config.device,
            dtype=config.dtype,
            ranks=stage.ranks,
        )
        self.best, self.skipped = Best(), Skipped(config.optimizer.max_skipped)
        self.step, self.seen = 0, 0
        self.unvalidated: dict[str, Any] | None = None
        loaded = resume(name, self.run, self.engine, resuming)
        if loaded is not None:
            self.step, self.seen = loaded.step, loaded.state["seen"]
            self.best = Best(**loaded.state["best"])
            self.unvalidated = loaded.state.get(DUE)
        # The line of a step that is still to be validated is written again.
        done = self.step - (self.unvalidated is not None)
        self.resume_after = done if resuming else None

    def encode(self, path: Path, samples: Sequence[Sample]) -> tuple[list[Example], int]:
        """Encode the samples of a file; count those that are left out."""
        config = self.config
        examples, dropped = encode_examples(
            path,
            samples,
            self.engine,
            self.shape,
            too_long=config.too_long,
            max_length=config.max_length,
            cache=self.cache,
        )
        check_micro_batch_tokens(config.micro_batch_tokens, path, examples)
        return examples, dropped

    @property
    def unseen(self) -> int:
        """Rows that are still to be taken, those of every pass over the data counted."""
        return max(1, round(len(self.train) * self.config.epochs)) - self.seen

    @property
    def total(self) -> int:
        """See `loop.Steps.total`."""
        return self.step + math.ceil(max(0, self.unseen) / self.config.batch_size)

    def next_rows(self) -> list[int]:
        """Take the rows of the next batch: a full one, or all that are left."""
        rows = self.coming_rows()
        self.seen += len(rows)
        return rows

    def coming_rows(self) -> list[int]:
        """Return the rows that `next_rows` will take; none after the last."""
        size = min(self.config.batch_size, max(0, self.unseen))
        return order(len(self.train), self.seen, size, self.config.seed, self.name, "order")

    def batches(self, rows: Sequence[int]) -> list[Batch]:
        """Return the micro-batches of these rows."""
        return micro_batches(
            [self.train[i] for i in rows],
            self.config.micro_batch_size,
            self.engine.tokenizer.pad_token_id,
            self.config.micro_batch_tokens,
            worthwhile(self.config, self.engine.replicas.size),
        )

    @property
    def finished(self) -> bool:
        """Whether the last step was taken, or validation has stopped improving."""
        patience = self.config.early_stopping
        return self.step >= self.total or (patience is not None and self.best.stale >= patience)

    def take_step(self) -> dict[str, Any]:
        """Take one optimizer step; return its metrics."""
        config, total, started = self.config, self.total, time.perf_counter()
        batches = self.batches(self.next_rows())
        mine = own_numbers(self.engine, batches)
        own = [batches[i] for i in mine]
        self.engine.prepare(own)
        if coming := self.coming_rows():
            following = self.batches(coming)
            self.engine.prepare([following[i] for i in own_numbers(self.engine, following)])
        tokens = sum(int(batch.loss_mask.sum()) for batch in batches)

        def loss_fn(head: Head, index: int) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs, entropy = head.logprobs_and_entropy()
            return sum_loss(logprobs, tokens), {"entropy": entropy}

        rate = learning_rate(self.step, total, config.optimizer)
        self.telemetry.start()
        metrics, outputs = self.engine.train_step(own, loss_fn, learning_rate=rate)
        metrics |= self.telemetry.finish(sum((work_of(batch) for batch in batches), Work()))
        measured = {
            i: self.monitor.measure(batch.response_ids, output["entropy"], batch.loss_mask)
            for i, batch, output in zip(mine, own, outputs, strict=False)
            if self.engine.reports
        }
        self.monitor.reset()
        for row in self.engine.ranks.table(measured, len(batches), self.monitor.width):
            self.monitor.add(row)
        self.step += 1
        return {
            **metrics,
            **self.monitor.result(),
            "steps_skipped": self.skipped.count([metrics["grad_norm"]]),
            "tokens": tokens,
            "rows_dropped": self.dropped,
            "seconds": time.perf_counter() - started,
        }

    def validate(self, stopping: Callable[[], bool]) -> dict[str, Any] | None:
        """Return the validation loss; publish the weights when it is the best so far.

        See `loop.Steps.validate`; a validation that has begun is not interrupted.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        config = self.config
        if stopping():
            return None
        loss = validation_loss(
            self.engine, self.validation, config.micro_batch_size, config.micro_batch_tokens
        )
        if not math.isfinite(loss):
            raise FloatingPointError(f"validation loss is {loss} at step {self.step}")
        if self.best.update(loss, self.step):
            publish(self.engine, self.run / "checkpoints" / f"{self.name}-best")
        return {"validation_loss": loss}

    def state(self) -> dict[str, Any]:
        """See `loop.Steps.state`."""
        return {"best": vars(self.best), "seen": self.seen}

    def loop(self) -> None:
        """Train until finished."""
        run_steps(
            self,
            validate_every=self.config.validate_every,
            checkpoint_every=self.config.checkpoint_every,
            keep=self.config.keep,
            keep_models=0,
            shown=_SHOWN,
        )
        if self.best.stale and self.best.loss is not None:
            say(
                f"{self.name}: best validation loss {self.best.loss:.4f} at step "
                f"{self.best.step} of {self.step}; those weights are kept",
                shown=self.engine.ranks.is_main,
            )


def corpus(files: Sequence[Path]) -> list[str]:
    """Return the texts that a vocabulary is learned from: prompts, responses and chat markup."""
    samples = [sample for file in files for sample in load_samples(file)]
    prompts = [message["content"] for sample in samples for message in sample.prompt]
    chat = [f"system\n{SYSTEM_PROMPT}", "user\n", f"assistant\n{THINK_OPEN}\n"]
    return prompts + [sample.response or "" for sample in samples] + chat * len(samples)


def train(name: str, config: Supervised, *, resuming: bool = False) -> Path:
    """Run a supervised stage; return the model folder with the best validation loss."""
    final = Path(config.run) / "models" / name
    try:
        trainer = SupervisedTrainer(name, config, resuming=resuming)
    except NothingToDo:
        return final
    try:
        trainer.loop()
    finally:
        trainer.cache.close()
    trainer.engine.load_weights(Path(config.run) / "checkpoints" / f"{name}-best")
    publish(trainer.engine, final)
    trainer.engine.ranks.on_main(lambda: write_finished(name, config))
    return final
