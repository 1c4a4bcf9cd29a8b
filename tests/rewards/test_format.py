r"""Eq. 1: which texts adhere to the template."""

import pytest

from r1v3.rewards import format_reward

GOOD_THINKING = [
    "I count three.\n</think>\n\nThe answer is \\boxed{3}.",
    "<think>\nI count three.\n</think>\n\\boxed{3}",
    "  \n<think>x</think>\\boxed{\\frac{1}{2}}",
    "maybe \\boxed{4}? no, \\boxed{3}</think>\\boxed{3}",
    "a { brace </think> \\boxed{\\{1, 2\\}} as asked",
]
BAD_THINKING = {
    "empty text": "",
    "the thought is never closed": "I count three. \\boxed{3}",
    "closed twice": "a</think>b</think>\\boxed{3}",
    "opened twice": "<think><think>a</think>\\boxed{3}",
    "text before the opening tag": "Sure! <think>a</think>\\boxed{3}",
    "opening tag after the closing one": "a</think><think>\\boxed{3}",
    "empty thought": "</think>\\boxed{3}",
    "blank thought": "<think> \n\t</think>\\boxed{3}",
    "no box": "a</think>The answer is 3.",
    "box only inside the thought": "\\boxed{3}</think>3",
    "two boxes": "a</think>\\boxed{3} or \\boxed{4}",
    "nested boxes": "a</think>\\boxed{\\boxed{3}}",
    "empty box": "a</think>\\boxed{}",
    "blank box": "a</think>\\boxed{ }",
    "box not closed": "a</think>\\boxed{\\frac{1}{2}",
    "a closed box and an open one": "a</think>\\boxed{3} \\boxed{4",
    "box without braces": "a</think>\\boxed 3",
}


@pytest.mark.parametrize("completion", GOOD_THINKING)
def test_slow_thinking_template_is_accepted(completion: str) -> None:
    """A zero here would punish the very form the prompt asks for."""
    assert format_reward(completion) == 1.0


@pytest.mark.parametrize("fault", BAD_THINKING)
def test_each_departure_from_the_template_scores_zero(fault: str) -> None:
    """A one here would let the policy collect format reward without the format."""
    assert format_reward(BAD_THINKING[fault]) == 0.0


def test_nothink_template() -> None:
    """NoThink wants one box and no tags; slow-thinking text must not pass for it."""
    assert format_reward("It is \\boxed{3}.", thinking=False) == 1.0
    for bad in ["3", "a</think>\\boxed{3}", "<think>\\boxed{3}", "\\boxed{}", "", "\\boxed{3"]:
        assert format_reward(bad, thinking=False) == 0.0


def test_same_text_is_judged_by_the_template_in_use() -> None:
    """The `thinking` switch must matter in both directions."""
    assert format_reward("It is \\boxed{3}.", thinking=True) == 0.0
    assert format_reward(GOOD_THINKING[0], thinking=False) == 0.0
