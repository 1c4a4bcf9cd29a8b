"""Trainer checkpoints: directories that are complete or absent, verified on reading.

`<root>/step-000040/` holds the model as the engine wrote it (Hugging Face files, loadable as they
are), `trainer.safetensors` (optimizer moments and other tensors), `trainer.json` (seeds, counters)
and `manifest.json`, which lists every other file with its size and SHA-256. A save fills a hidden
temporary directory, writes the manifest last, fsyncs and renames, so kill -9 at any moment leaves
the checkpoints that were there before. Nothing is ever unpickled. One process saves into a root.
"""

import errno
import hashlib
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from r1v3.files import (
    human_bytes,
    replace_directory,
    require_free_space,
    temporary_sibling,
    write_json,
)

MANIFEST = "manifest.json"
TENSORS = "trainer.safetensors"
STATE = "trainer.json"
_FORMAT = "r1v3-checkpoint-1"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PREFIX = "optimizer."
_UNUSED = "unused"
NamedParameters = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class CheckpointError(RuntimeError):
    """A checkpoint is incomplete or altered; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint: `tensors` own their memory, `state` is what JSON made of it."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path


def checkpoint_path(root: Path, step: int) -> Path:
    """`<root>/step-000040` for step 40."""
    return Path(root) / f"step-{step:06d}"


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    write_model: Callable[[Path], None],
    keep: int | None = 2,
    protect: Collection[int] = (),
) -> Path:
    """Save step `step` below `root` and then remove checkpoints beyond the newest `keep`.

    Args:
        tensors: any device and layout; stored on its own, bit by bit.
        state: JSON values with string keys and finite numbers (tuples come back as lists).
        write_model: fills the directory it is given with the model's files.
        keep: intact checkpoints to keep, the new one among them; None keeps all. There must be
            room for one more while saving: old ones go only after the new one is in place.
        protect: steps that are never removed.
    Returns:
        The directory. An existing checkpoint of the same step is replaced in one move.
    Raises:
        ValueError: a bad step, keep or state; nothing was written.
        OSError: no room (ENOSPC, found before or while writing); earlier checkpoints are intact.
    """
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(f"step must be >= 0 and keep >= 1 or None, got {step} and {keep}")
    _check_state("state", state)
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    needed = _estimate_bytes(root, tensors)
    require_free_space(root, needed, f"the checkpoint of step {step}")
    final = checkpoint_path(root, step)
    temporary = temporary_sibling(final)
    temporary.mkdir()
    try:
        write_model(temporary)
        _write_own_files(temporary, step, tensors, state)
        replace_directory(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _disk_full(error):
            free = shutil.disk_usage(root).free
            raise OSError(
                errno.ENOSPC,
                f"the disk became full while saving the checkpoint of step {step} (estimate "
                f"{human_bytes(needed)}, {human_bytes(free)} free without it; {error}); "
                "earlier checkpoints are intact",
                str(root),
            ) from error
        raise
    _remove_old(root, step, keep, protect)
    return final


def load_checkpoint(path: Path) -> Loaded:
    """Verify every file of the checkpoint directory `path` against its manifest and read it.

    Raises:
        CheckpointError: a file is missing, cut short or altered (named, with the expected and
            found size or hash), or the manifest is not one.
    """
    path = Path(path)
    step, state = _verify(path)
    # load_file maps the file: a copy gives aligned memory that outlives the file.
    tensors = {name: tensor.clone() for name, tensor in load_file(path / TENSORS).items()}
    return Loaded(step=step, tensors=tensors, state=state, path=path)


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint below `root` whose every file is intact, or None.

    Broken newer ones are named in a warning each and left where they are.
    """
    for _, path in sorted(_checkpoints(Path(root)), reverse=True):
        try:
            _verify(path)
        except CheckpointError as error:
            warnings.warn(f"checkpoint {path} is broken and is skipped: {error}", stacklevel=2)
        else:
            return path
    return None


