r"""Format and truncation: what is no answer, and which part of a completion holds one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1v3.rewards import accuracy_reward, extract_answer, format_reward, score

BLANK = [
    "", " ", "\\,", "\\text{}", "\\text{ }", "\u200b", "\u200b\u200d\ufeff", "\\;\\!", "{}", "~",
    "\\quad", "$ $",
    "\\mathrm{}", "\\textbf{\\text{}}", "\u00a0", "\u3164", "\\ ", "\u2060\\,\\text{\u200b}", "**",
]  # fmt: skip


@pytest.mark.parametrize("blank", BLANK)
def test_what_cannot_be_seen_is_no_answer(blank: str) -> None:
    """The format reward was paid for a box that shows nothing."""
    assert format_reward(f"so</think>\\boxed{{{blank}}}") == 0.0
    assert format_reward(f"\\boxed{{{blank}}}", thinking=False) == 0.0
    assert extract_answer(f"so</think>\\boxed{{{blank}}}") is None
    assert extract_answer(f"so</think>\\boxed{{4}} \\boxed{{{blank}}}") == "4"
    assert format_reward(f"so</think>\\boxed{{{blank}4}}") == 1.0


@pytest.mark.parametrize("thought", ["\u200b", "\ufeff\u200d", " \u2060\n"])
def test_a_thought_that_cannot_be_seen_is_no_thought(thought: str) -> None:
    """Zero-width characters are no reasoning."""
    assert format_reward(f"{thought}</think>\\boxed{{4}}") == 0.0


DRAFTS = [
    "Maybe \\boxed{4}? Let me check again", "<think>It could be \\boxed{4}", "<think>\\boxed{4}",
    "First \\boxed{4}, then I go on and on", "The answer is 4.\nBut wait, let me",
    "**4**\nHmm, so then",
    "\\boxed{4}\n\nWait, that is not", "a</think>b<think>\\boxed{4}",
    "a</think>\\boxed{5}<think>\\boxed{4}",
    "so \\boxed{4} is a candidate; next", "<think>The answer is 4",
    "a</think>x <think> the answer is 4",
]  # fmt: skip


@pytest.mark.parametrize("completion", DRAFTS)
def test_a_draft_in_a_thought_that_never_closes_is_not_graded(completion: str) -> None:
    """A truncated thought was paid for a guess on its way."""
    (reward,) = score([completion], ["4"])
    assert (reward.accuracy, reward.format, reward.extracted) == (0.0, 0.0, None)


def test_a_draft_before_the_answer_does_not_matter() -> None:
    """The text after the thought counts, and a completion that ends in its answer has one."""
    assert score(["maybe \\boxed{3}</think>\\boxed{4}"], ["4"])[0].accuracy == 1.0
    assert score(["It is $\\boxed{4}$."], ["4"])[0].accuracy == 1.0
    assert accuracy_reward("Maybe \\boxed{4}? I check: yes.", "4") == 1.0  # no thought was opened
    assert accuracy_reward("<think>\\boxed{3}</think>\\boxed{4}", "4") == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{1}, \\boxed{2}", "1 , 2"), ("\\boxed{1} and \\boxed{2}", "1 and 2"),
        ("\\boxed{3} or \\boxed{4}", "3 or 4"), ("$\\boxed{1}$ and $\\boxed{-2}$.", "1 and -2"),
        ("\\boxed{1}、\\boxed{2}、\\boxed{3}", "1 , 2 , 3"), ("\\boxed{5}, \\boxed{5}", "5"),
        ("\\boxed{1} \\quad \\text{and} \\quad \\boxed{2}", "1 and 2"),
        ("\\boxed{1} then \\boxed{2}", "2"), ("\\boxed{1}. \\boxed{2}", "2"),
        ("\\boxed{\\boxed{3}}", "3"), ("\\boxed{1}, so \\boxed{2}", "2"),
        ("\\boxed{A}或\\boxed{B}", "A 或 B"),
        ("The answer is $100$. I hope it is correct", "$100$"),
        ("The answer is 12,000. I hope it is correct.", "12,000"),
    ],
)  # fmt: skip
def test_boxes_that_stand_in_a_list_are_one_answer(text: str, answer: str) -> None:
    r"""`\boxed{3} or \boxed{4}` was paid for a 4."""
    assert extract_answer(text) == answer


@given(st.text(max_size=200), st.booleans())
@settings(max_examples=200, deadline=None)
def test_form_and_extraction_never_raise(text: str, thinking: bool) -> None:
    """Any Unicode text, also with parts of tags and boxes in it."""
    for completion in (
        text,
        f"<think>{text}</think>\\boxed{{{text}}}",
        f"\\boxed{{{text}",
        f"</thi{text}nk>",
    ):
        assert format_reward(completion, thinking=thinking) in (0.0, 1.0)
        found = extract_answer(completion, thinking=thinking)
        assert found is None or found.strip()
