"""Answers on disk, see `r1v3.journal`: one line per sample."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from r1v3.journal import Journal, damaged

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
        critical_tokens: how many of them are critical, as `monitor.words` had them when it was
            asked; see `r1v3.data.words`.
        critical_entropy: mean over these, in nats; None where there are none, or as `entropy`.
        ids: the tokens, where they are kept.
    """

    row: str
    sample: int
    seed: int
    text: str
    tokens: int
    finish: Finish
    entropy: float | None = None
    critical_tokens: int = 0
    critical_entropy: float | None = None
    ids: list[int] | None = None


class AnswerFile:
    """The answers of one checkpoint to one benchmark in one mode."""

    def __init__(self, folder: Path, benchmark: str, mode: str, settings: dict[str, Any]) -> None:
        self._journal = Journal(folder, f"{benchmark}.{mode}", settings)
        self.path = self._journal.path

    def read(self) -> Iterator[Answer]:
        """The answers so far, each row and sample once; a torn last line is left out.

        Raises:
            ValueError: the file is damaged before its last line; names the line.
        """
        seen = set()
        for number, _, fields in self._journal.read():
            try:
                answer = Answer(**fields)
            except TypeError as error:
                raise damaged(self.path, number, error) from error
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
        self._journal.append([_fields(answer) for answer in answers])


def _fields(answer: Answer) -> dict[str, Any]:
    fields = asdict(answer)
    if answer.ids is None:
        del fields["ids"]
    return fields
