"""What all training stages share: the run folder, resuming, schedules and stateless randomness."""

import math
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from r1v3.config import Optimizer, Section, Stage, to_yaml
from r1v3.data.encoding import Example, ImageShape, encode_sample
from r1v3.data.sample import Sample
from r1v3.engine.build import connect
from r1v3.engine.contract import Engine
from r1v3.engine.ranks import Ranks
from r1v3.files import (
    remove_leftovers,
    replace_directory,
    temporary_sibling,
    write_json,
    write_text,
)
from r1v3.trainer.checkpoint import (
    Loaded,
    latest_checkpoint,
    load_checkpoint,
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
    """Write the resolved configuration and the environment into the run folder, first of all.

    What differs from the configuration of an earlier start of the stage is named in a warning.
    """
    file = run / "config" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        before = _flat(yaml.safe_load(file.read_text(encoding="utf-8")))
        now = _flat(config.model_dump(mode="json"))
        changes = [
            f"{key} {before.get(key)} -> {now.get(key)}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changes:
            warnings.warn(
                f"{name} goes on with another configuration: {', '.join(changes)}", stacklevel=2
            )
    write_text(file, to_yaml(config))
    if not (run / "environment.json").exists():
        write_json(run / "environment.json", environment())


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    parts = [_flat(value, f"{prefix}{key}.") for key, value in tree.items()]
    return {key: value for part in parts for key, value in part.items()}


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


def open_stage(name: str, config: Stage, *, resuming: bool) -> Ranks:
    """Connect the ranks, refuse to start over an earlier run, and begin the run folder."""
    ranks = connect(config)

    def first() -> None:
        require_fresh(name, Path(config.run), resuming)
        begin(name, config, Path(config.run))

    ranks.lead(first)
    set_threads(config.threads)
    return ranks


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


def resume(name: str, run: Path, engine: Engine, wanted: bool) -> Loaded | None:
    """Load the newest intact checkpoint of a stage into the engine, if resuming was asked for.

    None: there is none yet, and the stage starts from its beginning.

    Raises:
        CheckpointError: there are checkpoints and all are broken; names a file of the newest.
    """
    root = run / "checkpoints" / name
    if not wanted or not root.exists():
        return None
    # What a kill left half written or half deleted; nothing else would remove it after the end.
    engine.ranks.lead(lambda: remove_leftovers(root, ".step-*.tmp"))
    path = latest_checkpoint(root, engine.ranks)
    if path is None:
        broken = sorted(root.glob("step-*"))
        if not broken:
            return None
        path = broken[-1]
    loaded = load_checkpoint(path, engine.ranks)
    engine.load_state(path, loaded.tensors)
    return loaded


def publish(engine: Engine, folder: Path) -> None:
    """Write the engine's model folder in one move, replacing what was there.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """

    def prepare() -> Path:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent, f".{folder.name}.*.tmp")
        temporary = temporary_sibling(folder)
        temporary.mkdir()
        return temporary

    temporary = engine.ranks.lead(prepare)
    try:
        engine.save(temporary)
        engine.ranks.lead(lambda: replace_directory(temporary, folder))
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError | OSError):
            raise OSError(
                f"cannot write the model folder {folder}: {error}; free some space and go on "
                "with --resume"
            ) from error
        raise
