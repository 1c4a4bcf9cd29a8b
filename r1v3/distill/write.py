"""The files that other stages read: rows for `r1v3 sft`, and pass rates."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1v3.config import Distill
from r1v3.data.sample import Sample
from r1v3.data.schema import write_samples
from r1v3.distill.chain import read_chain
from r1v3.distill.choose import Candidate, difficulty
from r1v3.distill.questions import Question, stream_chosen
from r1v3.files import json_text, write_text
from r1v3.journal import Journal


@dataclass(frozen=True)
class Rows:
    """Rows with their responses, read anew each time they are gone through.

    Attributes:
        places: of the answers, by (row, sample).
    """

    config: Distill
    chosen: Sequence[Candidate]
    answers: Journal
    places: Mapping[tuple[str, int], int]
    split: str

    def __iter__(self) -> Iterator[Sample]:
        by_row: dict[str, list[Candidate]] = {}
        for one in self.chosen:
            by_row.setdefault(one.row, []).append(one)
        for row, sample in stream_chosen(self.config.questions, self.config.limit, by_row):
            entries = self.answers.read_at([self.places[row, one.sample] for one in by_row[row]])
            for one, entry in zip(by_row[row], entries, strict=True):
                yield sft_row(sample, one, read_chain(entry).response, self.split)


def sft_row(sample: Sample, one: Candidate, response: str, split: str) -> Sample:
    """A row of the SFT file: the question as it was, and the chain as its response.

    Further keys and columns of the question's file are left out: those of several files need not
    fit together.
    """
    extra = {
        "split": split,
        "index": f"{one.row}-{one.sample}",
        "domain": one.domain,
        "options": sample.options,
        "question": sample.question,
        "answer": sample.ground_truth,
        "response": response,
        "thinking": True,
        "source_index": str(sample.index),
        "pass_rate": one.pass_rate,
        "score": one.score,
    }
    return Sample(
        data_source=sample.data_source,
        prompt=sample.prompt,
        images=sample.images,
        ability=sample.ability,
        reward_model={"style": "rule", "ground_truth": sample.ground_truth},
        extra_info=extra,
    )


def write_rows_of(rows: Rows, path: Path) -> None:
    """Write the file for `r1v3 sft`; without rows, remove an older one."""
    if rows.chosen:
        write_samples(path, rows)
    else:
        path.unlink(missing_ok=True)


def write_pass_rates(
    path: Path, questions: Sequence[Question], right: Mapping[str, tuple[int, int]]
) -> None:
    """Write one line of JSON per question that has answers.

    Args:
        right: (right answers, answers) by question.
    """
    lines = []
    for question in questions:
        correct, count = right.get(question.id, (0, 0))
        if count:
            rate = round(correct / count, 6)
            told = {
                "id": question.id,
                "data_source": question.data_source,
                "split": question.split,
                "index": question.index,
                "domain": question.domain,
                "answers": count,
                "right": correct,
                "pass_rate": rate,
                "difficulty": difficulty(rate),
            }
            lines.append(json_text(told) + "\n")
    write_text(path, "".join(lines))
