"""Trainer checkpoints: directories that are complete or absent, verified on reading.

`<root>/step-000040/` holds the model as the engine wrote it (Hugging Face files, loadable as they
are), `trainer.safetensors` (optimizer moments and other tensors), `trainer.json` (seeds, counters)
and `manifest.json`, which lists every other file with its size and SHA-256. A save fills a hidden
temporary directory, writes the manifest last, fsyncs and renames, so kill -9 at any moment leaves
the earlier checkpoints intact. Of an older checkpoint only the model may be kept: its other files
are gone, and its manifest says so. Nothing is ever unpickled. One job saves into a root: its ranks
call these functions together, see the same file system, and each hashes a part of the files.
"""

import errno
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from r1v3.engine.contract import Writing
from r1v3.files import (
    FileDigest,
    digest_of,
    human_bytes,
    read_json_object,
    remove_leftovers,
    replace_directory,
    require_free_space,
    temporary_sibling,
    write_json,
)
from r1v3.ranks import ALONE, Ranks

MANIFEST = "manifest.json"
TENSORS = "trainer.safetensors"
STATE = "trainer.json"
_FORMAT = "r1v3-checkpoint-2"
_MODEL_FORMAT = "r1v3-checkpoint-2, model only"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CheckpointError(RuntimeError):
    """A checkpoint is incomplete or altered; the message names the file and the damage."""


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint; `tensors` own their memory, `state` has been through JSON."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path


def checkpoint_path(root: Path, step: int) -> Path:
    """`<root>/step-000040` for step 40."""
    return Path(root) / f"step-{step:06d}"


def start_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    write_model: Callable[[Path], Writing | None],
    model_bytes: int = 0,
    keep: int | None = 2,
    keep_models: int | None = 0,
    ranks: Ranks = ALONE,
) -> "PendingCheckpoint":
    """Start to save step `step` below `root`; `PendingCheckpoint.finish` moves it into place.

    `finish` also reduces checkpoints beyond the newest `keep` to their models, and removes those
    beyond the newest `keep_models` of these.

    Args:
        tensors: of any device and layout; the first rank stores each one on its own, bit for bit.
        state: JSON values with string keys and finite numbers (tuples come back as lists).
        write_model: fills the directory it is given with the model's files; or starts to, and
            returns the writing to wait for.
        model_bytes: of these files, so that the first checkpoint is refused as well where there is
            no room for it; later ones are compared with the one before, too.
        keep: intact checkpoints to keep, the new one included; None keeps all. The disk needs
            room for one more, because old ones go only after the new one is in place.
        keep_models: older checkpoints to keep the models of; None keeps all.
        ranks: the processes that save together.
    Raises:
        ValueError: step < 0, keep < 1, keep_models < 0, or a state that JSON would change; nothing
            was written.
        OSError: no room (ENOSPC, found before or while writing); earlier checkpoints are intact.
    """
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(f"step must be >= 0 and keep >= 1 or None, got {step} and {keep}")
    if keep_models is not None and keep_models < 0:
        raise ValueError(f"keep_models must be >= 0 or None, got {keep_models}")
    _check_state("state", state)
    root = Path(root)
    needed = _estimate_bytes(root, tensors, model_bytes)

    def prepare() -> Path:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root, ".step-*.tmp")
        require_free_space(root, needed, f"the checkpoint of step {step}")
        temporary = temporary_sibling(checkpoint_path(root, step))
        temporary.mkdir()
        return temporary

    kept = (keep, keep_models)
    pending = PendingCheckpoint(root, step, ranks.on_main(prepare), needed, kept, ranks)
    with pending.cleaned_up():
        pending.writing = write_model(pending.temporary)
        ranks.on_main(lambda: _write_own_files(pending.temporary, step, tensors, state))
    return pending


