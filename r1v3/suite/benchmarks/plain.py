"""Rows whose question is one text, with its choices in it or beside it."""

from collections.abc import Sequence

from r1v3.suite.question import Question, in_front, in_place
from r1v3.suite.table import Row

BOX = "Put the final answer in \\boxed{}."


def plain_question(
    row: Row,
    *,
    id_column: str = "index",
    text: str | None = None,
    request: str = "",
    gold: str | None = None,
    options: Sequence[str] = (),
    labels: dict[str, str] | None = None,
    named_pictures: bool = False,
) -> Question:
    """The question of a row.

    Args:
        text: by default the column `question`.
        request: a sentence below it, which a judge is not shown.
        gold: by default the column `answer`.
        options: texts of the options, where they are known.
    """
    asked = row["question"] if text is None else text
    shown = f"{asked}\n{request}" if request else asked
    prompt, pictures = (in_place if named_pictures else in_front)(shown, row.pictures)
    return Question(
        id=row[id_column],
        prompt=prompt,
        pictures=pictures,
        text=asked,
        gold=(row["answer"] if gold is None else gold).strip(),
        options=tuple(options),
        labels=labels or {},
        cells=row.cells,
    )
