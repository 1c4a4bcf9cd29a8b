"""The loop around the steps of a stage: validate, log, save and stop, the same on every rank."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from r1v3.config import GRPO, Supervised
from r1v3.engine.contract import Engine
from r1v3.files import json_text
from r1v3.progress import ProgressBar, progress_bar, say
from r1v3.trainer.checkpoint import PendingCheckpoint, remove_old, start_checkpoint
from r1v3.trainer.critical_tokens import CriticalTokenMonitor
from r1v3.trainer.interrupt import StageInterrupted, StopRequest
from r1v3.trainer.metrics import MetricsLogger
from r1v3.trainer.profile import StepProfiler
from r1v3.trainer.stopwatch import Stopwatch

Trained = GRPO | Supervised
# Key in the state of a checkpoint whose step is still to be validated: the metrics of that step.
DUE = "unvalidated"


class Steps(Protocol):
    """The interface of a stage's trainer to the loop.

    Attributes:
        step: finished steps.
        finished: whether no further step is to be taken.
        resume_after: see `MetricsLogger`.
        skipped: the optimizer steps whose gradient was not finite.
        unvalidated: metrics of the last step before a stop, which interrupted its validation.
    """

    name: str
    run: Path
    engine: Engine
    monitor: CriticalTokenMonitor
    step: int
    resume_after: int | None
    skipped: "Skipped"
    unvalidated: dict[str, Any] | None

    @property
    def config(self) -> Trained: ...

    @property
    def total(self) -> int:
        """All steps of the stage."""
        ...

    @property
    def finished(self) -> bool: ...

    def take_step(self) -> dict[str, Any]:
        """Take one optimizer step; return its metrics."""
        ...

    def validate(self, stopping: Callable[[], bool]) -> dict[str, Any] | None:
        """Return the metrics of the validation data.

        Args:
            stopping: whether a rank was asked to stop, the same on every rank; may be called where
                all ranks call it.

        Returns:
            None if it was stopped before the end.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return the JSON values to resume from, besides the engine's state and the step."""
        ...


