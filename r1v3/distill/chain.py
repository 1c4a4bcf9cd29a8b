"""Chains of thought in a teacher's replies."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from r1v3.data.thoughts import THINK_CLOSE, THINK_OPEN
from r1v3.rewards.extract import extract_answer

_TAG = re.compile(r"<think>|</think>")


@dataclass(frozen=True)
class Chain:
    """A reply, read.

    Attributes:
        thoughts: each one's text, without tags; the last may be unfinished.
        answer: the text outside of thoughts.
        closed: whether the last thought ended.
        finish: why the teacher stopped: `stop`, `length`, ..., or `refused`.
    """

    thoughts: tuple[str, ...]
    answer: str
    closed: bool
    finish: str

    @property
    def thought(self) -> str:
        """The text of all thoughts."""
        return "\n\n".join(self.thoughts)

    @cached_property
    def final(self) -> str | None:
        """The final answer; None where there is none, or the thought never ended."""
        return extract_answer(self.answer) if self.closed else None

    @property
    def response(self) -> str:
        """The target of supervised training; the prompt has opened the thought."""
        return f"{self.thought.strip()}\n{THINK_CLOSE}\n\n{self.answer.strip()}"


def read_chain(answer: Mapping[str, Any]) -> Chain:
    """Read a kept answer, see `r1v3.distill.ask`.

    The thought is `reasoning`, or what stands between the tags of `content`; a template that opens
    the thought leaves only the closing tag.
    """
    content, reasoning = answer["content"], answer["reasoning"] or ""
    finish = answer["finish"]
    thoughts: list[str] = []
    if reasoning.strip():
        thoughts.append(_TAG.sub("", reasoning).strip())
    elif THINK_CLOSE in content and THINK_OPEN not in content.partition(THINK_CLOSE)[0]:
        content = THINK_OPEN + content
    outside, inside, closed = "", "", True
    position = 0
    for tag in [*_TAG.finditer(content), None]:
        text = content[position : tag.start() if tag else None]
        if closed:
            outside += text
        else:
            inside += text
        if tag is None:
            break
        position = tag.end()
        if tag[0] == THINK_OPEN and closed:
            closed = False
        elif tag[0] == THINK_CLOSE and not closed:
            closed = True
            thoughts.append(inside.strip())
            inside = ""
    if not closed:
        thoughts.append(inside.strip())
    if reasoning.strip() and finish == "length" and not content.strip():
        closed = False
    return Chain(tuple(t for t in thoughts if t), outside.strip(), closed, finish)
