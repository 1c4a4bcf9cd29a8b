r"""Answers of several parts: named values, solutions, values of functions, distances, matrices."""

import time

import pytest

from r1v3.rewards.rules import answers_match, judge

NAMED = [
    ("AB=3, BC=7", "3, 7"), ("m=2, n=-1", "2, -1"), ("a=\\frac12, b=\\sqrt3", "0.5, \\sqrt{3}"),
    ("x=-4, k=\\frac{5}{3}", "-4, 5/3"), ("PQ=6; RS=8", "6; 8"), ("h=2, r=9", "2 and 9"),
    ("x=1, y=2", "1, 2"), ("a=1,b=2,c=3", "1, 2, 3"), ("x=1, y=2", "(1,2)"),
    ("p=5, q=2", "(5, 2)"), ("\\alpha=30^\\circ, \\beta=60^\\circ", "30°, 60°"),
    ("(x,y)=(4,-7)", "4, -7"), ("(x,y)=(4,-7)", "y=-7, x=4"), ("y=-7, x=4", "(x,y)=(4,-7)"),
    ("(a,b,c)=(1,0,2)", "c=2, a=1, b=0"), ("BD=6, AB=9", "6、9"),
]  # fmt: skip
NOT_NAMED = [
    ("AB=3, BC=7", "7, 3"), ("AB=3, BC=7", "3 or 7"), ("AB=3, BC=7", "\\{3,7\\}"),
    ("AB=3, BC=7", "3"), ("AB=3, BC=7", "3, 7, 7"), ("AB=3, BC=7", "BC=3, AB=7"),
    ("m=2, n=-1", "[2,-1]"), ("y=2, x=1", "2, 1"), ("y=2, x=1", "(2, 1)"), ("x=1, y=2", "(2, 1)"),
    ("x=1, y=2", "a=1, b=2"), ("\\{1,2\\}", "x=1, y=2"), ("1, 2", "y=1, x=2"),
    ("a=1,b=2,c=3", "1, 3, 2"), ("(x,y)=(4,-7)", "-7, 4"), ("(x,y)=(4,-7)", "x=-7, y=4"),
    ("(x,y)=(4,-7)", "(a,b)=(4,-7)"), ("x=1, y=2", "x=1, 2"), ("x=1, y=2", "1<2"),
    ("b=3, a=5", "3, 5"),
]  # fmt: skip
SOLUTIONS = [
    ("p=3,q=2;p=9,q=4", "(3,2),(9,4)"), ("p=3,q=2;p=9,q=4", "(9,4), (3,2)"),
    ("x=1,y=2 or x=3,y=4", "(3,4),(1,2)"), ("x=1,y=2;x=3,y=4", "x=3,y=4;y=2,x=1"),
    ("x=1,y=2 \\text{ and } x=3,y=4", "(1,2) and (3,4)"), ("(2,6), (6,2)", "(x,y)=(2,6),(6,2)"),
    ("(2,6), (6,2)", "(x, y) = (2, 6) \\text{ and } (6, 2)"), ("(m,n)=(1,4),(4,1)", "(4,1),(1,4)"),
    ("a=0,b=1;a=1,b=0", "\\{(0,1),(1,0)\\}"), ("x=1,y=2,z=3;x=0,y=0,z=0", "(0,0,0),(1,2,3)"),
    ("(x,y)=(2,6) or (x,y)=(6,2)", "(2,6) or (6,2)"), ("x=1,y=2;x=3,y=4", "(x,y)=(1,2),(3,4)"),
]  # fmt: skip
NOT_SOLUTIONS = [
    ("p=3,q=2;p=9,q=4", "(2,3),(4,9)"), ("p=3,q=2;p=9,q=4", "3,2,9,4"),
    ("p=3,q=2;p=9,q=4", "(3,2)"), ("p=3,q=2;p=9,q=4", "(3,4),(9,2)"),
    ("x=1,y=2 or x=3,y=4", "x=1,y=4 or x=3,y=2"), ("x=1,y=2;x=3,y=4", "x=1,y=2;x=3,z=4"),
    ("(2,6), (6,2)", "(x,y)=(2,6)"), ("(2,6), (6,2)", "(x,y)=(2,6),(2,6)"),
    ("(2,6), (6,2)", "(x,y)=(2,6),6"), ("q=2,p=3;q=4,p=9", "(2,3),(4,9)"),
    ("x=1,y=2;x=3,y=4", "(1,2,3,4)"), ("(2,6)", "(x,y)=(2,6),(6,2)"),
]  # fmt: skip
REGIONS = [
    ("0<f(x)<3", "(0,3)"), ("f(x)\\ge 2", "[2,\\infty)"), ("-1\\le g(t)\\le 1", "[-1,1]"),
    ("f(x)>0", "y>0"), ("h(x)<\\sqrt2", "(-\\infty,\\sqrt{2})"), ("3>f(x)", "f(x)<3"),
    ("(0,3)", "0<f(x)<3"), ("2\\le|x|\\le\\frac52", "[-\\frac52,-2]\\cup[2,\\frac52]"),
    ("|x|<4", "(-4,4)"), ("|t|\\le\\sqrt3", "[-\\sqrt3,\\sqrt3]"), ("|x|>5", "x<-5 or x>5"),
    ("7\\le|a|", "a\\le-7\\text{ or }a\\ge7"), ("|x|<4", "-4<x<4"), ("1<|x|<2", "2>|x|>1"),
    ("-\\pi<x<\\pi", "|x|<\\pi"),
]  # fmt: skip
NOT_REGIONS = [
    ("0<f(x)<3", "[0,3)"), ("0<f(x)<3", "(0,4)"), ("0<f(x)<3", "0<g(x)<3"), ("0<f(x)<3", "0<x<3"),
    ("0<f(x)<3", "0<f(t)<3"), ("f(x)>0", "x>0"), ("f(x)>0", "f(x)\\ge0"), ("|x|<4", "(0,4)"),
    ("|x|<4", "[-4,4]"), ("|x|>5", "(5,\\infty)"), ("|x|>5", "(-5,5)"),
    ("1<|z|<2", "(-2,-1)\\cup(1,2)"),
    ("2\\le|x|\\le3", "[2,3]"), ("2\\le|x|<3", "[-3,-2]\\cup[2,3)"), ("|x|<-4", "(4,-4)"),
    ("|x|<a", "(-a,a)"), ("|x-1|<4", "(-4,4)"), ("|x|<4", "|y|<4"), ("|w|<1", "(-1,1)"),
]  # fmt: skip


