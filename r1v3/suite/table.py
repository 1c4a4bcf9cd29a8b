"""Benchmark files as they are published: VLMEvalKit's TSV tables and Parquet files, read as text.

Every cell is a string and an empty one is absent; nothing is guessed to be a number. Pictures are
the largest part of a file and are not held: `read_table` keeps the other cells, and `pictures`
streams through the file again.
"""

import ast
import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1v3.data.parquet import read_rows
from r1v3.data.rows import image_bytes

_PICTURE_COLUMN = re.compile(r"image(?:_?path|s|_\d+)?|decoded_image")
# A shorter picture cell is the index of the row whose picture it shows.
_LONGEST_REFERENCE = 64
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")


@dataclass(frozen=True)
class File:
    """A published file.

    Attributes:
        name: below the data folder.
        md5: of the published file; None where none is known, so that any file is taken.
    """

    name: str
    md5: str | None = None


@dataclass(frozen=True)
class Row:
    """One row without its pictures.

    Attributes:
        cells: text by column; an absent cell is "".
        pictures: number of pictures.
    """

    cells: Mapping[str, str]
    pictures: int

    def __getitem__(self, column: str) -> str:
        return self.cells.get(column, "")


@dataclass(frozen=True)
class Table:
    """A file, read.

    Attributes:
        rows: in file order.
        columns: in file order, without pictures.
        sha256, md5: of the whole file.
        official: whether the md5 is that of the published file; None where none is known.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    sha256: str
    md5: str
    official: bool | None


def read_table(folder: Path, file: File, *, allow_other: bool = False) -> Table:
    """Read a file of the data folder.

    Raises:
        ValueError: it is missing or malformed, or not the published one and `allow_other` is False.
    """
    path = folder / file.name
    if not path.is_file():
        raise ValueError(f"{path} is missing; put the benchmark's file there, or leave it out")
    sha256, md5 = _digests(path)
    official = None if file.md5 is None else md5 == file.md5
    if official is False and not allow_other:
        raise ValueError(
            f"{path} has md5 {md5}, the published file has {file.md5}: another version gives "
            "numbers that cannot be compared; set allow_other_files=true to use it all the same"
        )
    if path.suffix == ".parquet":
        rows = tuple(_parquet_row(make()) for _, make in read_rows(path))
    else:
        rows = tuple(_tsv_row(cells) for cells in _tsv(path))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return Table(path, tuple(rows[0].cells), rows, sha256, md5, official)


def pictures(table: Table, wanted: Sequence[int]) -> Iterator[tuple[int, list[bytes]]]:
    """Stream the pictures of rows, given by ascending number, as encoded files.

    Raises:
        ValueError: a picture is no base64 or a path out of the folder; names file and row.
    """
    asked = set(wanted)
    if table.path.suffix == ".parquet":
        for number, make in read_rows(table.path):
            if number in asked:
                yield number, _parquet_pictures(make())
        return
    shared = _referenced(table, asked)
    for number, cells in enumerate(_tsv(table.path)):
        if number not in asked:
            continue
        try:
            parts = [shared.get(part, part) for part in _picture_parts(cells)]
            yield number, [_decode(part, table.path.parent) for part in parts]
        except ValueError as error:
            raise ValueError(f"{table.path} row {number}: picture {error}") from error


def _digests(path: Path) -> tuple[str, str]:
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            md5.update(block)
    return sha256.hexdigest(), md5.hexdigest()


def _tsv(path: Path) -> Iterator[dict[str, str]]:
    """Cells of every row by column."""
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, dialect="excel-tab", strict=True)
            columns = tuple(next(reader, ()))
            if len(set(columns)) < len(columns):
                raise ValueError("two columns have the same name")
            for number, cells in enumerate(reader):
                if len(cells) != len(columns):
                    raise ValueError(
                        f"row {number} has {len(cells)} cells, the header {len(columns)}"
                    )
                yield dict(zip(columns, cells, strict=True))
    except (csv.Error, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is no table of tab-separated text: {error}") from error


def _tsv_row(cells: dict[str, str]) -> Row:
    plain = {name: text for name, text in cells.items() if not _PICTURE_COLUMN.fullmatch(name)}
    return Row(plain, len(_picture_parts(cells)))


def _picture_parts(cells: Mapping[str, str]) -> list[str]:
    """The pictures of a row: base64 text, paths, or the index of the row that has them."""
    cell = cells.get("image", "") or cells.get("image_path", "")
    if cell.startswith("["):
        return [one or other for one, other in _QUOTED.findall(cell)]
    return [cell] if cell else []


def _referenced(table: Table, asked: set[int]) -> dict[str, str]:
    """Picture cells by index, of the rows that other rows refer to."""
    names = {
        part
        for number, cells in enumerate(_tsv(table.path))
        if number in asked and cells.get("image")
        for part in _picture_parts(cells)
        if len(part) <= _LONGEST_REFERENCE
    }
    if not names:
        return {}
    return {
        cells["index"]: parts[0]
        for cells in _tsv(table.path)
        if cells.get("index") in names
        if (parts := _picture_parts(cells)) and len(parts[0]) > _LONGEST_REFERENCE
    }


def _decode(part: str, folder: Path) -> bytes:
    looks_like_path = re.search(r"\.\w{3,4}\Z", part) is not None
    return image_bytes(part if looks_like_path else {"bytes": part}, folder)


def _parquet_row(values: dict[str, Any]) -> Row:
    plain = {
        name: _as_text(value)
        for name, value in values.items()
        if not _PICTURE_COLUMN.fullmatch(name)
    }
    return Row(plain, len(_parquet_pictures(values)))


def _as_text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else repr(value)


def _parquet_pictures(values: dict[str, Any]) -> list[bytes]:
    found = []
    for name, value in values.items():
        if _PICTURE_COLUMN.fullmatch(name):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, dict) and isinstance(one.get("bytes"), bytes):
                    found.append(one["bytes"])
                elif isinstance(one, bytes):
                    found.append(one)
    return found


def read_list(cell: str) -> tuple[str, ...]:
    """The texts of a cell that holds a list as Python or JSON writes it, else its text alone."""
    found = read_value(cell)
    if isinstance(found, list | tuple):
        return tuple(str(item) for item in found)
    return (cell,) if cell else ()


def read_mapping(cell: str) -> dict[str, Any]:
    """The entries of a cell that holds a mapping as Python or JSON writes it; else none."""
    found = read_value(cell)
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def read_value(cell: str) -> Any:
    """The value that a cell holds as JSON or Python writes it, else None."""
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
