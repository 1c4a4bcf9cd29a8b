"""Cost and time of what is still to be asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1v3.config import DistillTeacher
from r1v3.distill.ask import CHARACTERS_PER_TOKEN
from r1v3.distill.survey import Survey
from r1v3.progress import clock

# Answers from which on their mean replaces what the configuration expects.
_LEAST_MEASURED = 20


@dataclass
class Measured:
    """Tokens of answers, as far as the teacher tells them."""

    answers: int = 0
    prompt_tokens: int = 0
    tokens: int = 0

    def look(self, answer: Mapping[str, Any]) -> None:
        """Count an answer."""
        prompt_tokens, tokens = answer.get("prompt_tokens"), answer.get("tokens")
        if type(prompt_tokens) is int and type(tokens) is int:
            self.answers += 1
            self.prompt_tokens += prompt_tokens
            self.tokens += tokens


@dataclass(frozen=True)
class Estimate:
    """Requests to come.

    Attributes:
        prompt_tokens, tokens: of one request, on average.
        measured: answers that these are the mean of; 0 where they are expected.
        cost: of all requests to come, in the currency of the configured prices.
        seconds: least time under the limits per minute; None without limits.
    """

    questions: int
    requests: int
    prompt_tokens: float
    tokens: float
    measured: int
    cost: float
    seconds: float | None

    def lines(self, teacher: DistillTeacher) -> list[str]:
        """The estimate for a person."""
        origin = f"mean of {self.measured:,} answers" if self.measured else "expected by the config"
        priced = teacher.price_prompt or teacher.price_completion
        return [
            f"to ask: {self.requests:,} answers to {self.questions:,} questions, about "
            f"{self.prompt_tokens:,.0f} tokens in and {self.tokens:,.0f} out each ({origin})",
            f"in all: {self.requests * self.prompt_tokens / 1e6:,.2f} million tokens in, "
            f"{self.requests * self.tokens / 1e6:,.2f} million out"
            + (f", cost about {self.cost:,.2f}" if priced else "; no prices are configured"),
            "at the limits per minute: at least " + clock(self.seconds)
            if self.seconds is not None
            else "no limits per minute are configured, so that no time is known",
        ]


def estimate(
    teacher: DistillTeacher,
    survey: Survey,
    missing: Mapping[str, Sequence[int]],
    measured: Measured,
) -> Estimate:
    """Estimate what is missing.

    Args:
        missing: numbers of the samples to ask for, by question.
        measured: of the answers so far.
    """
    count = measured.answers
    if count >= _LEAST_MEASURED:
        prompt, tokens = measured.prompt_tokens / count, measured.tokens / count
    else:
        count = 0
        prompt, tokens = _expected_prompt(teacher, survey), float(teacher.expect_tokens)
    requests = sum(len(numbers) for numbers in missing.values())
    cost = requests * (prompt * teacher.price_prompt + tokens * teacher.price_completion) / 1e6
    minutes = []
    if teacher.requests_per_minute is not None:
        minutes.append(requests / teacher.requests_per_minute)
    if teacher.tokens_per_minute is not None:
        minutes.append(requests * (prompt + tokens) / teacher.tokens_per_minute)
    seconds = 60 * max(minutes) if minutes else None
    return Estimate(len(missing), requests, prompt, tokens, count, cost, seconds)


def _expected_prompt(teacher: DistillTeacher, survey: Survey) -> float:
    if teacher.expect_prompt_tokens is not None:
        return teacher.expect_prompt_tokens
    added = len(teacher.instruction or "") + len(teacher.system or "")
    questions = len(survey.questions)
    text = (survey.characters / questions + added) / CHARACTERS_PER_TOKEN
    return text + survey.pictures / questions * teacher.picture_tokens
