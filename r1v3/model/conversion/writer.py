"""Writing a sharded safetensors checkpoint tensor by tensor, none of it held in memory.

Names, dtypes and shapes are known beforehand, so every shard's header is written first and each
tensor then goes to its place in its file, in any order.
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from r1v3.files import fsync_directory, write_json
from r1v3.model.conversion.reader import DTYPES, INDEX_FILE, SINGLE_FILE

DEFAULT_SHARD_BYTES = 4 << 30
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file of contiguous tensors that share no memory, for transformers.

    safetensors makes files that only their owner can read; this one is as readable as any other.

    Raises:
        SafetensorError: writing failed.
    """
    file.touch()
    mode = file.stat().st_mode & 0o777
    save_file(dict(tensors), file, metadata={"format": "pt"})
    file.chmod(mode)


class ShardWriter:
    """Writes the tensors `entries` below `folder`: one file, or shards and their index.

    A context manager; leaving it without an error checks that every tensor was written, writes the
    index and makes the files durable. The files have their final names from the start: to write
    all or nothing, give it a temporary folder and rename that.

    Args:
        folder: exists and holds no checkpoint.
        entries: in the order of the shards.
        max_shard_bytes: of values in a file; a larger tensor has a file of its own.
    Raises:
        ValueError: a name occurs twice, or `max_shard_bytes` is not positive.
    """

    def __init__(
        self,
        folder: Path,
        entries: Sequence[Entry],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        if max_shard_bytes <= 0:
            raise ValueError(f"a shard's size must be positive, not {max_shard_bytes} bytes")
        if len({entry.name for entry in entries}) < len(entries):
            raise ValueError("two tensors have the same name")
        self.folder = folder
        self._shards = shards_of(entries, max_shard_bytes)
        self.files = list(self._shards)
        self._entries = {entry.name: entry for entry in entries}
        self._places: dict[str, tuple[str, int]] = {}
        self._waiting = {entry.name: entry.bytes for entry in entries}
        for file, shard in self._shards.items():
            self._begin(file, shard)

    def _begin(self, file: str, shard: Sequence[Entry]) -> None:
        """Create a file of the final size, its header written."""
        text, places = header(shard)
        self._places |= {name: (file, place) for name, place in places.items()}
        with open(self.folder / file, "xb") as opened:
            opened.write(text)
            opened.truncate(len(text) + sum(entry.bytes for entry in shard))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the announced dtype and shape, from any device.

        Raises:
            ValueError: it is another one, or was written before.
            OSError: the disk is full.
        """
        entry = self._entries[name]
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {entry.dtype} "
                f"{entry.shape}"
            )
        with self._place(name, 0, entry.bytes) as (target, place):
            _write_at(target, byte_values(tensor), place)

    def copy(self, name: str, source: int, begin: int, size: int, *, at: int = 0) -> None:
        """Copy `size` bytes from byte `begin` of the file descriptor `source` to byte `at` of it.

        Holes of a sparse source stay holes.

        Raises:
            ValueError: they are more than is left to write of the tensor.
            OSError: the disk is full, or the source ends too early.
        """
        end = begin + size
        with self._place(name, at, size) as (target, place):
            shift = place - begin
            while (extent := _data_extent(source, begin, end)) is not None:
                data, begin = extent
                while data < begin:
                    chunk = os.pread(source, min(_CHUNK_BYTES, begin - data), data)
                    if not chunk:
                        raise OSError(errno.EIO, f"the file of {name} ended while it was read")
                    _write_at(target, memoryview(chunk), data + shift)
                    data += len(chunk)

    @contextmanager
    def _place(self, name: str, at: int, size: int) -> Iterator[tuple[int, int]]:
        """The open file of a tensor and the place of its byte `at`; `size` bytes are then done."""
        if size > self._waiting.get(name, 0) or at + size > self._entries[name].bytes:
            raise ValueError(f"{name} was written before, or has no {size} bytes from {at}")
        file, place = self._places[name]
        with open(self.folder / file, "r+b", buffering=0) as opened:
            yield opened.fileno(), place + at
        self._waiting[name] -= size

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()

    def _finish(self) -> None:
        if unwritten := [name for name, left in self._waiting.items() if left]:
            raise ValueError(f"{len(unwritten)} tensors were not written, such as {unwritten[0]}")
        for file in self.files:
            with open(self.folder / file, "rb") as opened:
                os.fsync(opened.fileno())
        write_index(self.folder, self._shards)
        fsync_directory(self.folder)


def shards_of(entries: Sequence[Entry], limit: int) -> dict[str, list[Entry]]:
    """Divide tensors among files of at most `limit` bytes of values, in order; name the files."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def header(shard: Sequence[Entry]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the values of a file, and the place of each tensor, in order of place."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    offset = 0
    # Wide values first: then all are aligned to their own width.
    for entry in sorted(shard, key=lambda entry: -entry.dtype.itemsize):
        described[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        places[entry.name] = offset
        offset += entry.bytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    return text, {name: len(text) + place for name, place in places.items()}


def write_index(folder: Path, shards: Mapping[str, Sequence[Entry]]) -> None:
    """Write which file has which tensor, where there are several files."""
    if len(shards) == 1:
        return
    entries = [entry for shard in shards.values() for entry in shard]
    files = {entry.name: file for file, shard in shards.items() for entry in shard}
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(entry.shape) for entry in entries),
            "total_size": sum(entry.bytes for entry in entries),
        },
        "weight_map": dict(sorted(files.items())),
    }
    write_json(folder / INDEX_FILE, index)


def byte_values(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values, of its own memory where it is contiguous on the CPU."""
    values = tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
    return values.numpy().data


def _write_at(descriptor: int, data: memoryview, place: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data[:_CHUNK_BYTES], place)
        data, place = data[written:], place + written


def _data_extent(descriptor: int, begin: int, end: int) -> tuple[int, int] | None:
    """The first bytes from `begin` to `end` that are no hole, None if all are."""
    if begin >= end:
        return None
    try:
        data = os.lseek(descriptor, begin, os.SEEK_DATA)
        return (data, min(os.lseek(descriptor, data, os.SEEK_HOLE), end)) if data < end else None
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        return begin, end  # this file system cannot tell