@dataclass
class PendingCheckpoint:
    """A checkpoint whose files are written, or being written, under a temporary name."""

    root: Path
    step: int
    temporary: Path
    needed: int
    kept: tuple[int | None, int | None]
    ranks: Ranks
    writing: Writing | None = None

    def written(self) -> bool:
        """Whether all files are written, so that `finish` need not wait; the same on every rank."""
        return self.writing is None or self.writing.done()

    def finish(self) -> Path:
        """Wait for the files, write the manifest, move the checkpoint into place; return its path.

        A checkpoint of the same step is replaced in one move.
        """
        final = checkpoint_path(self.root, self.step)

        def place() -> None:
            replace_directory(self.temporary, final)
            remove_old(self.root, self.step, *self.kept)

        with self.cleaned_up():
            if self.writing is not None:
                self.writing.wait()
            self.ranks.barrier()
            digests = {} if self.writing is None else self.writing.digests
            _write_manifest(self.temporary, self.step, self.ranks, digests)
            self.ranks.on_main(place)
        return final

    @contextmanager
    def cleaned_up(self) -> Iterator[None]:
        """On an error, remove the files; a full disk becomes an OSError that says so."""
        try:
            yield
        except BaseException as error:
            shutil.rmtree(self.temporary, ignore_errors=True)
            if _disk_full(error):
                free = shutil.disk_usage(self.root).free
                raise OSError(
                    errno.ENOSPC,
                    f"the disk became full while saving the checkpoint of step {self.step} "
                    f"(estimate {human_bytes(self.needed)}, {human_bytes(free)} free without it; "
                    f"{error}); earlier checkpoints are intact",
                    str(self.root),
                ) from error
            raise


def load_checkpoint(path: Path, ranks: Ranks = ALONE) -> Loaded:
    """Verify every file of the checkpoint `path` against its manifest, and read it.

    Raises:
        CheckpointError: a file is missing, cut short or altered (named, with the expected and
            found size or hash), or the manifest is not one.
    """
    path = Path(path)
    step, state = _verify(path, ranks)
    # load_file maps the file: a copy gives aligned memory that outlives the file.
    tensors = {name: tensor.clone() for name, tensor in load_file(path / TENSORS).items()}
    return Loaded(step=step, tensors=tensors, state=state, path=path)


def load_latest(root: Path, ranks: Ranks = ALONE) -> Loaded | None:
    """Verify and read the newest checkpoint below `root` that is intact; None where there is none.

    A broken newer one is named in a warning of the first rank and left where it is.
    """
    for _, path in sorted(_checkpoints(Path(root)), reverse=True):
        if is_model_only(path):
            continue
        try:
            return load_checkpoint(path, ranks)
        except CheckpointError as error:
            if ranks.is_main:
                warnings.warn(f"checkpoint {path} is broken and is skipped: {error}", stacklevel=2)
    return None


def _write_own_files(
    directory: Path, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]
) -> None:
    for name in (MANIFEST, TENSORS, STATE):
        if (directory / name).exists():
            raise ValueError(f"write_model wrote {name}, a name the checkpoint itself needs")
    save_file(_storable(tensors), directory / TENSORS)
    write_json(directory / STATE, {"step": step, "state": state})


def _write_manifest(
    directory: Path, step: int, ranks: Ranks, own: Mapping[str, FileDigest]
) -> None:
    """Write sizes and digests of all files; what no rank hashed while writing is shared among all.

    Args:
        own: the digests that this rank has.
    """
    mode = (directory / STATE).stat().st_mode & 0o777
    names = sorted(
        file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()
    )
    known = {name: digest for part in ranks.gather(dict(own)) for name, digest in part.items()}
    found = {}
    for name in [name for name in names if name not in known][ranks.rank :: ranks.size]:
        # safetensors makes files that only their owner can read, whatever the umask.
        (directory / name).chmod(mode)
        found[name] = digest_of(directory / name)
    digests = known | {
        name: digest for part in ranks.gather(found) for name, digest in part.items()
    }
    files = {name: {"size": size, "sha256": sha} for name, (size, sha) in sorted(digests.items())}
    document = {"format": _FORMAT, "step": step, "files": files}
    ranks.on_main(lambda: write_json(directory / MANIFEST, document))


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: on the CPU, contiguous, no two in one storage."""
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


def _estimate_bytes(root: Path, tensors: Mapping[str, Tensor], model_bytes: int) -> int:
    """Bytes of the new tensors and of the model, which may be the newest earlier checkpoint's."""
    own = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    for _, path in sorted(_checkpoints(root), reverse=True):
        try:
            _, files = _read_manifest(path)
        except CheckpointError:
            continue
        earlier = sum(size for name, (size, _) in files.items() if name != TENSORS)
        model_bytes = max(model_bytes, earlier)
        break
    return own + model_bytes + 64 * 1024  # the JSON files


