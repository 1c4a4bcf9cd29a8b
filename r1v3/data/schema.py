"""Files of samples (`r1v3.data.sample`): Parquet, as verl reads it, and JSON lines."""

from __future__ import annotations

import base64
import codecs
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1v3.data.parquet import read_rows, write_rows
from r1v3.data.rows import parse_row
from r1v3.data.sample import Sample
from r1v3.files import fsync_directory, temporary_sibling
from r1v3.progress import say

SHOWN_FAULTS = 10

_TEXT = pa.string()
_EXTRA_INFO: dict[str, pa.DataType] = {
    "domain": _TEXT,
    "options": pa.list_(_TEXT),
    "question": _TEXT,
    "answer": _TEXT,
    "response": _TEXT,
}


def load_samples(path: str | Path) -> list[Sample]:
    """All samples of a `.parquet` or `.jsonl` file, in order; raises as `stream_samples`.

    What is not used of the file is printed, in one line, once in a process.
    """
    return list(stream_samples(path))


def stream_samples(path: str | Path) -> Iterator[Sample]:
    """Read the samples of a `.parquet` or `.jsonl` file one at a time, in order.

    From the first wrong row on none is given, and all wrong rows are told at the end. What is not
    used of the file is printed, in one line, once in a process.

    Raises:
        ValueError: the file is missing, empty, damaged or of another kind, or rows are wrong. The
            message names the file and the first 10 wrong rows (JSON lines: line number from 1;
            Parquet: row index from 0), each with key and reason, and how many more there are.
    """
    faults: list[str] = []
    ignored: Counter[str] = Counter()
    empty = True
    for place, found in read_samples(path, ignored):
        if not isinstance(found, Sample):
            faults.append(f"{place}: {found}")
        elif not faults:
            empty = False
            yield found
    if faults:
        shown = "\n  ".join(faults[:SHOWN_FAULTS])
        more = len(faults) - SHOWN_FAULTS
        rest = f"\n  and {more} more" if more > 0 else ""
        raise ValueError(f"{path}: {len(faults)} wrong rows\n  {shown}{rest}")
    if empty:
        raise ValueError(f"{path}: the file holds no samples")
    if ignored:
        _say_once(f"{path}: ignored: {'; '.join(ignored)}")


@cache
def _say_once(line: str) -> None:
    say(line, shown=os.environ.get("RANK", "0") == "0")


def read_samples(path: str | Path, ignored: Counter[str]) -> Iterator[tuple[str, Sample | str]]:
    """Read a file row by row: the place of each, and its sample or what is wrong with it.

    Args:
        ignored: counts what is not used of the rows, in words.

    Raises:
        ValueError: the file is missing, damaged or of another kind.
    """
    path = Path(path)
    readers = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows}
    reader = readers.get(path.suffix)
    if reader is None:
        raise ValueError(f"{path}: the name must end in .parquet or .jsonl")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        for place, read in reader(path):
            try:
                yield place, parse_row(read(), folder=path.parent, ignored=ignored)
            except (ValueError, RecursionError, pa.ArrowException) as error:
                yield place, str(error)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


Row = tuple[str, Callable[[], Any]]


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield f"line {number}", lambda line=line: _json(line)  # type: ignore[misc]


def _json(line: bytes) -> Any:
    """One line; NaN, as Python writes it, may stand in `extra_info` only."""

    def constant(name: str) -> float:
        if name != "NaN":
            raise ValueError(f"{name} is not JSON")
        return math.nan

    try:
        row = json.loads(line.decode("utf-8"), parse_constant=constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from error
    rest = {k: v for k, v in row.items() if k != "extra_info"} if isinstance(row, dict) else row
    if b"NaN" in line:
        try:
            json.dumps(rest, allow_nan=False)
        except ValueError:
            raise ValueError("NaN is not JSON; only extra_info may hold it") from None
    return row


def _parquet_rows(path: Path) -> Iterator[Row]:
    for index, read in read_rows(path):
        yield f"row {index}", read


def write_samples(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write samples to a `.parquet` or `.jsonl` file, which replaces `path` only when complete.

    `samples` are gone through twice for Parquet, and never held: what reads them anew each time is
    written in bounded memory.

    Missing parent folders are made.

    Images are stored in the file: as bytes in Parquet, as base64 text in JSON lines. Loading the
    file gives equal samples. verl reads the Parquet file; it cannot read base64 images.

    Raises:
        ValueError: there are no samples, the name has another ending, or Parquet cannot hold the
            further keys of `extra_info` exactly (a key with another type in another row).
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: the name must end in .parquet or .jsonl")
    if not any(True for _ in samples):
        raise ValueError(f"{path}: there are no samples to write")
    if path.suffix == ".jsonl":
        with _replacing(path) as file:
            for sample in samples:
                file.write(_json_line(sample))
    else:
        schema = _parquet_schema(path, samples)
        with _replacing(path) as file:
            try:
                write_rows(file, schema, (sample.to_row() for sample in samples))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` once it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def _json_line(sample: Sample) -> bytes:
    row = sample.to_row()
    row["images"] = [{"bytes": base64.b64encode(image).decode()} for image in sample.images]
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"


def _parquet_schema(path: Path, samples: Iterable[Sample]) -> pa.Schema:
    """Schema of verl's layout; types of further keys and columns are taken from their values."""
    reward_model: dict[str, pa.DataType] = {"style": _TEXT, "ground_truth": _TEXT}
    extra_info: dict[str, pa.DataType] = {"split": _TEXT, **_EXTRA_INFO}
    rewards, extras, columns = [], [], []
    for sample in samples:  # only what the types follow from is held, neither texts nor pictures
        rewards.append({k: v for k, v in sample.reward_model.items() if k not in reward_model})
        extras.append({k: v for k, v in sample.extra_info.items() if k not in extra_info})
        columns.append(sample.columns)

    def further(name: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        keys = dict.fromkeys(key for part in parts for key in part)
        return {
            key: _exact_type(path, name.format(key), [part.get(key) for part in parts])
            for key in keys
        }

    index = _exact_type(path, "extra_info['index']", [extra.pop("index") for extra in extras])
    extra_info = {"split": _TEXT, "index": index, **_EXTRA_INFO}
    return pa.schema(
        {
            "data_source": _TEXT,
            "prompt": pa.list_(pa.struct({"role": _TEXT, "content": _TEXT})),
            "images": pa.list_(pa.struct({"bytes": pa.binary()})),
            "ability": _TEXT,
            "reward_model": pa.struct(reward_model | further("reward_model[{!r}]", rewards)),
            "extra_info": pa.struct(extra_info | further("extra_info[{!r}]", extras)),
            **further("column {!r}", columns),
        }
    )


def _exact_type(path: Path, name: str, values: list[Any]) -> pa.DataType:
    """The type in which Parquet gives these values back as they are.

    Raises:
        ValueError: there is none.
    """
    try:
        column = pa.table({"values": pa.array(values)})
        stored = pa.BufferOutputStream()
        pq.write_table(column, stored)
        back = pq.read_table(pa.BufferReader(stored.getvalue())).column("values")
        exact = json.dumps(back.to_pylist()) == json.dumps(values)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"{path}: Parquet cannot hold {name}: {error}") from error
    if not exact:
        raise ValueError(
            f"{path}: Parquet cannot hold {name} exactly; "
            "give it values of one type in every row, or write .jsonl"
        )
    return column.schema.field("values").type
