"""The questions to ask: read from files one at a time, since their pictures do not fit in memory.

A question is known by a digest of what is asked: its turns, its pictures' files and its answer. A
row that repeats another one is the same question.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from r1v3.data.sample import Sample
from r1v3.data.schema import stream_samples
from r1v3.files import json_text


@dataclass(frozen=True)
class Question:
    """A row without its pictures.

    Attributes:
        id: 16 hexadecimal digits, see `question_id`.
        files: SHA-256 of its pictures' files.
        index: as in its file.
    """

    id: str
    text: str
    ground_truth: str
    options: tuple[str, ...] | None
    domain: str
    data_source: str
    split: str | None
    index: int | str
    files: tuple[str, ...]


def stream(paths: Sequence[Path], limit: int | None = None) -> Iterator[tuple[str, Sample]]:
    """Read the rows of files in order, each with the id of its question.

    Raises:
        ValueError: a file cannot be read or has wrong rows; names it.
    """
    rows = (sample for path in paths for sample in stream_samples(path))
    for sample in islice(rows, limit):
        yield question_id(sample), sample


def count_rows(paths: Sequence[Path], limit: int | None) -> int:
    """The number of rows that `stream` reads, wrong ones included; 0 for files it cannot read."""
    rows = 0
    for path in paths:
        try:
            if path.suffix == ".parquet":
                rows += pq.read_metadata(path).num_rows
            else:
                with path.open("rb") as file:
                    rows += sum(bool(line.strip()) for line in file)
        except (pa.ArrowException, OSError):
            return 0
    return rows if limit is None else min(rows, limit)


def stream_chosen(
    paths: Sequence[Path], limit: int | None, chosen: Collection[str]
) -> Iterator[tuple[str, Sample]]:
    """Read the rows of chosen questions, each once, in file order."""
    left = set(chosen)
    for id, sample in stream(paths, limit):
        if id in left:
            left.discard(id)
            yield id, sample
            if not left:
                return


def question_id(sample: Sample) -> str:
    """The id of the question that a sample asks."""
    told = [dict(turn) for turn in sample.prompt], _digests(sample), sample.ground_truth
    return hashlib.sha256(json_text(told).encode()).hexdigest()[:16]


def light(id: str, sample: Sample) -> Question:
    """The question without its pictures."""
    return Question(
        id,
        sample.question,
        sample.ground_truth,
        None if sample.options is None else tuple(sample.options),
        sample.domain or sample.ability or "other",
        sample.data_source,
        sample.split,
        sample.index,
        tuple(_digests(sample)),
    )


def _digests(sample: Sample) -> list[str]:
    return [hashlib.sha256(image).hexdigest() for image in sample.images]