def _write_own_files(
    directory: Path, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]
) -> None:
    for name in (MANIFEST, TENSORS, STATE):
        if (directory / name).exists():
            raise ValueError(f"write_model wrote {name}, a name the checkpoint itself needs")
    save_file(_storable(tensors), directory / TENSORS)
    write_json(directory / STATE, {"step": step, "state": state})
    mode = (directory / STATE).stat().st_mode & 0o777
    files = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            # safetensors makes files that only their owner can read, whatever the umask.
            file.chmod(mode)
            size, digest = file.stat().st_size, _sha256(file)
            files[file.relative_to(directory).as_posix()] = {"size": size, "sha256": digest}
    write_json(directory / MANIFEST, {"format": _FORMAT, "step": step, "files": files})


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU, contiguous, and no two in one storage, which safetensors refuses."""
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return stored


def _check_state(where: str, value: Any) -> None:
    """Refuse what JSON would change: a resumed run must see the state that was saved."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; keys must be strings")
            _check_state(f"{where}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_state(f"{where}[{index}]", item)
    elif value is not None and not isinstance(value, (bool, int, str, float)):
        raise ValueError(
            f"{where} is {value!r} ({type(value).__name__}); it must be a JSON value "
            "(put tensors into `tensors`)"
        )
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, which JSON cannot hold; use None")


def _estimate_bytes(root: Path, tensors: Mapping[str, Tensor]) -> int:
    """The new tensors plus what else the newest earlier checkpoint held (the model)."""
    own = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    for _, path in sorted(_checkpoints(root), reverse=True):
        try:
            _, files = _read_manifest(path)
        except CheckpointError:
            continue
        own += sum(size for name, (size, _) in files.items() if name != TENSORS)
        break
    return own + 64 * 1024  # the JSON files


def _disk_full(error: BaseException | None) -> bool:
    """Whether `error` came of a full disk; safetensors says so only in its message."""
    while error is not None:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if getattr(error, "errno", None) in _DISK_FULL or (code and int(code[1]) in _DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _remove_old(root: Path, step: int, keep: int | None, protect: Collection[int]) -> None:
    if keep is None:
        return
    complete = [
        number for number, path in _checkpoints(root) if number != step and _has_all_files(path)
    ]
    kept = sorted(complete, reverse=True)[: keep - 1]
    for number in set(complete) - {*kept, *protect}:
        path = checkpoint_path(root, number)
        # Renamed first: a kill in the middle must not leave half a checkpoint under its name.
        doomed = temporary_sibling(path)
        path.rename(doomed)
        shutil.rmtree(doomed)


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    matches = ((re.fullmatch(r"step-(\d{6,})", path.name), path) for path in root.iterdir())
    return [(int(match[1]), path) for match, path in matches if match and path.is_dir()]


def _has_all_files(path: Path) -> bool:
    try:
        _, files = _read_manifest(path)
        return all((path / name).stat().st_size == size for name, (size, _) in files.items())
    except (CheckpointError, OSError):
        return False


def _read_manifest(path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """Step, and size and SHA-256 by file name."""
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: {path} is not a complete checkpoint")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["format"] != _FORMAT:
            raise CheckpointError(f"{file} has format {document['format']!r}, expected {_FORMAT!r}")
        files = {str(name): (e["size"], e["sha256"]) for name, e in document["files"].items()}
        step = document["step"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a manifest: {error!r}") from None
    well_typed = type(step) is int and all(
        type(size) is int and isinstance(digest, str) for size, digest in files.values()
    )
    if not well_typed or not {TENSORS, STATE} <= files.keys():
        raise CheckpointError(f"{file} is not a manifest of {TENSORS}, {STATE} and a model")
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{file} names {name!r}, which is outside of the checkpoint")
    return step, files


def _verify(path: Path) -> tuple[int, dict[str, Any]]:
    """Check every file of a checkpoint; its step and state."""
    step, files = _read_manifest(path)
    for name, (size, digest) in files.items():
        file = path / name
        try:
            if not file.is_file():
                raise CheckpointError(f"{file} is missing (expected {size} bytes, sha256 {digest})")
            found_size = file.stat().st_size
            if found_size != size:
                raise CheckpointError(f"{file} has {found_size} bytes, expected {size}")
            found = _sha256(file)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        if found != digest:
            raise CheckpointError(f"{file} is altered: sha256 is {found}, expected {digest}")
    document = json.loads((path / STATE).read_text(encoding="utf-8"))
    if document["step"] != step:
        raise CheckpointError(
            f"{path / MANIFEST} is altered: step is {step}, expected {document['step']}"
        )
    return step, document["state"]


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: NamedParameters
) -> dict[str, Tensor]:
    """State of an AdamW-like optimizer by parameter name, for `save_checkpoint`.

    Args:
        named_parameters: `model.named_parameters()` or a dict; others than the optimizer's
            are ignored.
    Returns:
        "optimizer.<field>.<parameter>" for each tensor of the state (AdamW: exp_avg, exp_avg_sq
        and step), and an empty "optimizer.unused.<parameter>" where no step has used one yet.
        The tensors are the optimizer's own, not copies. Learning rates are not part of it.
    Raises:
        ValueError: a parameter without a name, or a state that is not made of tensors.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter, _ in _optimized(optimizer, named_parameters):
        state = optimizer.state.get(parameter, {})
        if not state:
            tensors[f"{_PREFIX}{_UNUSED}.{name}"] = torch.empty(0, dtype=torch.uint8)
        for field, value in state.items():
            if not isinstance(value, Tensor) or "." in field:
                raise ValueError(f"optimizer state {field!r} of {name} must be a tensor: {value!r}")
            tensors[f"{_PREFIX}{field}.{name}"] = value
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    named_parameters: NamedParameters,
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `optimizer_tensors` gave, bit for bit; keys of other things are ignored.

    Raises:
        ValueError: a parameter without saved state, saved state without its parameter, or a
            shape that is not the parameter's; the optimizer is unchanged.
    """
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(_PREFIX):
            field, _, name = key.removeprefix(_PREFIX).partition(".")
            saved.setdefault(name, {})[field] = tensor
    optimized = _optimized(optimizer, named_parameters)
    names = {name for name, _, _ in optimized}
    missing, unknown = names - saved.keys(), saved.keys() - names
    if missing:
        raise ValueError(f"no saved optimizer state for {_some(missing)}")
    if unknown:
        raise ValueError(f"saved optimizer state for {_some(unknown)}, which it does not optimize")
    restored = []
    for name, parameter, group in optimized:
        fields = saved[name]
        for field, tensor in fields.items():
            if field not in (_UNUSED, "step") and tensor.shape != parameter.shape:
                raise ValueError(
                    f"saved optimizer state {field!r} of {name} has shape {tuple(tensor.shape)}, "
                    f"the parameter has {tuple(parameter.shape)}"
                )
        on_device = group.get("capturable") or group.get("fused")
        state = {}
        for field, tensor in fields.items():
            if field != _UNUSED:
                device = parameter.device if field != "step" or on_device else "cpu"
                state[field] = tensor.detach().to(device, copy=True)
        restored.append((parameter, state))
    optimizer.state.clear()
    for parameter, state in restored:
        if state:
            optimizer.state[parameter] = state


def _optimized(
    optimizer: torch.optim.Optimizer, named_parameters: NamedParameters
) -> list[tuple[str, Tensor, dict[str, Any]]]:
    names: dict[int, str] = {}
    for name, parameter in dict(named_parameters).items():
        names.setdefault(id(parameter), name)
    optimized = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is "
                    "not in named_parameters"
                )
            optimized.append((names[id(parameter)], parameter, group))
    return optimized


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:5])
    return first if len(names) <= 5 else f"{first} and {len(names) - 5} more"
