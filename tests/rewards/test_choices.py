r"""Multiple choice: several letters, letters with texts, labeled options, stated choices."""

import pytest

from r1v3.data.sample import make_sample
from r1v3.rewards import accuracy_reward, extract_answer, score
from r1v3.rewards.choices import option_texts
from r1v3.rewards.rules import answers_match

OPTIONS = ["10", "12", "14", "16"]
WORDS = ["red dog", "blue cat", "green bird", "a mouse"]


@pytest.mark.parametrize(
    "answer",
    ["AC", "CA", "A, C", "C, A", "A,C", "A and C", "A、C", "A和C", "A；C", "(A)(C)", "(A), (C)",
     "A & C",
     "A C", "\\text{A and C}", "\\text{AC}", "**AC**", "A/C", "A, and C", "{A, C}".replace("{",
     "\\{").replace("}", "\\}"),
     "(A, C)", "选AC", "选项A、C", "答案是AC", "options A and C", "ＡＣ", "A. 10, C. 14",
     "A. 10 and C. 14", "AC."],
)  # fmt: skip
def test_several_right_letters_in_any_order_and_with_any_separator(answer: str) -> None:
    """Datasets write AC, models write A, C."""
    for gold in ("AC", "A, C", "C and A", "A、C"):
        assert answers_match(answer, gold, options=OPTIONS)
        if "10" not in answer:
            assert answers_match(answer, gold)


@pytest.mark.parametrize(
    "answer",
    ["A", "C", "AB", "ABC", "A, B", "A or C", "A或C", "ABCD", "AA", "A, C, D", "not AC",
     "A, C or D", "A. 12, C. 14",
     "A. 10, C. 16", "AC or AB", "B and D", "", "A, not C", "10", "E, A"],
)  # fmt: skip
def test_other_sets_of_letters_are_not_paid(answer: str) -> None:
    """All letters, and only they, and no hedge."""
    assert not answers_match(answer, "AC", options=OPTIONS)
    assert not answers_match(answer, "A, C")


@pytest.mark.parametrize(
    "answer",
    ["B - blue cat", "B blue cat", "\\text{B}\\text{ blue cat}", "B. blue cat", "(B) blue cat",
     "B: blue cat",
     "B – blue cat", "B — Blue cat.", "\\textbf{B. blue cat}", "**B** blue cat",
     "\\text{(B) blue cat}", "选B",
     "答案是B", "选项B", "Ｂ", "【B】", "（B）", "B、blue cat", "故选B", "答案：B",
     "the correct answer is B",
     "Option (B)", "blue cat", "Blue Cat", "\\mathbf{B}", "B.", "b"],
)  # fmt: skip
def test_a_letter_with_its_text_names_its_option(answer: str) -> None:
    """The text after a letter is that of its option; with or without a sign between them."""
    for options in (WORDS, [f"{chr(65 + i)}. {text}" for i, text in enumerate(WORDS)]):
        assert answers_match(answer, "B", options=options)


@pytest.mark.parametrize(
    "answer",
    ["B - red dog", "B red dog", "A blue cat", "B or C", "B is wrong", "B. is wrong, it is C",
     "a mouse", "A mouse",
     "B, C", "C - blue cat", "not B", "B blue", "B - green bird", "\\text{A}\\text{ blue cat}", "I",
     "BC",
     "B isn't right", "选C", "不选B", "D a mouse"],
)  # fmt: skip
def test_a_letter_with_another_text_is_not_paid(answer: str) -> None:
    """A letter and a text that contradict each other name nothing; an article is no letter."""
    assert not answers_match(answer, "B", options=WORDS)


def test_the_text_behind_a_letter_is_compared_as_an_answer() -> None:
    """`B. 0.5` contradicts itself where A is 1/2."""
    assert not answers_match("B. 0.5", "B", options=["\\frac{1}{2}", "2", "3"])
    assert answers_match("A. 0.5", "A", options=["\\frac{1}{2}", "2", "3"])


