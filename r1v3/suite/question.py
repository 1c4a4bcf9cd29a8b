"""Questions and responses: what is asked of a row, and what came back."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from r1v3.data.encoding import escape
from r1v3.data.sample import IMAGE_PLACEHOLDER
from r1v3.rewards.extract import THINK_CLOSE, extract_answer, final_text

_NAMED_PICTURE = re.compile(r"(<image[ _]\d{1,2}>)")
_LETTERED_LINE = re.compile(r"^\s*\(?([A-J])\s*[.:)]\s*(\S.*?)\s*$", re.MULTILINE)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """A row, ready to be asked and scored.

    Attributes:
        id: of the row, unique in its benchmark.
        prompt: the user turn; `<image>` stands for a picture.
        pictures: which of the row's pictures stand there, in order.
        text: the question with its options, for a judge.
        gold: the right answer.
        options: texts of the options A, B, ..., if they are known.
        unit: the group of questions that is drawn as one when benchmarks are written, such as the
            rotations of one question.
        labels: names of categories, by kind of category.
        cells: the row, without pictures.
    """

    id: str
    prompt: str
    pictures: tuple[int, ...]
    text: str
    gold: str
    options: tuple[str, ...] = ()
    unit: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    cells: Mapping[str, str] = field(default_factory=dict)

    def told(self, text: str) -> "Question":
        """The same with another text for the judge."""
        return replace(self, text=text)


@dataclass(frozen=True)
class Response:
    """A completion; `thinking`: its prompt has opened a thought."""

    text: str
    thinking: bool

    @cached_property
    def final(self) -> str:
        """The text after the last `</think>`; "" where the thought never ended."""
        if self.thinking and THINK_CLOSE not in self.text:
            return ""
        return final_text(self.text).strip()

    @property
    def thought(self) -> str:
        """The text in front of the last `</think>`; all of it where the thought never ended."""
        if not self.thinking:
            return ""
        return self.text.rpartition(THINK_CLOSE)[0] if THINK_CLOSE in self.text else self.text

    @cached_property
    def answer(self) -> str | None:
        """The final answer, see `r1v3.rewards.extract_answer`."""
        return extract_answer(self.text, thinking=self.thinking)


def in_front(text: str, pictures: int) -> tuple[str, tuple[int, ...]]:
    """The prompt with every picture in front of the text, and their order."""
    return f"{IMAGE_PLACEHOLDER}\n" * pictures + escape(text), tuple(range(pictures))


def in_place(text: str, pictures: int) -> tuple[str, tuple[int, ...]]:
    """The prompt with pictures where the text names them, and their order.

    `<image 2>` or `<image_2>` is the second picture; one that is named twice is shown twice, and
    those that are not named stand in front. A name of a picture that the row does not have is left
    as text.
    """
    order: list[int] = []
    parts = []
    for i, part in enumerate(_NAMED_PICTURE.split(text)):
        number = int(part[7:-1]) if i % 2 else 0
        if 1 <= number <= pictures:
            order.append(number - 1)
            parts.append(IMAGE_PLACEHOLDER)
        else:
            parts.append(part if number else escape(part))
    rest = [i for i in range(pictures) if i not in order]
    return f"{IMAGE_PLACEHOLDER}\n" * len(rest) + "".join(parts), (*rest, *order)


def option_cells(cells: Mapping[str, str]) -> tuple[str, ...]:
    """Texts of the columns A, B, ... up to the first absent one."""
    found = []
    for letter in LETTERS:
        if not cells.get(letter, "").strip():
            break
        found.append(cells[letter])
    return tuple(found)


def options_in(text: str) -> tuple[str, ...]:
    """Texts of options that stand in a question, a line each: `A. 12`, `B: 14`, `(C) 16`."""
    found: list[str] = []
    for letter, option in _LETTERED_LINE.findall(text):
        if letter == LETTERS[len(found)]:
            found.append(option)
        elif letter == "A":
            found = [option]
    return tuple(found) if len(found) > 1 else ()


def with_options(question: str, options: Sequence[str], hint: str = "", request: str = "") -> str:
    """A multiple-choice question in VLMEvalKit's layout."""
    lines = [f"Hint: {hint}"] if hint else []
    lines.append(f"Question: {question}")
    if options:
        lines.append("Options:")
        lines += [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]
        if request:
            lines.append(request)
    return "\n".join(lines)
