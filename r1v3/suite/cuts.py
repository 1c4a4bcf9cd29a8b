"""Answers cut at a length: the thinking budgets of figure 9 from one long run.

Nothing is closed or asked again. With the same random numbers a run of that limit is exactly the
beginning of the long one; `budget-N`, which closes the thought and goes on, is another quantity.
"""

from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerFast

from r1v3.suite.answers import Answer


def cut(
    answers: Iterable[Answer], length: int, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Answer]:
    """Answers as a limit of `length` tokens would have left them.

    Raises:
        ValueError: an answer was kept without its tokens.
    """
    for answer in answers:
        if answer.tokens <= length:
            yield answer
            continue
        if answer.ids is None:
            raise ValueError(f"row {answer.row} was kept without its tokens and cannot be cut")
        text = tokenizer.decode(answer.ids[:length], skip_special_tokens=False)
        yield Answer(answer.row, answer.sample, answer.seed, str(text), length, "length")
