"""Answers on disk: one line of JSON per sample, appended and never rewritten.

The first line holds the settings that the answers depend on; other settings are another file.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from r1v3.files import fsync_directory, json_text

Finish = Literal["stop", "length", "too long", "truncated picture"]


@dataclass(frozen=True)
class Answer:
    """One sample.

    Attributes:
        row: id of the question.
        sample: its number, from 0.
        seed: of the question's random numbers; sample k has the k-th share of them.
        text: as decoded, without the end-of-turn token.
        tokens: length, the end-of-turn token included.
        finish: `length` where the limit came first; `too long` and `truncated picture` were not
            asked.
        entropy: mean over sampled tokens in nats; None where the engine does not tell.
        ids: the tokens, where they are kept.
    """

    row: str
    sample: int
    seed: int
    text: str
    tokens: int
    finish: Finish
    entropy: float | None = None
    ids: list[int] | None = None


class AnswerFile:
    """The answers of one checkpoint to one benchmark in one mode."""

    def __init__(self, folder: Path, benchmark: str, mode: str, settings: dict[str, Any]) -> None:
        self._header = json_text({"settings": settings}) + "\n"
        digest = hashlib.sha256(self._header.encode()).hexdigest()[:10]
        self.path = folder / f"{benchmark}.{mode}.{digest}.jsonl"

    def read(self) -> Iterator[Answer]:
        """The answers so far, each row and sample once; a torn last line is left out.

        Raises:
            ValueError: the file is damaged before its last line; names the line.
        """
        if not self.path.exists():
            return
        seen = set()
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    return
                try:
                    fields = json.loads(line)
                    if number == 0:
                        fields["settings"]
                        continue
                    answer = Answer(**fields)
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(
                        f"{self.path} line {number + 1} is damaged ({error}); remove that line to "
                        "ask its question again"
                    ) from error
                if (answer.row, answer.sample) not in seen:
                    seen.add((answer.row, answer.sample))
                    yield answer

    def samples(self) -> dict[str, set[int]]:
        """The numbers of the samples that each row has."""
        found: dict[str, set[int]] = {}
        for answer in self.read():
            found.setdefault(answer.row, set()).add(answer.sample)
        return found

    def append(self, answers: Sequence[Answer]) -> None:
        """Append answers in one write, on disk when this returns; a torn last line goes first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            whole = _end_of_last_line(file, size)
            if whole < size:
                file.truncate(whole)
            text = "" if whole else self._header
            text += "".join(_line(answer) for answer in answers)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        if not whole:
            fsync_directory(self.path.parent)


def _line(answer: Answer) -> str:
    fields = asdict(answer)
    if answer.ids is None:
        del fields["ids"]
    return json_text(fields) + "\n"


def _end_of_last_line(file: Any, size: int) -> int:
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
