"""Multiple-choice rows in VLMEvalKit's columns, asked in its layout."""

from collections.abc import Sequence

from r1v3.suite.question import Question, in_front, in_place, option_cells, with_options
from r1v3.suite.table import Row

SELECT = "Please select the correct answer from the options above."


def choice_question(
    row: Row,
    *,
    labels: Sequence[str] = (),
    request: str = SELECT,
    named_pictures: bool = False,
    unit: str = "",
) -> Question:
    """The question of a row with the columns index, question, hint, A, B, ..., answer.

    Args:
        labels: columns that name categories.
        request: the sentence below the options.
        named_pictures: the text says `<image 1>` where a picture stands.
    """
    options = option_cells(row.cells)
    asked = with_options(row["question"], options, row["hint"], request)
    prompt, pictures = (in_place if named_pictures else in_front)(asked, row.pictures)
    return Question(
        id=row["index"],
        prompt=prompt,
        pictures=pictures,
        text=with_options(row["question"], options, row["hint"]),
        gold=row["answer"].strip(),
        options=options,
        unit=unit,
        labels={name: row[name] for name in labels},
        cells=row.cells,
    )
