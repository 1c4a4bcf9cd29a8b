r"""Answers that take back, hedge or rename what they say; and what looks so and does not."""

import time

import pytest

from r1v3.rewards import accuracy_reward, format_reward
from r1v3.rewards.rules import answers_match

OPTIONS = ["10 cm", "12 cm", "14 cm", "16 cm"]
VERDICTS = [
    "fails", "impossible", "excluded", "rejected", "invalid", "unsure", "guess", "unlikely",
    "hardly", "unknown", "cannot", "wrongly", "denied", "fold", "halved", "doubled", "until",
    "onwards", "upwards", "minimum", "inclusive", "infinitely many", "repeating",
]  # fmt: skip
COUNTED = [
    ("6", "6 marbles"), ("6", "6 blue marbles"), ("6", "6 children"), ("6", "6 fish"),
    ("1", "1 solution"), ("6 marble", "6"), ("6 marbles", "6 marble"), ("6", "6 unit"),
    ("6", "6 years old"), ("6 years", "6 years old"), ("6", "6 horsepower"), ("6", "6 triangles"),
]  # fmt: skip
SPELLINGS = [
    ("5 cm^2", "5 sq. cm"), ("50\\%", "50 per cent"), ("20 °C", "20 degrees Celsius"),
    ("20 °F", "20 degrees Fahrenheit"), ("9.8 m/s^2", "9.8 m s^{-2}"), ("5 cm^3", "5 cc"),
    ("9.8 m/s^2", "9.8 \\, \\mathrm{m \\cdot s^{-2}}"), ("5 g/cm^3", "5 g cm^{-3}"),
    ("5 kΩ", "5000 Ω"), ("5 eV", "5 electronvolts"), ("2 keV", "2000 eV"), ("3", "3 MeV"),
]  # fmt: skip
NOT_SPELLINGS = [
    ("20 °C", "20 degrees Fahrenheit"), ("5 cm^2", "5 cu. cm"), ("9.8 m/s^2", "9.8 m s^{-1}"),
    ("5 keV", "5 eV"), ("5 kΩ", "5 Ω"), ("50\\%", "50 per mille"), ("6 months", "6 years old"),
]  # fmt: skip
NOT_B = [
    "B. maybe C", "B. I mean C", "B. actually C", "B. 12 cm\nC. 14 cm", "B: 12 cm, 14 cm",
    "B. 12 cm / 14 cm", "B. 12 and 14", "B. excluded", "B. unlikely", "B. cannot be right",
    "B. can't be", "B. no", "B. doesn't fit", "B - ruled out", "B. 12 cm C. 14 cm", "B. none",
    "14 cm (B)", "14 cm, B", "B (14 cm)", "B, 14 cm", "B = 14 cm", "12 cm (C)",
]  # fmt: skip
B = [
    "12 cm (B)", "12 cm, B", "B (12 cm)", "B, 12 cm", "B = 12 cm", "{B}", "故选：B", "B。",
    "B. 12 cm, as in the figure", "B. twelve", "\\text{B}, 12 cm",
]  # fmt: skip
NOT_STATED = [
    "I choose B. Wait, that is wrong.", "The answer is B. Actually, C.", "**B** is not right",
    "The answer is B.\nNo: C is right.\nC", "选B还是C", "故选B是错的",
    "If B is the correct answer,",
    "The correct option is (B)/(C).", "If the answer is B, then 1=2, contradiction.",
    "Suppose the answer is B.", "A or B is the correct answer.", "如果答案是B，则矛盾",
]  # fmt: skip
STATED = [
    "Therefore, B is the correct answer.", "正确选项为B", "正确的选项是B。",
    "A is wrong. Answer: B",
    "The answer is B. This is correct.", "The answer is C.\nB",
    "Since x is 2 or 3, the answer is B.", "We test if A fits or not: the answer is B.",
    "If x=1, A fails. The answer is B.",
]  # fmt: skip
MEANT = [
    ("\\{1,2\\}", "\\lbrace 1,2\\rbrace"), ("\\vec{a}", "\\overrightarrow{a}"),
    ("\\bar{z}", "\\overline{z}"), ("\\mathbb{R}", "R"), ("(1,2)", "x=1, y=2"),
    ("(1,2,3)", "z=3, x=1, y=2"), ("A(1,2)", "(1,2)"), ("P(1,2)", "P=(1,2)"),
    ("\\frac{\\pi}{4}+k\\pi, k\\in\\mathbb{Z}", "k\\pi+\\frac{\\pi}{4}, k\\in\\mathbb{Z}"),
    ("A(1,2), B(3,4)", "B(3,4), A(1,2)"), ("2024-01-02", "2024-01-02"),
]  # fmt: skip
NOT_MEANT = [
    ("A(1,2)", "B(1,2)"), ("\\emptyset", "\\{\\emptyset\\}"), ("2024-01-02", "2021"),
    ("3/14/2020", "3/28280"), ("(1,2)", "x=2, y=1"), ("(1,2)", "a=1, b=2"), ("[1,2]", "x=1, y=2"),
    ("2k\\pi, k\\in\\mathbb{Z}", "k\\pi, k\\in\\mathbb{Z}"), ("k\\pi, k\\in\\mathbb{Z}", "k\\pi"),
    ("k\\pi, k\\in\\mathbb{Z}", "k\\pi, k\\in\\mathbb{N}"), ("\\vec{a}", "\\bar{a}"),
    ("A(1,2), B(3,4)", "A(3,4), B(1,2)"),
]  # fmt: skip
NOTHING = [
    "\\phantom{5}", "\\hspace{1cm}", "\\vphantom{5}", "\\(\\)", "\\left.\\right.", "%", "\\\\",
    "\\textcolor{red}{}", "\\color{red}", "\\null", "\\relax", "\\strut", "\u034f", "\\kern1pt",
    "\\hskip 1em",
]  # fmt: skip