class Skipped:
    """Optimizer steps that engines skip because their gradient is not finite.

    Args:
        limit: so many in a row are too many.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.in_a_row = limit, 0

    def count(self, grad_norms: Sequence[float]) -> int:
        """Count the skipped ones among the gradient norms of consecutive optimizer steps."""
        skipped = [not math.isfinite(norm) for norm in grad_norms]
        for one in skipped:
            self.in_a_row = self.in_a_row + 1 if one else 0
        return sum(skipped)

    @property
    def too_many(self) -> bool:
        """Whether training has come to a stop."""
        return self.in_a_row >= self.limit


class Checkpoints:
    """The checkpoints of a stage, of which one at a time is being written.

    Args:
        keep, keep_models: see `start_checkpoint`.
    """

    def __init__(self, root: Path, engine: Engine, *, keep: int, keep_models: int | None) -> None:
        self.root, self.engine, self.keep, self.keep_models = root, engine, keep, keep_models
        self._pending: PendingCheckpoint | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Start to save after `step` finished steps; an earlier save is finished first.

        `poll` or `finish` moves the checkpoint into place.
        """
        self.finish()
        self._pending = start_checkpoint(
            self.root,
            step,
            tensors=self.engine.optimizer_tensors(),
            state=state,
            write_model=self.engine.save_state,
            model_bytes=self.engine.state_bytes(),
            keep=self.keep,
            keep_models=self.keep_models,
            ranks=self.engine.ranks,
        )

    def poll(self) -> None:
        """Move a checkpoint into place if it is completely written."""
        if self._pending is not None and self._pending.written():
            self.finish()

    def finish(self) -> None:
        """Wait until a checkpoint that was started is in place."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.finish()


def run_steps(
    trainer: Steps,
    *,
    validate_every: int,
    checkpoint_every: int,
    keep: int,
    keep_models: int | None,
    shown: Sequence[str],
) -> None:
    """Train until the trainer is finished.

    Args:
        keep, keep_models: see `start_checkpoint`.
        shown: names of the metrics in the progress bar.

    Raises:
        StageInterrupted: a signal asked a rank to stop; the finished steps are saved.
        FloatingPointError: too many optimizer steps in a row were skipped; resuming goes on with
            the next rows.
    """
    beside = Stopwatch()
    ranks, name, total = trainer.engine.ranks, trainer.name, trainer.total
    checkpoints = Checkpoints(
        trainer.run / "checkpoints" / name, trainer.engine, keep=keep, keep_models=keep_models
    )
    profiler = StepProfiler(trainer.config, trainer.run / "profile" / name, ranks)
    if trainer.finished and trainer.unvalidated is None:
        say(f"{name}: no step is left after {trainer.step} of {total}", shown=ranks.is_main)
        # A kill may have come between the last checkpoint and the removal of older ones.
        ranks.on_main(lambda: remove_old(checkpoints.root, trainer.step, keep, keep_models))
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        log = stack.enter_context(_log(trainer)) if ranks.is_main else None
        bar: ProgressBar = stack.enter_context(
            progress_bar(
                name, total, done=trainer.step, fields=shown, every=20, shown=ranks.is_main
            )
        )

        def stopping() -> bool:
            return any(ranks.gather(stop.requested))

        while not trainer.finished or trainer.unvalidated is not None:
            metrics = _next_metrics(trainer, profiler)
            if trainer.step == total or trainer.step % validate_every == 0:
                with beside.part("validation"):
                    metrics |= _validation(trainer, stopping, metrics)
            if log is not None:
                # Saving is that of the checkpoints since the line before.
                log.log(trainer.step, metrics | beside.take())
            bar.update(trainer.step, metrics)
            ends = trainer.unvalidated is not None or stopping()
            stuck = trainer.skipped.too_many
            with beside.part("saving"):
                if trainer.finished or ends or stuck or trainer.step % checkpoint_every == 0:
                    due = {} if trainer.unvalidated is None else {DUE: trainer.unvalidated}
                    checkpoints.save(trainer.step, trainer.state() | due)
                checkpoints.poll()
            if stuck:
                checkpoints.finish()
                raise _stuck(trainer)
            if ends:
                checkpoints.finish()
                raise StageInterrupted(
                    f"{name} stopped at step {trainer.step} of {total} and was saved; "
                    "go on with --resume"
                )
        checkpoints.finish()


def _stuck(trainer: Steps) -> FloatingPointError:
    return FloatingPointError(
        f"{trainer.name}: the gradients of {trainer.skipped.in_a_row} optimizer steps in a row, "
        f"the last at step {trainer.step} of {trainer.total}, were not finite and were not taken; "
        "the weights before them are saved. Lower the learning rate, or go on with --resume, which "
        "takes the next rows"
    )


def _next_metrics(trainer: Steps, profiler: StepProfiler) -> dict[str, Any]:
    """Take a step, or up again one that is still to be validated; return its metrics."""
    if trainer.unvalidated is not None:
        metrics, trainer.unvalidated = trainer.unvalidated, None
        return metrics
    with profiler.step(trainer.step + 1):
        return trainer.take_step()


def _validation(
    trainer: Steps, stopping: Callable[[], bool], metrics: dict[str, Any]
) -> dict[str, Any]:
    """Validate a step; keep its metrics for later if that is stopped."""
    found = trainer.validate(stopping)
    if found is None:
        # As they are logged, which a checkpoint can store.
        trainer.unvalidated = json.loads(json_text(metrics))
    return found or {}


def _log(trainer: Steps) -> MetricsLogger:
    return MetricsLogger(
        trainer.run,
        trainer.name,
        resume_after=trainer.resume_after,
        histogram_edges={"entropy_histogram": trainer.monitor.bin_edges},
        wandb_project=trainer.config.wandb_project,
    )
