"""Reading a folder of safetensors: headers checked at once, values only where they are asked for.

The format is 8 bytes of header length (little endian), a JSON header, and the values; see
https://github.com/huggingface/safetensors. Files are mapped a block at a time and unmapped again,
so that reading a 77 GB checkpoint, or one column slice of it, needs one block of memory.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_HEADER_LIMIT = 100_000_000  # the format's own
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its values are `bytes` bytes from byte `begin`, row-major."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file.

    Raises:
        ValueError: the file is missing, cut short or damaged; the message names it and says where.
    """
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or not 0 < length <= min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"its header should end at byte {8 + length} of {size}")
            header = json.loads(opened.read(length))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file} cannot be read: its header is no JSON object")
    header.pop("__metadata__", None)
    found = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    end = max((stored.begin + stored.bytes for stored in found.values()), default=8 + length)
    if size != end:
        last = max(found.values(), key=lambda stored: stored.begin, default=None)
        raise ValueError(
            f"{file} cannot be read: it has {size} bytes, its header says {end}"
            + (f" (tensor {last.name} is cut short)" if last and size < end else "")
        )
    return found


def _entry(file: Path, name: str, entry: Any, data: int) -> Stored:
    try:
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        stored = Stored(name, file, dtype, shape, data + begin)
        valid = all(isinstance(size, int) and size >= 0 for size in shape) and begin >= 0
        valid = valid and end - begin == stored.bytes
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"{file} cannot be read: tensor {name} is described as {entry!r}")
    return stored


class Checkpoint(Mapping[str, Stored]):
    """The tensors of `model.safetensors`, or of the shards `model.safetensors.index.json` names.

    Opening reads the headers and checks them: files that are missing or cut short, tensors that
    the index places in a file that does not have them. Values are read by `copy_into` and `read`.
    A context manager; files are opened when first used and closed at its end.

    Raises:
        ValueError: as above; the message names file, tensor, expected and found.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._files: dict[Path, int] = {}
        if (self.folder / INDEX_FILE).is_file():
            self.tensors = _indexed(self.folder)
        elif (self.folder / SINGLE_FILE).is_file():
            self.tensors = read_header(self.folder / SINGLE_FILE)
        else:
            raise ValueError(f"model folder {self.folder} has no {SINGLE_FILE} and no {INDEX_FILE}")

    def __getitem__(self, name: str) -> Stored:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def description(self) -> str:
        """The file to name in messages."""
        files = {stored.file for stored in self.tensors.values()}
        return str(files.pop() if len(files) == 1 else self.folder / INDEX_FILE)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def descriptor(self, stored: Stored) -> int:
        """An open file descriptor of the file that holds a tensor; the checkpoint closes it."""
        if stored.file not in self._files:
            self._files[stored.file] = os.open(stored.file, os.O_RDONLY)
        return self._files[stored.file]

    def read(self, name: str) -> Tensor:
        """A whole tensor, in the shape and dtype it is stored in."""
        stored = self[name]
        result = torch.empty(stored.shape, dtype=stored.dtype)
        self.copy_into(result, name)
        return result

    def copy_into(self, target: Tensor, name: str, *, dim: int = 0, start: int = 0) -> None:
        """Copy `target.shape[dim]` rows (`dim` 0) or columns (1) from `start` into `target`.

        The other dimensions are whole. Values are converted to the dtype and device of `target`;
        only the pages of the file that hold the slice are read, 64 MiB of rows at a time.

        Raises:
            ValueError: the slice is not within the tensor, or along another dimension.
        """
        stored = self[name]
        whole = stored.shape or (1,)
        target = target if stored.shape else target.view(1)
        fits = target.dim() == len(whole) > dim <= 1
        if fits:
            sliced = (*whole[:dim], target.shape[dim], *whole[dim + 1 :])
            fits = target.shape == sliced and 0 <= start <= whole[dim] - target.shape[dim]
        if not fits:
            raise ValueError(
                f"{stored.file}: {name} has shape {stored.shape}; a slice of "
                f"{tuple(target.shape)} from {start} of dimension {dim} is not within it"
            )
        if target.numel() == 0:
            return
        row_bytes = math.prod(whole[1:]) * stored.dtype.itemsize
        step = max(1, _BLOCK_BYTES // row_bytes)
        first = start if dim == 0 else 0
        for row in range(0, len(target), step):
            rows = min(step, len(target) - row)
            block = self._block(stored, (first + row) * row_bytes, rows * row_bytes)
            block = block.view(rows, *whole[1:])
            if dim == 1:
                block = block.narrow(1, start, target.shape[1])
            target.narrow(0, row, rows).copy_(block)

    def _block(self, stored: Stored, offset: int, size: int) -> Tensor:
        """Map bytes of a tensor; the mapping lives as long as the returned flat tensor."""
        begin = stored.begin + offset
        skipped = begin % mmap.ALLOCATIONGRANULARITY
        # A private writable mapping: torch warns about tensors over read-only memory.
        mapped = mmap.mmap(
            self.descriptor(stored), skipped + size, access=mmap.ACCESS_COPY, offset=begin - skipped
        )
        count = size // stored.dtype.itemsize
        return torch.frombuffer(mapped, dtype=stored.dtype, count=count, offset=skipped)


def _indexed(folder: Path) -> dict[str, Stored]:
    index = folder / INDEX_FILE
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(placed.values()))
        if not all(name == Path(name).name for name in files):
            raise ValueError("a shard's name is no plain file name")
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read: {error!r}") from error
    if absent := [name for name in files if not (folder / name).is_file()]:
        raise ValueError(
            f"{index} names {len(files)} shards, of which {len(absent)} are missing: "
            + ", ".join(absent[:8])
        )
    held = {name: read_header(folder / name) for name in files}
    for tensor, name in placed.items():
        if tensor not in held[name]:
            raise ValueError(f"{index} says that {folder / name} has tensor {tensor}; it has not")
    for name, tensors in held.items():
        for tensor in tensors:
            if placed.get(tensor) != name:
                raise ValueError(
                    f"{folder / name} has tensor {tensor}, which {index} "
                    + (f"places in {placed[tensor]}" if tensor in placed else "does not name")
                )
    return {tensor: held[name][tensor] for tensor, name in placed.items()}
