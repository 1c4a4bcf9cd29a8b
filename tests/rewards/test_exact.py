r"""Exact means exact: values agree only if they are equal, decimals by the digits they show."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1v3.rewards.rules import answers_match, judge

EQUAL = [
    ("2^{10}", "1024"), ("45^2", "2025"), ("10^9+7", "1000000007"), ("\\sqrt{2025}", "45"),
    ("2^{64}", "18446744073709551616"), ("3^{40}", "12157665459056928801"), ("2^{-3}", "1/8"),
    ("2^{-3}", "0.125"), ("10^{400}", "10^{200}\\cdot 10^{200}"), ("20!", "2432902008176640000"),
    ("\\frac{2024}{2023}", "1+\\frac{1}{2023}"), ("\\frac{1}{3}", "\\frac{2}{6}"),
    ("\\sqrt{12}", "2\\sqrt{3}"), ("\\sqrt{2}+\\sqrt{3}", "\\sqrt{5+2\\sqrt{6}}"),
    ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}"), ("8^{1/3}", "2"), ("8^{\\frac{2}{3}}", "4"),
    ("\\sqrt[3]{2}\\cdot\\sqrt[3]{4}", "2"), ("\\frac{\\sqrt6+\\sqrt2}{4}", "\\cos 15^\\circ"),
    ("\\ln 8", "3\\ln 2"), ("\\log_2 8", "3"), ("\\pi", "\\frac{2\\pi}{2}"), ("e^{\\ln 5}", "5"),
    ("(1+\\sqrt5)/2", "\\frac{1+\\sqrt{5}}{2}"), ("\\sqrt{7-4\\sqrt{3}}", "2-\\sqrt{3}"),
    ("\\frac{1}{1+\\sqrt2}", "\\sqrt2-1"), ("0.\\overline{3}", "1/3"), ("0.1\\overline{6}", "1/6"),
    ("10^{-400}", "\\frac{1}{10^{400}}"), ("2^{2000}", "4^{1000}"), ("\\tan\\frac{\\pi}{4}", "1"),
    ("2+3i", "3i+2"), ("(1+i)^2", "2i"), ("\\arctan 1", "\\frac{\\pi}{4}"),
    ("\\cos\\frac{2\\pi}{5}", "\\frac{\\sqrt5-1}{4}"), ("\\sin 30^\\circ", "0.5"),
    ("\\infty", "+\\infty"), ("-\\infty", "-∞"), ("\\infty", "\\infty"),
    # Decimals agree by the digits that they show.
    ("\\pi", "3.1416"), ("\\pi", "3.14"), ("\\pi", "3.14159265358979"), ("1/3", "0.333"),
    ("2/3", "0.667"), ("1/3", "0.33"), ("\\sqrt{2}", "1.414"), ("3.1416", "\\pi"),
    ("3.14", "3.1416"), ("e", "2.718"), ("100\\sqrt{3}", "173.2"), ("\\frac{1}{7}", "0.142857"),
    ("6.02\\times10^{23}", "6.022\\times 10^{23}"), ("0.5", "\\frac{1}{2}"), ("1.50", "3/2"),
    ("\\frac{2023}{2024}", "0.99951"), ("\\sqrt{1000001}", "1000.0005"), ("-\\sqrt2", "-1.41"),
    ("10^{-3}", "0.001"), ("1.2\\times10^{-3}", "0.0012"), ("\\ln 2", "0.693"),
]  # fmt: skip
DIFFERENT = [
    ("2^{10}", "1025"), ("45^2", "2024"), ("10^9+7", "10^9+8"), ("\\frac{2023}{2024}", "1"),
    ("\\sqrt{2025}", "\\sqrt{2024}"), ("\\pi", "\\frac{22}{7}"), ("\\pi", "\\frac{355}{113}"),
    ("\\infty", "5"), ("\\infty", "-\\infty"), ("\\infty", "10^{99}"), ("5", "\\infty"),
    ("10^{400}", "10^{401}"), ("10^{400}", "5"), ("10^{-400}", "0"), ("0", "10^{-400}"),
    ("10^{-400}", "10^{-401}"), ("2^{64}", "2^{64}-1"), ("2^{2000}", "2^{2000}+1"),
    ("20!", "2432902008176640001"), ("\\frac{1}{3}", "\\frac{333}{1000}"), ("e", "\\frac{19}{7}"),
    ("\\sqrt{2}", "\\frac{99}{70}"), ("\\sqrt{2}", "\\frac{665857}{470832}"),
    ("e^{\\pi\\sqrt{163}}", "262537412640768744"), ("1+e^{-100}", "1"), ("1+e^{-100000}", "1"),
    ("\\sqrt{10^{40}+1}", "10^{20}"), ("\\sin 1", "\\sin(1+10^{-30})"), ("\\pi^2", "10"),
    ("\\frac{10^{30}}{10^{30}+1}", "1"), ("1", "0.999"), ("1", "1.001"), ("1000", "1000.4"),
    ("1024", "1.02\\times10^3"), ("1024", "1.025e3"), ("45^2", "2025.3"), ("\\ln 2", "\\ln 2.001"),
    ("\\sqrt{3}", "1.74"), ("\\pi", "3.15"), ("\\pi", "3.1"), ("\\pi", "3"), ("1/3", "0.3"),
    ("1/3", "0.34"), ("2/3", "0.66"), ("0.5", "0.52"), ("2.5", "2.49"), ("3.1416", "3.1426"),
    ("2+3i", "2+4i"), ("2+3i", "2"), ("i", "1"), ("\\frac{1}{2}", "-\\frac{1}{2}"),
    ("\\sqrt{-4}", "2"), ("1/0", "1"), ("0", "1/0"), ("\\frac{0}{0}", "0"), ("3.14", "3"),
    ("99999999999999999999", "100000000000000000000"), ("0.1", "0.10000001"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal_values_agree_both_ways(gold: str, answer: str) -> None:
    """A zero here would teach the policy that a right value is wrong."""
    assert answers_match(answer, gold)
    assert answers_match(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_values_are_never_paid(gold: str, answer: str) -> None:
    """Near misses, golds beyond float64, and infinity: each was paid under a relative tolerance."""
    assert not answers_match(answer, gold)


@given(st.integers(-(10**40), 10**40), st.integers(-(10**6), 10**6))
@settings(max_examples=200, deadline=None)
def test_an_integer_accepts_no_other_integer(value: int, gap: int) -> None:
    """Whatever their size, and however the ground truth is written."""
    for gold in (str(value), f"{value}+0", f"({value - 7})+7"):
        assert answers_match(str(value + gap), gold) is (gap == 0)


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
@settings(max_examples=150, deadline=None)
def test_fractions_agree_only_if_equal(first: Fraction, second: Fraction) -> None:
    """No tolerance between two exact values; and both ways give one verdict."""
    one, other = (f"\\frac{{{f.numerator}}}{{{f.denominator}}}" for f in (first, second))
    assert answers_match(one, other) is (first == second) is answers_match(other, one)
    assert answers_match(one, f"\\frac{{{-3 * first.numerator}}}{{{-3 * first.denominator}}}")


@given(st.decimals(-1000, 1000, places=4))
@settings(max_examples=100, deadline=None)
def test_a_decimal_agrees_with_its_rounding_and_not_with_its_neighbours(value: object) -> None:
    """3.1416 shows four places: what is further away than half of the last one is another value."""
    exact = Fraction(str(value))
    assert answers_match(str(value), str(exact))
    for gap in (Fraction(1, 10**4), -Fraction(1, 10**4), Fraction(6, 10**5)):
        assert not answers_match(str(value), str(exact + gap))


@pytest.mark.parametrize(
    "text",
    ["9^{9^{9}}", "99999!", "\\binom{10^9}{5\\cdot10^8}", "2^{10^{12}}", "(((((2^9)^9)^9)^9)^9)^9",
     "10^{10^{10}}-10^{10^{10}}", "e^{e^{e^{e^{9}}}}", "(a+b+c+d+e+f)^{99}",
     pytest.param("\\sin(10^{10^7})", marks=pytest.mark.slow)],
)  # fmt: skip
def test_what_is_too_large_is_refused_in_bounded_time(text: str) -> None:
    """Exponents and factorials explode: each is refused, said to be so, and costs no time here."""
    begin = time.process_time()
    for gold in ("5", "x+1", "\\sqrt{2}"):
        assert not judge(text, gold).correct
    assert judge(text, "7").refused or "a" in text
    assert time.process_time() - begin < 2.0


def test_a_refusal_is_said() -> None:
    """An answer that cannot be read or decided is not paid, and never silently."""
    assert judge("\\oint x", "5").refused and judge("5", "\\oint x").refused
    assert judge("x" * 1001, "5").refused
    for answer, gold in [("6", "5"), ("C", "B"), ("blue", "red"), ("5", "5"), ("x", "y")]:
        assert not judge(answer, gold).refused
