"""Append-only files: one line of JSON per entry, never rewritten.

The first line holds the settings that the entries depend on; other settings are another file. A
line that a crash tore is left out, and goes when the next entry is appended.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from r1v3.files import fsync_directory, json_text


class Journal:
    """One file, `<folder>/<stem>.<digest of the settings>.jsonl`.

    Attributes:
        path: of the file, which exists once something was appended.
    """

    def __init__(self, folder: Path, stem: str, settings: Mapping[str, Any]) -> None:
        self._header = json_text({"settings": settings}) + "\n"
        digest = hashlib.sha256(self._header.encode()).hexdigest()[:10]
        self.path = folder / f"{stem}.{digest}.jsonl"

    def read(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Read the entries so far: the number of each one's line, its position, and its fields.

        Raises:
            ValueError: the file is damaged before its last line; names the line.
        """
        if not self.path.exists():
            return
        position = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    fields = json.loads(line)
                    if not isinstance(fields, dict) or (number == 1 and "settings" not in fields):
                        raise ValueError("it holds other JSON")
                except ValueError as error:
                    raise damaged(self.path, number, error) from error
                if number > 1:
                    yield number, position, fields
                position += len(line)

    def read_at(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Read the entries at positions that `read` gave."""
        found = []
        if positions:
            with self.path.open("rb") as file:
                for position in positions:
                    file.seek(position)
                    found.append(json.loads(file.readline()))
        return found

    def append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Append entries in one write, on disk when this returns; a torn last line goes first."""
        if not entries:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            whole = _end_of_last_line(file, size)
            if whole < size:
                file.truncate(whole)
            text = "" if whole else self._header
            text += "".join(json_text(entry) + "\n" for entry in entries)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        if not whole:
            fsync_directory(self.path.parent)


def damaged(path: Path, number: int, error: Exception) -> ValueError:
    """Build the error for a line that cannot be read, by its number from 1."""
    return ValueError(
        f"{path} line {number} is damaged ({error}); remove that line to ask its question again"
    )


def _end_of_last_line(file: IO[bytes], size: int) -> int:
    """Where the last whole line ends, looked for from the end of a file."""
    position = size
    while position:
        start = max(0, position - (1 << 16))
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        position = start
    return 0
