"""`Ranks` and checkpoints of three ranks that share a file system."""

import errno
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from r1v3.files import FileDigest
from r1v3.ranks import Ranks
from r1v3.trainer import checkpoint


def failing() -> None:
    raise ValueError("only the first rank knows")


def fail_on_last(own: range) -> list[int]:
    if 2 in own:
        raise ValueError("the last has failed")
    return list(own)


def failure_of(work: Callable[[], Any]) -> str:
    try:
        return str(work())
    except ValueError as raised:
        return str(raised)


def talking(ranks: Ranks) -> dict[str, Any]:
    """Results of the calls on this rank."""
    try:
        ranks.on_main(failing)
        error = "none"
    except ValueError as raised:
        error = str(raised)
    return {
        "is_main": ranks.is_main,
        "gathered": ranks.gather({"rank": ranks.rank}),
        "broadcast": ranks.broadcast(f"from {ranks.rank}"),
        "led": ranks.on_main(lambda: f"led by {ranks.rank}"),
        "error": error,
        "divided": ranks.divide(5, lambda own: [f"{i} by {ranks.rank}" for i in own]),
        "failed": failure_of(lambda: ranks.divide(3, fail_on_last)),
        "shares": [list(ranks.shard(count)) for count in (7, 3, 2, 0)],
    }


def run(folder: Path, name: str) -> dict[str, Any]:
    """Talk, save, verify, and fail together."""
    ranks = Ranks(dist.group.WORLD)
    report = talking(ranks)
    root, hashed = folder / "ranks", list[str]()
    digest_of = checkpoint.digest_of

    def counting(file: Path) -> FileDigest:
        hashed.append(file.name)
        return digest_of(file)

    checkpoint.digest_of = counting

    def write_model(directory: Path) -> None:
        for number in range(2):
            value = torch.full((5,), float(ranks.rank))
            save_file({"x": value}, directory / f"{ranks.rank}-{number}.safetensors")

    def save(step: int, keep: int = 2, write: Any = write_model) -> Path:
        pending = checkpoint.start_checkpoint(
            root, step, tensors={}, state={"n": 1}, write_model=write, keep=keep, ranks=ranks
        )
        return pending.finish()

    path = save(1)
    report["hashed"] = sorted(hashed)
    hashed.clear()
    loaded = checkpoint.load_checkpoint(path, ranks)
    report["verified"], report["state"] = sorted(hashed), loaded.state
    save(2)
    save(3)
    report["kept"] = sorted(entry.name for entry in root.iterdir())
    ranks.barrier()
    report["disk_full"] = disk_full(root, ranks)
    if ranks.rank == 1:
        (root / "step-000003" / "2-1.safetensors").write_bytes(b"damage")
    ranks.barrier()
    try:
        checkpoint.load_checkpoint(root / "step-000003", ranks)
    except checkpoint.CheckpointError as error:
        report["damaged"] = str(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        latest = checkpoint.load_latest(root, ranks)
    report["latest"], report["warnings"] = latest and latest.path.name, len(caught)
    checkpoint.digest_of = digest_of
    return report


def disk_full(root: Path, ranks: Ranks) -> str:
    """Errors of every rank when the first one finds no room; nothing is left of the attempt."""
    free = checkpoint.require_free_space

    def none_left(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    checkpoint.require_free_space = none_left
    try:
        checkpoint.start_checkpoint(
            root, 4, tensors={}, state={}, write_model=lambda directory: None, ranks=ranks
        )
    except OSError as error:
        return f"{error} {sorted(entry.name for entry in root.iterdir())}"
    finally:
        checkpoint.require_free_space = free
    return ""
