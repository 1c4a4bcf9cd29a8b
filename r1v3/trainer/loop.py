"""The loop around the steps of a stage: validate, log, save and stop, the same on every rank."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from r1v3.config import Stage
from r1v3.engine.contract import Engine
from r1v3.progress import ProgressBar, progress_bar, say
from r1v3.trainer.checkpoint import PendingCheckpoint, remove_old, start_checkpoint
from r1v3.trainer.critical_tokens import CriticalTokenMonitor
from r1v3.trainer.interrupt import StageInterrupted, StopRequest
from r1v3.trainer.metrics import MetricsLogger


class Steps(Protocol):
    """The interface of a stage's trainer to the loop.

    Attributes:
        step: finished steps.
        finished: whether no further step is to be taken.
        resume_after: see `MetricsLogger`.
    """

    name: str
    run: Path
    engine: Engine
    monitor: CriticalTokenMonitor
    step: int
    resume_after: int | None

    @property
    def config(self) -> Stage: ...

    @property
    def total(self) -> int:
        """All steps of the stage."""
        ...

    @property
    def finished(self) -> bool: ...

    def take_step(self) -> dict[str, Any]:
        """Take one optimizer step; return its metrics."""
        ...

    def validate(self) -> dict[str, Any]:
        """Return the metrics of the validation data."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the JSON values to resume from, besides the engine's state and the step."""
        ...


class Checkpoints:
    """The checkpoints of a stage, of which one at a time is being written.

    Args:
        keep: how many to keep; None keeps all.
    """

    def __init__(self, root: Path, engine: Engine, *, keep: int | None) -> None:
        self.root, self.engine, self.keep = root, engine, keep
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
            keep=self.keep,
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
    keep: int | None,
    shown: Sequence[str],
) -> None:
    """Train until the trainer is finished.

    Args:
        keep: checkpoints to keep; None keeps all.
        shown: names of the metrics in the progress bar.

    Raises:
        StageInterrupted: a signal asked a rank to stop; the finished steps are saved.
    """
    ranks, name, total = trainer.engine.ranks, trainer.name, trainer.total
    checkpoints = Checkpoints(trainer.run / "checkpoints" / name, trainer.engine, keep=keep)
    if trainer.finished:
        say(f"{name}: no step is left after {trainer.step} of {total}", shown=ranks.is_main)
        # A kill may have come between the last checkpoint and the removal of older ones.
        ranks.on_main(lambda: remove_old(checkpoints.root, trainer.step, keep))
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        log = stack.enter_context(_log(trainer)) if ranks.is_main else None
        bar: ProgressBar = stack.enter_context(
            progress_bar(
                name, total, done=trainer.step, fields=shown, every=20, shown=ranks.is_main
            )
        )
        while not trainer.finished:
            metrics = trainer.take_step()
            last = trainer.step == total
            if last or trainer.step % validate_every == 0:
                metrics |= trainer.validate()
            if log is not None:
                log.log(trainer.step, metrics)
            bar.update(trainer.step, metrics)
            stopping = any(ranks.gather(stop.requested))
            if trainer.finished or stopping or trainer.step % checkpoint_every == 0:
                checkpoints.save(trainer.step, trainer.state())
            checkpoints.poll()
            if stopping:
                checkpoints.finish()
                raise StageInterrupted(
                    f"{name} stopped at step {trainer.step} of {total} and was saved; "
                    "go on with --resume"
                )
        checkpoints.finish()


def _log(trainer: Steps) -> MetricsLogger:
    return MetricsLogger(
        trainer.run,
        trainer.name,
        resume_after=trainer.resume_after,
        histogram_edges={"entropy_histogram": trainer.monitor.bin_edges},
        wandb_project=trainer.config.wandb_project,
    )
