r"""Rule-based accuracy: extraction, choices, numbers, expressions, and hostile text."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1v3.rewards import accuracy_reward, extract_answer
from r1v3.rewards.rules import answers_match

OPTIONS = ["10", "12", "14", "16"]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("so \\boxed{1}</think>The answer: \\boxed{2}", "2"),
        ("a</think>b</think>\\boxed{5}", "5"),
        ("no tag at all \\boxed{3}", "3"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("\\boxed{ \\boxed{5}", "5"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("} } \\boxed{5} }", "5"),
        ("{ { \\boxed{5}", "5"),
        ("\\boxed{4}, given in \\boxed{}", "4"),
        ("\\\\boxed{7}", "7"),
        ("\\boxed {x}", "x"),
        ("x\x00</think>\\boxed{4\x002}", "42"),
        ("thought</think><answer>7</answer>", "7"),
        ("**Answer:** 12.", "12"),
        ("The answer: wait, the final answer is 5.\nDone", "5"),
        ("答案是：B", "B"),
        ("B", "B"),
        ("-3.5", "-3.5"),
        ("\\boxed{}", None),
        ("\\boxed{3", None),
        ("I do not know", None),
        ("", None),
        ("\\boxed{3}</think>", None),
        ("answer is 3 </think> unsure", None),
        ("\\boxed{" + "9" * 1001 + "}", None),
    ],
)
def test_extract_answer(completion: str, answer: str | None) -> None:
    """The last finished statement after the thought counts; drafts inside the thought do not."""
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("12", "12"), ("12.0", "12"), ("1000", "1{,}000"), ("1,000", "1000"), ("$5$", "5"),
        ("0.5", "1/2"), ("\\frac12", "0.5"), ("-\\frac{3}{4}", "-0.75"), ("−3", "-3"),
        ("1.2\\times10^{-3}", "0.0012"), ("1.2e-3", "0.0012"), ("50\\%", "0.5"), ("50", "50%"),
        ("0.333", "1/3"), ("3.14", "3.1416"), ("30^\\circ", "30"), ("30°", "30^\\circ"),
        ("5\\text{ cm}", "5"), ("5 cm", "5\\text{ cm}"), ("2 m", "2"), ("60\\text{ km/h}", "60"),
        ("5\\,\\mathrm{cm}^2", "5"), ("7 apples", "7"), ("x=3", "3"), ("3", "x = 3"),
        ("\\sqrt{12}", "2\\sqrt{3}"), ("2(x+1)", "2x+2"), ("(x-1)(x+1)", "x^2-1"),
        ("1.5708", "\\pi/2"), ("\\{2,1\\}", "\\{1,2\\}"), ("3<x", "x>3"), ("(1,2)", "(1, 2)"),
        ("yes", "Yes"), ("No", "no"), ("isosceles triangle", "Isosceles  triangle."),
        ("\\text{red}", "red"), ("10^{10}", "10000000000"), ("9" * 60, "9" * 60),
        ("\\left( 1, 2 \\right)", "(1,2)"), ("\\dfrac{a}{b}", "\\frac{a}{b}"),
        ("5", "\\boxed{5}"), ("1 m/s^2", "1 m/s²"),
    ],
)  # fmt: skip
def test_equal_answers_are_accepted(answer: str, gold: str) -> None:
    """A zero here would teach the policy that a right answer is wrong."""
    assert accuracy_reward(f"so</think>\\boxed{{{answer}}}", gold) == 1.0


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("13", "12"), ("10001", "10000"), ("7.005", "7"), ("12.0001", "12"), ("1.58", "\\pi/2"),
        ("0.34", "1/3"), ("-3", "3"), ("5%", "5 cm"), ("5 cm", "5 m"), ("1/0", "1"),
        ("2x", "2"), ("2\\pi", "2"), ("2pi", "2"), ("2e", "2"), ("2ab", "2"), ("2", "2m"),
        ("5=3", "3"), ("3 or 4", "3"), ("3, 4", "3"), ("1,2,3", "3"), ("12 13", "12"),
        ("5 apples or pears", "5"), ("(2,1)", "(1,2)"), ("\\{1,2,3\\}", "\\{1,2\\}"),
        ("tar", "rat"), ("on", "no"), ("\\text{tar}", "\\text{rat}"), ("yes", "no"),
        ("2 \\text{is wrong, it is} 3", "2"), ("three", "3"), ("x", "y"), ("x<3", "x>3"),
        ("\\text{}", "5"), ("$", "5"), ("?", "5"), ("2^{100}", "2^{101}"),
    ],
)  # fmt: skip
def test_different_answers_are_rejected(answer: str, gold: str) -> None:
    """Each pair fooled a naive rule (units, products of letters, sets, right sides, rounding)."""
    assert accuracy_reward(f"so</think>\\boxed{{{answer}}}", gold) == 0.0


@pytest.mark.parametrize(
    "answer", ["B", "(B)", "B.", "B)", "\\text{B}", "\\textbf{(B)}", "$B$", "B. 12", "(B) 12",
               "option B", "Choice (B).", "12", "12.0", "$12$", "b", "(b)", "12 cm", "B: it fits"],
)  # fmt: skip
@pytest.mark.parametrize("gold", ["B", "(B)", "12", "B. 12"])
def test_right_option_in_every_spelling(answer: str, gold: str) -> None:
    """Letter and text name the same option, whichever of the two the ground truth uses."""
    assert answers_match(answer, gold, options=OPTIONS)


@pytest.mark.parametrize(
    "answer", ["A", "14", "C", "E", "B. 14", "B or C", "B. 12 or C. 14", "B, C", "not B", "",
               "B and C", "AB", "12, 14", "B is wrong, C", "C. 12",
               "(E) 12", "E. 12", "(B), (C)"],
)  # fmt: skip
def test_wrong_or_hedged_option_is_rejected(answer: str) -> None:
    """Naming two options must never pay, and a letter must agree with the text beside it."""
    assert not answers_match(answer, "B", options=OPTIONS)


def test_an_answer_that_fits_two_options_is_rejected() -> None:
    """3.142 is within tolerance of both; accepting it would reward not choosing."""
    assert not answers_match("3.142", "A", options=["3.1416", "3.1425"])
    assert answers_match("3.1416", "A", options=["3.1416", "3.1425"])


def test_options_with_the_same_text_are_the_same_answer() -> None:
    """By text they cannot be told apart; by letter they can."""
    assert answers_match("3", "B", options=["3", "3", "4"])
    assert not answers_match("A", "B", options=["3", "3", "4"])


def test_letter_ground_truth_without_options() -> None:
    """A reader of formulas cannot grade these: to it a letter is a variable."""
    for good in ["B", "(B)", "B.", "\\text{B}", "B. 12", "$B$", "(B) 12 cm"]:
        assert accuracy_reward(f"\\boxed{{{good}}}", "B") == 1.0
    for bad in [
        "C",
        "b",
        "not B",
        "B or C",
        "B, C",
        "B is wrong, C",
        "BC",
        "E.g. B",
        "B. 12 or C. 13",
        "(B) or (C)",
    ]:
        assert accuracy_reward(f"\\boxed{{{bad}}}", "B") == 0.0


HOSTILE = {
    "power tower": "9^{9^{9^9}}",
    "python tower": "9**9**9**9",
    "huge exponent": "2^{1000000000}",
    "exponent product": "2^{(999)(999)(999)}",
    "factorial": "100000!",
    "double factorial": "((9!)!)!",
    "10,000 digits": "7" * 10_000,
    "500 digits": "7" * 500,
    "huge float exponent": "1e999999999",
    "long sum": "+".join(["x"] * 400),
    "sum": "\\sum_{i=1}^{10^{10}} i",
    "integral": "\\int_0^1 x^x dx",
    "binomial": "\\binom{1000000000}{500000000}",
    "brackets": "(" * 90 + "1" + ")" * 90,
    "expansion": "(a+b+c+d+e+f)^{99}",
    "braces": "{" * 200,
    "backslashes": "\\" * 300,
    "surrogate": "\ud800",
    "NUL": "\x00",
    "empty fraction": "\\frac{}{}",
    "unfinished": "\\frac{1",
    "odd command": "\\input{/etc/passwd}",
    "python": "__import__('os').system('true')",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("gold", ["5", "B", "x^2"])
def test_hostile_answers_score_zero_quickly(name: str, gold: str) -> None:
    """A rollout may hold anything; one line of it must not stop a training run."""
    assert accuracy_reward("\\boxed{1}", "2") == 0.0
    answers_match("x", "2x")  # start the process, so that its start is not timed
    begin = time.process_time()
    assert accuracy_reward(f"t</think>\\boxed{{{HOSTILE[name]}}}", gold) == 0.0
    assert accuracy_reward(f"t</think>The answer is {HOSTILE[name]}", gold) == 0.0
    assert time.process_time() - begin < 1.0


@pytest.mark.parametrize(
    "garbage",
    ["\\boxed{" * 150_000, "{" * 10**6, "}" * 10**6, "\x00" * 10**6, "</think>" * 120_000,
     "answer" * 160_000, "answer:" * 140_000, "<answer>" * 120_000, "answer is " + "*" * 10**6,
     "\\boxed{3}" * 110_000 + "\\boxed{4}", "\\\\" * 500_000, "\ud800" * 300_000],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_a_megabyte_of_garbage_is_read_in_linear_time(garbage: str) -> None:
    """A quadratic scan would take minutes on this, for every degenerate rollout."""
    begin = time.process_time()
    assert accuracy_reward(garbage, "3") == 0.0
    assert accuracy_reward("\\boxed{3}", garbage) == 0.0
    assert time.process_time() - begin < 3.0


@given(st.text(max_size=300), st.sampled_from(["5", "B", "x+1", "\\frac{1}{2}", "red"]))
@settings(max_examples=150, deadline=None)
def test_any_text_is_graded_without_an_error(text: str, gold: str) -> None:
    """No completion and no ground truth may raise."""
    assert accuracy_reward(f"</think>\\boxed{{{text}}}", gold) in (0.0, 1.0)
    assert accuracy_reward(f"\\boxed{{{gold}}}", text) in (0.0, 1.0)
    assert accuracy_reward(text, gold, options=["5", text, "red"]) in (0.0, 1.0)


@given(st.integers(-(10**12), 10**12))
@settings(max_examples=60, deadline=None)
def test_an_integer_equals_itself_and_no_neighbor(value: int) -> None:
    """A relative tolerance must never blur integers."""
    assert accuracy_reward(f"\\boxed{{{value}}}", str(value)) == 1.0
    assert accuracy_reward(f"\\boxed{{{value:,}}}", str(value)) == 1.0
    assert accuracy_reward(f"\\boxed{{{value + 1}}}", str(value)) == 0.0
