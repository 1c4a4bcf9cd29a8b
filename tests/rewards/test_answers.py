r"""Answers that are written differently and mean the same agree; others do not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1v3.rewards.rules import answers_match

SAME = [
    # Unicode and full-width notation
    ("\\sqrt{2}", "√2"), ("2\\sqrt{3}", "2√3"), ("\\sqrt{x+1}", "√(x+1)"), ("x^2", "x²"),
    ("x^{-1}", "x⁻¹"), ("\\frac{1}{2}", "½"), ("\\frac{3}{2}", "1½"), ("\\infty", "∞"),
    ("90^\\circ", "90º"),
    ("-5", "–5"), ("-5", "—5"), ("x-1", "x − 1"), ("2\\times 3", "6"), ("3×4", "12"), ("x_1", "x₁"),
    ("12\\div 4", "3"), ("6÷2", "3"), ("\\pi r^2", "πr²"), ("2\\pi", "2π"), ("x\\le 3", "x≤3"),
    ("(1,2)", "（1，2）"), ("x=3", "x＝3"), ("3", "３"), ("x", "ｘ"), ("50\\%", "５０％"),
    ("[1,2)", "［1，2）"),
    ("\\sqrt[3]{27}", "\\sqrt[3]27"), ("3", "\\sqrt[3]27"), ("\\sqrt[3]{2}", "∛2"),
    ("\\alpha+\\beta", "α+β"),
    # LaTeX styles
    ("\\frac12", "\\cfrac{1}{2}"), ("\\frac{1}{2}", "\\displaystyle\\frac{1}{2}"),
    ("\\frac94\\pi", "9\\pi/4"),
    ("x^2+1", "\\left(x^2+1\\right)"), ("5", "\\(5\\)"), ("5", "\\[5\\]"), ("5", "$$5$$"),
    ("5", "**5**"),
    ("\\mathrm{e}^2", "e^2"), ("10{,}000", "10000"), ("10\\,000", "10000"),
    ("\\overline{AB}", "\\overline {AB}"),
    # Chinese
    ("5\\text{ cm}", "5厘米"), ("5", "5个"), ("3米", "3 m"), ("12平方厘米", "12 cm^2"),
    ("20元", "20 元"),
    ("60千米/时", "60 km/h"), ("10米/秒", "10 m/s"), ("100", "100分"[:3]), ("3 kg", "3千克"),
    ("2小时", "120 min"),
    ("30度", "30^\\circ"), ("x=3或x=-5", "x=3 or x=-5"), ("5万", "50000"), ("3，4", "3, 4"),
    ("4", "x＝4"),
    # Solutions
    ("\\{3,-5\\}", "x=3 or x=-5"), ("x=3\\text{ or }x=-5", "x_1=3, x_2=-5"),
    ("\\{3,-5\\}", "x_1=-5, x_2=3"),
    ("3, -5", "x = 3 \\text{ and } x = -5"), ("\\{1,2,3\\}", "3, 2, 1"),
    ("3\\pm\\sqrt2", "3+\\sqrt{2}, 3-\\sqrt{2}"),
    ("x=\\pm 2", "x=2\\text{ or }x=-2"), ("\\pm 2", "\\{-2, 2\\}"), ("x=3 or x=-5", "x=3或-5"),
    ("1;2", "1, 2"),
    ("x=1, y=2", "y=2, x=1"),
    ("x_1=2,\\quadx_2=3", "x=2\\quad\\text{or}\\qquad x=3"),
    ("\\{(1,2),(3,4)\\}", "(3,4), (1,2)"), ("\\{5\\}", "5"),
    ("x\\in\\{1,2\\}", "1, 2"),
    # Intervals and inequalities
    ("(3,\\infty)", "x>3"), ("x>3", "3<x"), ("3<x", "(3,+\\infty)"), ("[2,5)", "2\\le x<5"),
    ("5>x\\ge 2", "[2,5)"),
    ("(-\\infty,1)\\cup(2,\\infty)", "x<1 or x>2"),
    ("x<1\\text{ or }x>2", "(2,\\infty)\\cup(-\\infty,1)"),
    ("x>1 and x<3", "(1,3)"), ("\\{x|1<x<2\\}", "1<x<2"), ("x\\in(1,2]", "1<x\\leq2"),
    ("\\mathbb{R}", "(-\\infty,\\infty)"),
    ("x\\ne 2", "(-\\infty,2)\\cup(2,\\infty)"), ("x\\geq\\frac{1}{2}", "[0.5,\\infty)"),
    ("x \\le -1", "-1 \\ge x"),
    ("\\{-1\\}\\cup[0,7)", "[0,7)\\cup\\{-1\\}"), ("a<b<c", "c>b>a"), ("x>=5", "x\\geq 5"),
    # Mixed numbers, ratios, tuples, matrices, equations
    ("1 1/2", "3/2"), ("2\\frac{3}{4}", "11/4"), ("-1\\frac{1}{2}", "-3/2"), ("1:2", "2:4"),
    ("1:2:3", "2:4:6"),
    ("1:2", "\\frac12"), ("(1,\\frac{1}{2})", "(1,0.5)"), ("A(1,2)", "(1,2)"), ("204_5", "204_{5}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}"),
    ("y=2x+1", "2x-y+1=0"),
    ("x+y=5", "2x+2y=10"), ("x = 11", "x = 5+6 = 11"), ("S=\\frac{1}{2}", "0.5"),
    ("\\angle A=30^\\circ", "30°"),
    ("f(x)=2x+1", "2x+1"), ("\\text{Area}=12", "12"), ("AB=5", "5"), ("x\\approx3.14", "3.14"),
    ("\\approx 3.14", "\\pi"),
    ("x<1", "-x>-1"), ("x\\le\\frac{1}{2}", "-x\\ge-0.5"), ("0.25", "0,25"), ("1000.99", "1000,99"),
    ("1000", "1 000"), ("16386.2", "16,\\!386.20"), ("14916", "14 {, }916"), ("\\{1,3\\}", "{1,3}"),
    ("\\frac{1}{2}", "\\\\frac{1}{2}"), ("\\frac{NO}{BO}=\\frac{1}{2}", "0.5"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
     "\\left[\\begin{array}{cc}1&2\\\\3&4\\end{array}\\right]"),
    # Formulas that used to be refused
    ("2^{n+1}", "2\\cdot2^n"), ("e^{-x^2}", "\\frac{1}{e^{x^2}}"), ("\\binom{5}{2}", "10"),
    ("4!", "24"),
    ("\\dbinom{n}{2}", "\\frac{n(n-1)}{2}"), ("(n+1)!", "(n+1)n!"),
    ("\\vec{a}+\\vec{b}", "\\vec{b}+\\vec{a}"),
    ("\\sin 30^\\circ", "\\frac12"), ("\\sin^2x+\\cos^2x", "1"), ("\\sin 2x", "2\\sin x\\cos x"),
    ("|x-1|", "|1-x|"),
    ("\\ln(ab)", "\\ln a+\\ln b"), ("x^{a+b}", "x^a x^b"), ("(x-1)(x+1)", "x^2-1"),
    ("\\frac{x^2-1}{x-1}", "x+1"),
    ("\\sqrt{x^2}", "|x|"), ("\\log_3 9x", "2+\\log_3 x"),
    ("\\frac{1}{x}+\\frac{1}{y}", "\\frac{x+y}{xy}"),
    ("10^{-x}", "\\frac{1}{10^x}"), ("x^{1/2}", "\\sqrt{x}"), ("\\frac{abc}{4R}", "abc/(4R)"),
]  # fmt: skip
OTHER = [
    ("\\sqrt{2}", "2"), ("2√3", "√(2·3)"), ("x²", "2x"), ("½", "1"), ("12", "1½"), ("90º", "80º"),
    ("5", "−5"),
    ("(1,2)", "（2，1）"), ("(1,2)", "[1,2]"), ("(1,2)", "\\{1,2\\}"), ("[1,2)", "(1,2]"),
    ("3厘米", "3米"),
    ("5元", "5美元"), ("x=3 or x=-5", "x=3"), ("3", "x=3 or x=-5"), ("\\{3,-5\\}", "\\{3,5\\}"),
    ("x=3", "y=3"),
    ("\\{1,2\\}", "1, 2, 3"), ("1, 2", "1"), ("3\\pm\\sqrt2", "3+\\sqrt2"), ("\\pm 2", "2"),
    ("x=1, y=2", "x=2, y=1"),
    ("x>3", "x<3"), ("x>3", "x\\ge 3"), ("(3,\\infty)", "[3,\\infty)"), ("x>3", "y>3"),
    ("x>3", "3"), ("1<x<2", "1<x<3"),
    ("x<1 or x>2", "1<x<2"), ("(-\\infty,1)\\cup(2,\\infty)", "(-\\infty,1)"), ("x\\ne2", "x=2"),
    ("a<b<c", "a<c<b"),
    ("1 1/2", "11/2"), ("12 13", "1213"), ("1213", "12 13"), ("1:2", "2:1"), ("1:2:3", "1:2:4"),
    ("1:2", "2"),
    ("x=3", "2x=6"), ("2x=6", "6"), ("3", "5=3"), ("3", "2+2=3"), ("x^2=9", "9"), ("2x-y+1=0", "0"),
    ("x+y=5", "5"),
    ("y=2x+1", "y=2x-1"), ("y=2x+1", "2x-1"), ("204_5", "204"), ("12", "1\\text{}2"), ("7", "7..."),
    ("3", "3\\cdot"), ("3", "3/"), ("7", "7~8"),
    ("7", "7 or so"), ("7", "7第"), ("5", "5以上"), ("5", "5倍"), ("5", "不是5"), ("1/3", "3分之1"),
    ("54", "204_5"), ("204_5", "54"),
    ("\\{1,2\\}", "x=1, y=2"),
    ("1, 2", "x=1, y=2"), ("204_5", "204_6"), ("54", "204"), ("\\sqrt{x^2}", "x"),
    ("x^2", "x"),
    ("2^{n+1}", "2^n+1"), ("e^{-x^2}", "e^{x^2}"), ("\\binom{5}{2}", "\\frac{5}{2}"), ("4!", "4"),
    ("23", "2**3"),
    ("\\vec{a}", "a"), ("\\overline{AB}", "\\overline{AC}"), ("\\sin 30^\\circ", "\\sin 30"),
    ("\\sin x", "x"),
    ("\\sin 2x", "2\\sin x"), ("\\log 100", "3"), ("\\ln x", "\\log_2 x"),
    ("\\frac{a}{b}", "\\frac{b}{a}"),
    ("a-b", "b-a"), ("2x+1", "2x+2"), ("xy", "x+y"), ("x_1", "x_2"), ("x", "X"), ("x'", "x"),
    ("\\angle A", "\\angle B"),
    ("rat", "tar"), ("\\triangle ABC", "\\triangle ABD"), ("|x|", "x"), ("5", "5, 5"),
    ("5", "(5, 5)"), ("\\emptyset", "0"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}2\\\\1\\end{pmatrix}"),
    ("100", "1,00"), ("x<1", "-x>1"), ("x<1", "-x<-1"), ("1.2", "1,2"), ("1000", "1,0"),
    ("25", "0,25"), ("1.25", "(1,25)"), ("1,234", "(1,234)"),
    ("2", "\\{x|x=2, x=3\\}"), ("0.\\overline{3}", "0.3"), ("x>1 and x<3", "x>1 or x<3"),
    ("f(x)=2x", "g(x)=2x"), ("5", "5\\quadratic"), ("12", "1\\quad2"), ("12", "1 \\\\ 2"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_the_same_in_another_notation_agrees_both_ways(gold: str, answer: str) -> None:
    """Other people's models write all of these for one thing."""
    assert answers_match(answer, gold)
    assert answers_match(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), OTHER)