def _disk_full(error: BaseException | None) -> bool:
    """Whether a full disk caused `error`; safetensors says so only in its message."""
    while error is not None:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if getattr(error, "errno", None) in _DISK_FULL or (code and int(code[1]) in _DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def remove_old(root: Path, step: int, keep: int | None, keep_models: int | None = 0) -> None:
    """Keep the newest `keep` complete checkpoints, of which `step` is one, and older models.

    Older checkpoints are reduced to their models; of these the newest `keep_models` stay.
    """
    if keep is None:
        return
    others = sorted((n, path) for n, path in _checkpoints(root) if n != step)
    models = [number for number, path in others if is_model_only(path)]
    complete = [number for number, path in others if _has_all_files(path)]
    old = complete[: max(0, len(complete) - (keep - 1))]
    candidates = sorted(models + old)
    gone = 0 if keep_models is None else max(0, len(candidates) - keep_models)
    for number in candidates[:gone]:
        path = checkpoint_path(root, number)
        # Renamed first: a kill in the middle must not leave half a checkpoint under its name.
        doomed = temporary_sibling(path)
        path.rename(doomed)
        shutil.rmtree(doomed)
    for number in sorted(set(candidates[gone:]) & set(old)):
        _reduce(checkpoint_path(root, number))


def model_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint's model, which transformers loads."""
    reserved = (MANIFEST, STATE, TENSORS)
    return [path for path in checkpoint.iterdir() if path.is_file() and path.name not in reserved]


def is_model_only(checkpoint: Path) -> bool:
    """Whether a checkpoint was reduced to its model, so that it cannot be resumed from."""
    try:
        return bool(read_json_object(checkpoint / MANIFEST).get("format") == _MODEL_FORMAT)
    except (OSError, ValueError):
        return False


def _reduce(path: Path) -> None:
    """Put a folder with the model alone in the place of a checkpoint, in one move."""
    temporary = temporary_sibling(path)
    temporary.mkdir()
    _, files = _read_manifest(path)
    kept = {}
    for file in model_files(path):
        try:
            os.link(file, temporary / file.name)
        except OSError:  # not on every file system
            shutil.copyfile(file, temporary / file.name)
        size, digest = files[file.name]
        kept[file.name] = {"size": size, "sha256": digest}
    step = int(path.name.removeprefix("step-"))
    write_json(temporary / MANIFEST, {"format": _MODEL_FORMAT, "step": step, "files": kept})
    replace_directory(temporary, path)


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
    """Read the step, and size and SHA-256 by file name."""
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: {path} is not a complete checkpoint")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["format"] == _MODEL_FORMAT:
            raise CheckpointError(
                f"{path} holds only its model, to select from; the rest was removed for space "
                "(`keep` checkpoints can be resumed from)"
            )
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


def _verify(path: Path, ranks: Ranks = ALONE) -> tuple[int, dict[str, Any]]:
    """Check every file of a checkpoint, each rank a part; return its step and state."""
    step, files = _read_manifest(path)
    problem = None
    for name in sorted(files)[ranks.rank :: ranks.size]:
        problem = problem or _problem(path / name, *files[name])
    problems = [found for found in ranks.gather(problem) if found is not None]
    if problems:
        raise CheckpointError(problems[0])
    document = json.loads((path / STATE).read_text(encoding="utf-8"))
    if document["step"] != step:
        raise CheckpointError(
            f"{path / MANIFEST} is altered: step is {step}, expected {document['step']}"
        )
    return step, document["state"]


def _problem(file: Path, size: int, digest: str) -> str | None:
    """Describe the damage of a file of a checkpoint; None where there is none."""
    try:
        if not file.is_file():
            return f"{file} is missing (expected {size} bytes, sha256 {digest})"
        if (found_size := file.stat().st_size) != size:
            return f"{file} has {found_size} bytes, expected {size}"
        if (found := digest_of(file)[1]) != digest:
            return f"{file} is altered: sha256 is {found}, expected {digest}"
    except OSError as error:
        return f"{file} cannot be read: {error}"
    return None
