"""The `distill` stage."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from r1v3.config.base import Fraction, Positive, Section
from r1v3.config.suite import Judge
from r1v3.http import check_address

Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]
Rate = Annotated[float, Field(gt=0)] | None
Price = Annotated[float, Field(ge=0)]
FilterName = Literal[
    "refused",
    "no thought",
    "several thoughts",
    "truncated",
    "no boxed answer",
    "wrong answer",
    "no verdict",
    "special token",
    "too short",
    "too long",
    "mixed languages",
    "loop",
    "rambling",
    "cannot see",
    "contradiction",
    "low score",
]
Difficulty = Literal["easy", "medium", "hard"]


class Endpoint(Section):
    """An OpenAI-compatible server.

    url: up to and without `/chat/completions`. api_key_env: the environment variable that holds the
    bearer token. requests_per_minute, tokens_per_minute: limits of the account; null sets none.
    concurrency: requests in flight at a time. timeout_seconds: of one attempt. retries: further
    attempts after a time-out, a lost connection, a malformed reply, HTTP 408, 429 or 5xx;
    `Retry-After` is obeyed and 429 uses up no attempt. backoff_seconds: before the first of them;
    doubles each time, at most 8 s. body: further keys of every request; null takes a key out, as in
    {max_tokens: null, max_completion_tokens: 16384}.
    """

    url: str | None = None
    model: str = ""
    api_key_env: str | None = None
    requests_per_minute: Rate = None
    tokens_per_minute: Rate = None
    concurrency: Positive = 16
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    retries: Annotated[int, Field(ge=0)] = 6
    backoff_seconds: Annotated[float, Field(ge=0)] = 1.0
    body: dict[str, Any] = {}

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is not None:
            check_address("the address", url)
        return url


class DistillTeacher(Endpoint):
    """The model whose chains of thought are taken.

    answers: to each question. system: in place of a question's own system turn. instruction: added
    to the question when it is asked, not to the row that is written. expect_prompt_tokens,
    expect_tokens: of one answer, for the estimate of cost as long as there are no answers to
    measure; null counts about 3.5 characters a token and `picture_tokens` a picture.
    price_prompt, price_completion: of a million tokens, in any currency.
    """

    url: str
    model: str
    answers: Positive = 4
    system: str | None = None
    instruction: str | None = (
        "Think step by step, and put the final answer within \\boxed{} at the end."
    )
    temperature: Annotated[float, Field(ge=0)] | None = 1.0
    max_tokens: Positive = 16384
    expect_prompt_tokens: Positive | None = None
    expect_tokens: Positive = 4000
    picture_tokens: Annotated[int, Field(ge=0)] = 1000
    price_prompt: Price = 0.0
    price_completion: Price = 0.0


class Filters(Section):
    """Filters of chains; docs/distill.md says what each one drops.

    off: names of filters that only count. least_words, most_words: of a thought; a Chinese
    character counts as a word. languages: that a chain may be in. other_language: largest fraction
    of a chain's letters in another language than its main one. loop_repeats, loop_words: a passage
    that stands so often in a row, over so many words in all, is a loop. repeated_phrases: largest
    fraction of eight-word phrases that the thought has written before. hesitations: largest
    fraction of sentences that open with a re-check, counted from 20 sentences on. blind_phrases:
    further regular expressions for "cannot see the picture".
    """

    off: tuple[FilterName, ...] = ()
    least_words: Positive = 5
    most_words: Positive = 12000
    languages: tuple[Language, ...] = ("en", "zh")
    other_language: Fraction = 0.03
    loop_repeats: Annotated[int, Field(ge=2)] = 5
    loop_words: Positive = 40
    repeated_phrases: Fraction = 0.3
    hesitations: Fraction = 0.4
    blind_phrases: tuple[str, ...] = ()

    @field_validator("blind_phrases")
    @classmethod
    def _check_phrases(cls, phrases: tuple[str, ...]) -> tuple[str, ...]:
        for phrase in phrases:
            try:
                re.compile(phrase)
            except re.error as error:
                raise ValueError(f"{phrase!r} is no regular expression: {error}") from error
        return phrases


class Scorer(Endpoint):
    """Scores chains that passed every filter; off without a URL.

    kind: `judge` asks a model for a number from 0 to 10; `reward` is a reward model behind vLLM's
    `/pooling`, whose last number counts. pictures: send them as well. least: chains with a lower
    score are dropped.
    """

    kind: Literal["judge", "reward"] = "judge"
    pictures: bool = True
    least: float | None = None


class Duplicates(Section):
    """Near-duplicates of questions, among themselves and with evaluation sets.

    similarity: of two texts' five-character shingles (Jaccard, estimated by MinHash) from which on
    they count as the same; null takes equal texts only. Pictures are compared by their pixels.
    evaluation: files whose questions must not be trained on: rows as stages read them, or benchmark
    files (.tsv, or Parquet).
    """

    similarity: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    evaluation: tuple[Path, ...] = ()


class Choice(Section):
    """Choice of the chains that are written, among those that passed.

    per_question: chains of a question, the best score first, then as `prefer` says.
    least_pass_rate, most_pass_rate: of a question; others are left out. rows: most rows in all;
    null keeps every one. domains, difficulties: weights of the balance when `rows` sets a limit;
    what is not named has weight 1. A cell that has fewer chains than its part leaves the rest to
    the others. Questions are easy from a pass rate of 0.75 on and hard up to 0.25. validation: rows
    of the validation file.
    """

    per_question: Positive = 1
    prefer: Literal["first", "shortest", "longest"] = "first"
    least_pass_rate: Fraction = 0.0
    most_pass_rate: Fraction = 1.0
    rows: Positive | None = None
    domains: dict[str, Annotated[float, Field(ge=0)]] = {}
    difficulties: dict[Difficulty, Annotated[float, Field(ge=0)]] = {}
    validation: Annotated[int, Field(ge=0)] = 200

    @model_validator(mode="after")
    def _check(self) -> "Choice":
        if self.least_pass_rate > self.most_pass_rate:
            raise ValueError("least_pass_rate is above most_pass_rate")
        if self.rows is not None and self.validation >= self.rows:
            raise ValueError("`validation` must be less than `rows`, of which it is a part")
        return self


class Distill(Section):
    """Cold-start data: asks a teacher, keeps the chains that pass, writes the file for `r1v3 sft`.

    run: results are in its folder `distill`. questions: files of rows as every stage reads them.
    limit: only so many questions, from the first on; null takes all. judge: asked what the rule
    cannot tell. samples: chains of each kind that the report page shows.
    """

    run: Path
    seed: int = 0
    questions: Annotated[tuple[Path, ...], Field(min_length=1)]
    limit: Positive | None = None
    teacher: DistillTeacher
    judge: Judge = Judge()
    filters: Filters = Filters()
    scorer: Scorer = Scorer()
    duplicates: Duplicates = Duplicates()
    choice: Choice = Choice()
    samples: Annotated[int, Field(ge=0)] = 4