def test_something_else_is_not_paid(gold: str, answer: str) -> None:
    """Each differs in meaning by one sign, bracket, letter or part."""
    assert not answers_match(answer, gold)


_REWRITINGS = [
    lambda t: f" {t} ", lambda t: f"${t}$", lambda t: f"\\({t}\\)", lambda t: f"\\left({t}\\right)",
    lambda t: f"\\displaystyle {t}", lambda t: t.replace("\\frac", "\\dfrac"), lambda t: f"{t}.",
    lambda t: "".join(chr(ord(c) + 0xFEE0) if c in "0123456789+=()" else c for c in t),
]  # fmt: skip
_FORMULAS = ["x^2+1", "\\frac{1}{2}", "2\\sqrt{3}", "-7", "3.25", "\\pi+1", "2^{10}", "4!", "x y-3"]


@given(st.sampled_from(_FORMULAS), st.sampled_from(_FORMULAS), st.integers(0, len(_REWRITINGS) - 1))
@settings(max_examples=120, deadline=None)
def test_harmless_rewriting_never_changes_a_verdict(gold: str, answer: str, way: int) -> None:
    """Dollars, brackets around everything, sizes, full-width digits and full stops mean nothing."""
    verdict = gold == answer
    assert answers_match(_REWRITINGS[way](answer), gold) is verdict
    assert answers_match(answer, _REWRITINGS[way](gold)) is verdict


@given(st.text(alphabet="0123456789x+-*/^(){}[]\\,.=<>|_!% πr√²½", max_size=24))
@settings(max_examples=300, deadline=None)
def test_formula_like_noise_agrees_only_with_itself(text: str) -> None:
    """Noise never raises, and never counts as a value that it does not hold."""
    assert not answers_match(text, "271828182845904523536")
    assert not answers_match("271828182845904523536", text)
