"""What all training stages share: the run folder, resuming, schedules and stateless randomness."""

import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from r1v3.config import Architecture, Optimizer, Section, Stage, to_yaml
from r1v3.data.encoding import Example, ImageShape, encode_sample
from r1v3.data.sample import Sample
from r1v3.engine.hf import HFEngine
from r1v3.files import replace_directory, temporary_sibling, write_json, write_text
from r1v3.model.internvl import build_model, internvl_config, load_model
from r1v3.trainer.checkpoint import (
    Loaded,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)


def stream(*key: int | str) -> np.random.Generator:
    """A random stream that depends on its key alone.

    Everything random in training is drawn from such a stream, keyed by seed, purpose and step, so
    that a resumed run needs no saved generator state to repeat an uninterrupted one.
    """
    words = [part if isinstance(part, int) else int.from_bytes(part.encode()) for part in key]
    return np.random.default_rng(words)


def torch_stream(*key: int | str) -> torch.Generator:
    """The same for torch."""
    return torch.Generator().manual_seed(int(stream(*key).integers(0, 2**63 - 1)))


def order(count: int, start: int, size: int, *key: int | str) -> list[int]:
    """Entries `start` to `start + size` of endless shuffled passes over `count` things."""
    if count == 0:
        raise ValueError("the training data is empty")
    passes = {
        n: stream(*key, n).permutation(count)
        for n in range(start // count, (start + size) // count + 1)
    }
    return [int(passes[i // count][i % count]) for i in range(start, start + size)]


def learning_rate(step: int, total: int, config: Optimizer) -> float:
    """Learning rate of a step (from 0): linear warm-up, then cosine to zero, or constant."""
    warmup = max(1, round(config.warmup_ratio * total))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, total - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def require_fresh(name: str, run: Path, resuming: bool) -> None:
    """Refuse to start a stage over what an earlier run of it left, before anything is written.

    Raises:
        ValueError: there are checkpoints or a model of the stage and `resuming` is False.
    """
    left = [run / "models" / name, run / "checkpoints" / name]
    if not resuming and any(path.exists() for path in left):
        raise ValueError(
            f"{run} already holds stage {name}; pass --resume to go on, or another run folder"
        )


def begin(name: str, config: Section, run: Path) -> None:
    """Write the resolved configuration and the environment into the run folder, first of all."""
    (run / "config").mkdir(parents=True, exist_ok=True)
    write_text(run / "config" / f"{name}.yaml", to_yaml(config))
    if not (run / "environment.json").exists():
        write_json(run / "environment.json", environment())


def set_threads(threads: int | None) -> None:
    """Use this many CPU threads; the count is part of what a run must repeat to get its bits."""
    if threads is not None:
        torch.set_num_threads(threads)


def environment() -> dict[str, Any]:
    """What the run ran on."""
    import transformers

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "machine": platform.platform(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def build_engine(
    config: Stage,
    modules: dict[str, bool],
    optimizer: Optimizer,
    *,
    architecture: Architecture | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    temperature: float = 1.0,
) -> HFEngine:
    """The engine of a stage, from a model folder or a fresh architecture with its tokenizer."""
    from r1v3.data.tokenizer import IMAGE_CONTEXT, load_tokenizer, token_id

    if architecture is not None:
        assert tokenizer is not None
        model = build_model(
            internvl_config(
                vocab_size=len(tokenizer),
                image_token_id=token_id(tokenizer, IMAGE_CONTEXT),
                image_size=architecture.image_size,
                patch_size=architecture.patch_size,
                vision=architecture.vision,
                text=architecture.text,
                rope_theta=architecture.rope_theta,
            ),
            config.seed,
            device=config.device,
        )
    else:
        assert config.model is not None
        tokenizer = load_tokenizer(config.model)
        model = load_model(config.model, device=config.device)
    return HFEngine(
        model,
        tokenizer,
        modules=modules,
        weight_decay=optimizer.weight_decay,
        betas=optimizer.betas,
        max_grad_norm=optimizer.max_grad_norm,
        temperature=temperature,
    )


@contextmanager
def in_row(path: Path, row: int) -> Iterator[None]:
    """Put file and row in front of what is wrong with a sample."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} row {row}: {error}") from error


def encode_all(
    path: Path, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerFast, shape: ImageShape
) -> list[Example]:
    """The prompts of a file's samples; what is wrong with one is named by file and row."""
    examples = []
    for row, sample in enumerate(samples):
        with in_row(path, row):
            examples.append(encode_sample(sample, tokenizer, shape))
    return examples


def resume(name: str, run: Path, engine: HFEngine, wanted: bool) -> Loaded | None:
    """Load the newest intact checkpoint of a stage into the engine, if resuming was asked for.

    None: there is none yet, and the stage starts from its beginning.

    Raises:
        CheckpointError: there are checkpoints and all are broken; names a file of the newest.
    """
    root = run / "checkpoints" / name
    if not wanted or not root.exists():
        return None
    # What a kill left half written or half deleted; nothing else would remove it after the end.
    for leftover in root.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    path = latest_checkpoint(root)
    if path is None:
        broken = sorted(root.glob("step-*"))
        if not broken:
            return None
        path = broken[-1]
    loaded = load_checkpoint(path)
    engine.load_weights(path)
    load_optimizer_tensors(engine.optimizer, engine.trainable, loaded.tensors)
    return loaded


def save(
    name: str,
    run: Path,
    step: int,
    engine: HFEngine,
    state: dict[str, Any],
    *,
    keep: int | None = 2,
) -> Path:
    """Save a checkpoint that `resume` goes on from, step counting finished steps."""
    return save_checkpoint(
        run / "checkpoints" / name,
        step,
        tensors=optimizer_tensors(engine.optimizer, engine.trainable),
        state=state,
        write_model=engine.save,
        keep=keep,
    )


def publish(engine: HFEngine, folder: Path) -> None:
    """Write the engine's model folder in one move, replacing what was there.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(leftover)
    temporary = temporary_sibling(folder)
    temporary.mkdir()
    try:
        engine.save(temporary)
        replace_directory(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError | OSError):
            raise OSError(
                f"cannot write the model folder {folder}: {error}; free some space and go on "
                "with --resume"
            ) from error
        raise


@contextmanager
def progress_bar(
    title: str, total: int, done: int, fields: Sequence[str]
) -> Iterator["ProgressBar"]:
    """A progress bar with the numbers that matter; a line now and then without a terminal."""
    console = Console()
    with Progress(
        TextColumn("[bold]{task.description:<10}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[numbers]}"),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(title, total=total, completed=done, numbers="")
        yield ProgressBar(bar, task, title, total, fields, console)


class ProgressBar:
    """See `progress_bar`."""

    def __init__(
        self,
        bar: Progress,
        task: Any,
        title: str,
        total: int,
        fields: Sequence[str],
        console: Console,
    ) -> None:
        self._bar, self._task, self._title, self._total = bar, task, title, total
        self._fields, self._console = fields, console

    def update(self, step: int, values: dict[str, Any]) -> None:
        """Show the finished step count and the chosen numbers."""
        shown = [
            f"{key.replace('_', ' ')} {values[key]:.3g}"
            for key in self._fields
            if isinstance(values.get(key), int | float)
        ]
        text = "  ".join(shown)
        self._bar.update(self._task, completed=step, numbers=text)
        if not self._console.is_terminal and (step == self._total or step % 20 == 0):
            self._console.print(
                f"{self._title} {step}/{self._total}  {text}", highlight=False, soft_wrap=True
            )

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text, highlight=False, soft_wrap=True)
