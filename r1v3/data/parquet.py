"""Rows of Parquet files of any size: written and read in pieces that are bounded by bytes.

Arrow holds at most 2 GiB of pictures in one piece of a nested column. Row groups are therefore
closed by their bytes, and files of others, whose row groups may be larger, are read a few rows at a
time from a memory map.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP = 256
GROUP_BYTES = 128 << 20
ROWS_PER_BATCH = 16
BATCH_BYTES = 64 << 20
LARGEST_ROW = (1 << 31) - (1 << 20)

# Texts that repeat. Pictures do not, and a dictionary of them would hide their size.
_DICTIONARIES = (
    "data_source",
    "ability",
    "prompt.list.element.role",
    "reward_model.style",
    "extra_info.split",
    "extra_info.domain",
)
# What Arrow raises where a batch does not fit one piece.
_TOO_LARGE = (pa.ArrowNotImplementedError, pa.ArrowCapacityError)


def row_bytes(value: Any) -> int:
    """About how many bytes the texts and pictures of a row take."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(row_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(row_bytes(item) for item in value)
    return 8


def write_rows(file: IO[bytes], schema: pa.Schema, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows in groups of at most `ROWS_PER_GROUP` rows and, of several rows, `GROUP_BYTES`.

    Raises:
        ValueError: a row holds more than Arrow can, about 2 GiB.
    """
    group: list[Mapping[str, Any]] = []
    held = 0
    with pq.ParquetWriter(
        file, schema, use_dictionary=list(_DICTIONARIES), write_page_checksum=True
    ) as writer:
        for number, row in enumerate(rows):
            size = row_bytes(row)
            if size > LARGEST_ROW:
                raise ValueError(f"row {number} holds {size} bytes; a row may hold {LARGEST_ROW}")
            if group and (len(group) == ROWS_PER_GROUP or held + size > GROUP_BYTES):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group, held = [], 0
            group.append(row)
            held += size
        writer.write_table(pa.Table.from_pylist(group, schema=schema))


def read_rows(path: Path) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    """Read the rows of a file: each one's index and what makes it a dictionary.

    Raises:
        ValueError: it is not a readable Parquet file, or a row holds more than 2 GiB.
    """
    try:
        with pq.ParquetFile(
            path, memory_map=True, pre_buffer=False, page_checksum_verification=True
        ) as file:
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                for i, one in enumerate(_group_rows(file, group)):
                    yield first + i, lambda one=one: one.to_pylist()[0]  # type: ignore[misc]
                first += count
    except _TOO_LARGE as error:
        raise ValueError(f"{path}: a row holds more than 2 GiB: {error}") from error
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ValueError(f"{path}: is not a readable Parquet file: {error}") from error


def _group_rows(file: pq.ParquetFile, group: int) -> Iterator[pa.RecordBatch]:
    """Batches of one row.

    The sizes in a file's metadata do not show how its bytes are spread over the rows, nor how often
    an entry of a dictionary is used: where several rows do not fit, they are read one by one.
    """
    told = file.metadata.row_group(group)
    wanted = BATCH_BYTES * told.num_rows // max(1, told.total_byte_size)
    size = max(1, min(ROWS_PER_BATCH, wanted))
    done = 0
    try:
        for one in _rows_by(file, group, size):
            yield one
            done += 1
        return
    except _TOO_LARGE:
        if size == 1:
            raise
    for i, one in enumerate(_rows_by(file, group, 1)):
        if i >= done:
            yield one


def _rows_by(file: pq.ParquetFile, group: int, size: int) -> Iterator[pa.RecordBatch]:
    for batch in file.iter_batches(batch_size=size, row_groups=[group]):
        for i in range(batch.num_rows):
            yield batch.slice(i, 1)
