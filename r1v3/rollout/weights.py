"""Weights on their way to an inference engine: in buckets, or as a folder that servers load."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from r1v3.data.tokenizer import load_tokenizer
from r1v3.files import (
    fsync_directory,
    replace_directory,
    temporary_sibling,
    write_json,
    write_text,
)
from r1v3.model.conversion import load_config, weights
from r1v3.model.conversion.config import is_original, read_config
from r1v3.model.conversion.serving import write_serving_files
from r1v3.model.conversion.writer import save_tensors

CURRENT = "current"
_STEP = "step-"


def buckets(
    tensors: Iterable[tuple[str, Tensor]], max_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Group consecutive tensors into lists of at most `max_bytes`; a larger one stands alone.

    Raises:
        ValueError: max_bytes < 1.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes {max_bytes} must be at least 1")
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if bucket and size + bytes_ > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += bytes_
    if bucket:
        yield bucket


def in_layout(
    tensors: Iterable[tuple[str, Tensor]], model_folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """Rename HF-native weights to the names of a model folder's layout, native or original.

    The parts of a tensor that the original layout fuses (q, k and v of the vision tower) are held
    until all have come.

    Raises:
        ValueError: tensors are unknown, misshapen or missing, or config.json is of another model.
    """
    original = is_original(read_config(model_folder))
    places = {
        name: (weight, part)
        for weight in weights(load_config(model_folder))
        if not weight.tied
        for part, name in enumerate(weight.native)
    }
    held: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors:
        if name not in places:
            raise ValueError(f"{name} comes twice or is no weight of the model in {model_folder}")
        weight, part = places.pop(name)
        if tuple(tensor.shape) != weight.shapes[part]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, the model in {model_folder} has "
                f"{weight.shapes[part]}"
            )
        if not original:
            yield name, tensor
            continue
        stored, _ = weight.original_of(part)
        if len(weight.original) == len(weight.native):
            yield stored, tensor
            continue
        parts = held.setdefault(stored, {})
        parts[part] = tensor
        if len(parts) == len(weight.native):
            del held[stored]
            yield stored, torch.cat([parts[i] for i in range(len(parts))])
    if places:
        raise ValueError(f"{len(places)} weights did not come, such as {next(iter(places))}")


def publish(
    folder: Path,
    model_folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    step: int,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 4 << 30,
) -> Path:
    """Write a model folder `step-N` and point the link `current` at it, in one step.

    A reader of `current` sees the whole old folder or the whole new one. The previous folder is
    kept for servers that are still reading it; older ones are deleted.

    Args:
        folder: the parent of the step folders, on a file system that the servers share.
        model_folder: source of the configuration, the tokenizer and all other files but weights.
        tensors: weights by HF-native name, read one shard at a time; stored under the names of
            `model_folder`'s layout.
        dtype: to store floating-point weights in; None leaves theirs.
    Returns:
        The path of `current`.
    Raises:
        ValueError: as `in_layout`.
        OSError: writing failed; `current` is unchanged.
    """
    read_config(model_folder)
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_STEP}{step:08d}"
    temporary = temporary_sibling(final)
    temporary.mkdir()
    try:
        _copy_rest(model_folder, temporary)
        if (chat_template := load_tokenizer(model_folder).chat_template) is not None:
            # The servers' prompts must be the trainer's.
            write_text(temporary / "chat_template.jinja", str(chat_template))
        if not is_original(read_config(temporary)):
            write_serving_files(temporary)
        _write_shards(temporary, in_layout(tensors, model_folder), dtype, shard_bytes)
        replace_directory(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    current = folder / CURRENT
    before = Path(os.readlink(current)).name if current.is_symlink() else final.name
    link = temporary_sibling(current)
    link.symlink_to(final.name)
    os.replace(link, current)
    fsync_directory(folder)
    for old in folder.glob(f"{_STEP}*"):
        if old.name not in (final.name, before):
            shutil.rmtree(old)
    return current


def _copy_rest(source: Path, target: Path) -> None:
    """Copy every file of a model folder except the weights."""
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(path, target / path.name)


def _write_shards(
    target: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, shard_bytes: int
) -> None:
    """Write safetensors files and the index from tensor to file."""
    places: dict[str, str] = {}
    total = 0
    for number, bucket in enumerate(buckets(tensors, shard_bytes)):
        shard = {}
        for name, tensor in bucket:
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            # A copy: safetensors refuses tensors that share memory, as tied weights do.
            shard[name] = tensor.detach().cpu().contiguous().clone()
            total += shard[name].numel() * shard[name].element_size()
        file = f"model-{number + 1:05d}.safetensors"
        save_tensors(target / file, shard)
        places.update(dict.fromkeys(shard, file))
    write_json(
        target / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": places},
    )