@pytest.mark.parametrize(
    ("answer", "right"),
    [("B", True), ("B - twelve", True), ("B twelve cm", True), ("\\text{B}\\text{ text}", True),
     ("B. text", True),
     ("A dog", False), ("B or C", False), ("B is wrong, C", False), ("B, C", False),
     ("C text", False),
     ("B is incorrect", False), ("BE", False), ("Because", False)],
)  # fmt: skip
def test_letters_without_options(answer: str, right: bool) -> None:
    """Where the options are not known, a letter and any text behind it name that letter."""
    assert answers_match(answer, "B") is right
    assert not answers_match("A dog", "A")


def test_options_that_carry_their_letters_are_shown_once() -> None:
    """The prompt printed `A. A. 12`."""
    labeled = ["A. 10", "B. 12", "C. 14"]
    sample = make_sample(
        question="Which?", ground_truth="B", options=labeled, data_source="t", index=0
    )
    content = sample.prompt[-1]["content"]
    assert "A. 10\nB. 12\nC. 14" in content and "A. A." not in content
    assert [
        r.accuracy for r in score(["\\boxed{12}", "\\boxed{B}", "\\boxed{14}"], [sample] * 3)
    ] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["A. 1", "B. 2"], ["1", "2"]), (["(A) 1", "(B) 2"], ["1", "2"]),
        (["A) 1", "B) 2"], ["1", "2"]),
        (["A: x", "B: y"], ["x", "y"]), (["A、1", "B、2"], ["1", "2"]),
        (["A．1", "B．2"], ["1", "2"]),
        (["A. 1", "2"], ["A. 1", "2"]), (["B. 1", "A. 2"], ["B. 1", "A. 2"]),
        (["10", "12"], ["10", "12"]),
        (["A", "B"], ["A", "B"]), (["Apple", "Bee"], ["Apple", "Bee"]),
        (["A.", "B."], ["A.", "B."]),
    ],
)  # fmt: skip
def test_labels_are_removed_only_if_all_options_carry_their_own(
    options: list[str], texts: list[str]
) -> None:
    """`A. Smith` may be a text."""
    assert option_texts(options) == texts


STATED = [
    ("Let me see. The correct option is (B).", "B"), ("I think it is **B**", "B"),
    ("I choose B because it fits.", "B"),
    ("I choose A. No, I choose B.", "B"), ("So the correct answer is B, since 12 is even.", "B"),
    ("故选B。", "B"),
    ("We go with option C first.\nFinally the correct choice is B.", "B"), ("因此，答案选B", "B"),
    ("**B. 12**", "B. 12"),
    ("Reasoning...\n\nB", "B"), ("Reasoning...\n(B)", "(B)"), ("I would pick (B).", "(B)"),
    ("Option B is correct.", "B"),
    ("The answer is B.\nIt fits.", "B"), ("A is wrong. **Answer: B**", "B"),
    ("I select B, as C is odd.", "B"),
    ("应选 B", "B"), ("B. 12", "B. 12"), ("the right choice is **B**.", "B"),
    ("The best option is A and C.", "A and C"),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "answer"), STATED)
def test_a_choice_stated_in_a_sentence_is_found(completion: str, answer: str) -> None:
    """For models that do not box; the last statement counts."""
    found = extract_answer(completion)
    assert found is not None and found.strip("()") == answer.strip("()")


@pytest.mark.parametrize(
    "completion",
    ["The correct option is not B.", "I do not choose B.", "The answer is B or C.",
     "I choose B or C.", "不选B",
     "The correct option is (B).\nNo: the correct option is (C).", "**B** is wrong. **C**",
     "The answer is B, or maybe C.",
     "I choose Blue", "Which option is B?  No idea", "the answer is A. Banana", "I don't pick B",
     "Option B is wrong",
     "B", "I choose B. \\boxed{C}"][:-2] + ["I choose B. \\boxed{C}"],
)  # fmt: skip
def test_a_sentence_that_denies_or_hedges_is_not_paid(completion: str) -> None:
    """Naming the right letter is not choosing it."""
    assert accuracy_reward(completion, "B", options=OPTIONS) == 0.0