@pytest.mark.parametrize("verdict", VERDICTS)
def test_a_word_that_judges_a_number_is_not_what_is_counted(verdict: str) -> None:
    """Fails if `6 excluded` is six of something and is paid as 6."""
    for text in (f"6 {verdict}", f"6\\text{{ {verdict}}}"):
        assert not answers_match(text, "6")


@pytest.mark.parametrize(("gold", "answer"), COUNTED + SPELLINGS + MEANT)
def test_what_is_counted_or_spelled_otherwise_is_paid(gold: str, answer: str) -> None:
    """Fails if a right answer loses its reward for its spelling."""
    assert answers_match(answer, gold)


@pytest.mark.parametrize(("gold", "answer"), NOT_SPELLINGS + NOT_MEANT)
def test_another_meaning_is_not_paid(gold: str, answer: str) -> None:
    """Fails if another unit, point, set, date or range counts as the gold one."""
    assert not answers_match(answer, gold)


@pytest.mark.parametrize("answer", NOT_B)
def test_a_letter_whose_remark_hedges_is_not_paid(answer: str) -> None:
    """Fails if naming two options, or taking one back, is paid as the first."""
    assert not answers_match(answer, "B", options=OPTIONS)


@pytest.mark.parametrize("answer", B)
def test_a_letter_beside_its_text_is_paid(answer: str) -> None:
    """Fails if the order or the brackets of letter and text cost the reward."""
    assert answers_match(answer, "B", options=OPTIONS)


def test_an_option_may_say_what_would_be_a_hedge() -> None:
    """Fails if `D. cannot be determined` is no answer because it says "cannot"."""
    options = ["No", "Vitamin C", "Neither A nor B", "cannot be determined"]
    for letter, text in zip("ABCD", options, strict=True):
        assert answers_match(f"{letter}. {text}", letter, options=options)
    assert answers_match("D. It cannot be determined", "D", options=options)


def test_a_gold_value_that_fits_one_option_names_it() -> None:
    """Fails if the letter is unpaid because the ground truth is written without the unit."""
    assert answers_match("B", "12", options=OPTIONS)
    assert answers_match("12", "12", options=OPTIONS)
    assert not answers_match("C", "12", options=OPTIONS)
    assert not answers_match("B", "12", options=["12 m", "12 cm"])


@pytest.mark.parametrize("completion", NOT_STATED)
def test_a_statement_that_is_tried_or_taken_back_is_not_paid(completion: str) -> None:
    """Fails if a letter that the text takes back is paid."""
    assert accuracy_reward(completion, "B", options=OPTIONS) == 0.0


@pytest.mark.parametrize("completion", STATED)
def test_a_plain_statement_is_paid(completion: str) -> None:
    """Fails if the search for doubt finds it where there is none."""
    assert accuracy_reward(completion, "B", options=OPTIONS) == 1.0


@pytest.mark.parametrize("completion", ["7.", "$7$", "$7$.", "-7", "$-7.5$"])
def test_a_bare_number_may_stand_in_dollars_or_end_in_a_full_stop(completion: str) -> None:
    """Fails if `$7$` alone is no answer although `7` is one."""
    assert accuracy_reward(f"a</think>{completion}", completion.strip("$.")) == 1.0


@pytest.mark.parametrize("nothing", NOTHING)
def test_commands_that_show_nothing_are_no_answer(nothing: str) -> None:
    """Fails if an empty box earns the format reward."""
    assert format_reward(f"a</think>\\boxed{{{nothing}}}") == 0.0


@pytest.mark.parametrize("text", ["B, ", "B ", "(B) ", "B and ", "B. ", "A, B, ", "B、", "AB "])
def test_letters_that_repeat_without_end_are_refused_in_time(text: str) -> None:
    """Fails if a model that repeats itself in the box hangs the run: time doubled per letter."""
    begin = time.process_time()
    assert not answers_match(text * 150 + "x", "C", options=OPTIONS)
    assert not answers_match(text * 150 + "x", "AB", options=OPTIONS)
    assert not answers_match(text * 150 + "x", "AB")
    assert time.process_time() - begin < 1