def _m(rows: str) -> str:
    return "\\begin{pmatrix}" + rows.replace(" ", " & ").replace(";", " \\\\ ") + "\\end{pmatrix}"


MATRICES = [
    (_m("6 8;1 2"), f"{_m('1 2;0 1')}+{_m('5 6;1 1')}"),
    (_m("6 8;1 2"), f"{_m('1 2;0 1')} + {_m('5 6;1 1')} = {_m('6 8;1 2')}"),
    (_m("-4 -4"), f"{_m('1 2')}-{_m('5 6')}"), (_m("3 6;9 12"), f"3{_m('1 2;3 4')}"),
    (_m("19 22;43 50"), f"{_m('1 2;3 4')}{_m('5 6;7 8')}"),
    (_m("19 22;43 50"), f"{_m('1 2;3 4')}\\cdot{_m('5 6;7 8')}={_m('19 22;43 50')}"),
    (_m("11"), f"{_m('1 2')}{_m('3;4')}"), (_m("3 4;6 8"), f"{_m('1;2')}{_m('3 4')}"),
    (_m("\\frac12 1"), f"\\frac{{1}}{{2}}{_m('1 2')}"), (_m("\\frac12 1"), f"{_m('1 2')}/2"),
    (_m("a+1 b"), f"{_m('a b')}+{_m('1 0')}"), (_m("7 10;15 22"), f"{_m('1 2;3 4')}^2"),
    (_m("1 0;0 1"), f"{_m('1 1;0 1')}{_m('1 -1;0 1')}={_m('1 0;0 1')}"),
]  # fmt: skip
NOT_MATRICES = [
    (_m("6 8;1 2"), f"{_m('1 2;0 1')}+{_m('5 6;1 2')}"),
    (_m("6 8;1 2"), f"{_m('1 2;0 2')} + {_m('5 6;1 1')} = {_m('6 8;1 2')}"),
    (_m("23 34;31 46"), f"{_m('1 2;3 4')}{_m('5 6;7 8')}"), (_m("6 8"), f"{_m('1 2')}+{_m('5;6')}"),
    (_m("19 22;43 50"), f"{_m('1 2;3 4')}\\cdot{_m('5 6;7 9')}={_m('19 22;43 50')}"),
    (_m("3 8"), f"{_m('1 2')}{_m('3 4')}"), (_m("2 3"), f"1+{_m('1 2')}"), ("11", f"3{_m('1 2')}"),
    (_m("1 4"), f"{_m('1 2')}^2"), (_m("3 4;6 8"), f"{_m('3 4')}{_m('1;2')}"),
    (_m("1 2"), f"{_m('1 2')}={_m('1 3')}"), (_m("2 4"), f"2{_m('1;2')}"),
    (_m("\\frac{1}{0} 1"), f"{_m('1 0')}/0"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), NAMED + SOLUTIONS + REGIONS + MATRICES)
def test_the_parts_of_an_answer_are_compared_by_what_they_are(gold: str, answer: str) -> None:
    """Fails if a right answer is not paid because it names its parts, or does not."""
    assert answers_match(answer, gold)


@pytest.mark.parametrize(("gold", "answer"), NOT_NAMED + NOT_SOLUTIONS + NOT_REGIONS + NOT_MATRICES)
def test_other_parts_or_another_order_are_not_paid(gold: str, answer: str) -> None:
    """Fails if swapped values, a missing part, another bound or a false equation is paid."""
    assert not answers_match(answer, gold)


def test_a_long_product_of_matrices_with_letters_is_refused() -> None:
    """Fails if cells that grow with every factor take all memory: 12 factors have 2^11 terms."""
    factors = _m("a b;c d") * 12
    assert judge(factors, _m("1 0;0 1")).refused


def test_lists_of_solutions_inside_one_another_are_read_in_time() -> None:
    """Fails if every level is read twice: 20 levels would take minutes."""
    begin = time.process_time()
    for open_, close in (("\\{", "\\}"), ("(", ")"), ("{", "}")):
        text = f"{open_}x=1,y=2;x=1,y=" * 20 + "1" + close * 20
        assert not answers_match(text, "1")
    assert time.process_time() - begin < 5
