"""The questions that are worth asking: each once, readable, and in no evaluation set."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from r1v3.config import Distill
from r1v3.data.special_tokens import SPECIAL_TOKENS
from r1v3.distill.duplicates import Pixels, Seen, Shown
from r1v3.distill.questions import Question, light, stream
from r1v3.rewards.combine import with_options

DROPPED = (
    "repeated row",
    "special token",
    "unreadable picture",
    "contaminated",
    "near-duplicate",
)


@dataclass
class Survey:
    """The questions of a run.

    Attributes:
        rows: in the files.
        questions: to ask, in file order.
        dropped: rows that are not asked, by reason.
        examples: for each reason some (text, why or of which other question).
        characters, pictures: of all questions to ask.
    """

    rows: int = 0
    questions: list[Question] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    characters: int = 0
    pictures: int = 0

    def drop(self, why: str, text: str, other: str, most: int) -> None:
        """Count a row that is not asked."""
        self.dropped[why] += 1
        shown = self.examples.setdefault(why, [])
        if len(shown) < most:
            shown.append((text, other))


def survey(
    config: Distill, pixels: Pixels, evaluation: Seen, notify: Callable[[int], None]
) -> Survey:
    """Read all rows once.

    Args:
        evaluation: the questions that must not be asked.
        notify: told the number of rows read so far.

    Raises:
        ValueError: a file cannot be read, holds wrong rows, or no question is left.
    """
    seen = Seen(config.duplicates.similarity)
    ids: set[str] = set()
    found = Survey()
    for id, sample in stream(config.questions, config.limit):
        found.rows += 1
        notify(found.rows)
        question = light(id, sample)
        if id in ids:
            found.drop("repeated row", question.text, "", config.samples)
            continue
        ids.add(id)
        if any(token in turn["content"] for turn in sample.prompt for token in SPECIAL_TOKENS):
            found.drop("special token", question.text, "", config.samples)
            continue
        shown_pixels = pixels.digests(sample.images, question.files)
        if None in shown_pixels:
            found.drop("unreadable picture", question.text, "", config.samples)
            continue
        text = with_options(question.text, question.options)
        shown = Shown(text, tuple(digest for digest in shown_pixels if digest))
        if (other := evaluation.find(shown)) is not None:
            found.drop("contaminated", question.text, other, config.samples)
            continue
        if (other := seen.find(shown)) is not None:
            found.drop("near-duplicate", question.text, other, config.samples)
            continue
        seen.add(f"{question.data_source} {question.index}", shown)
        found.questions.append(question)
        found.characters += sum(len(turn["content"]) for turn in sample.prompt)
        found.pictures += len(sample.images)
    pixels.save()
    if not found.questions:
        raise ValueError(f"of {found.rows} rows no question is left to ask: {found.dropped}")
    return found
