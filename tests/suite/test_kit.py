"""VLMEvalKit's rules as they are, faults included: what a comparison with the kit rests on."""

import pytest

from r1v3.suite import kit
from r1v3.suite.question import Response
from tests.suite.truths import LENGTHS, F, N, T, question


def told(rule: object, gold: str, text: str, *options: str) -> bool | None:
    return rule(question(gold, *options), Response(text, False))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("B", T),
        ("\\boxed{B}", T),
        ("The final answer is \\boxed {B}.", T),
        ("(B)", T),
        ("It is B.", T),
        ("It is C.", F),
        ("The answer is **B**. Here is a long reason for it, as asked.", T),
        ("The answer is B because of A", T),
        ("B is what I see in the picture, and nothing else fits", N),
        ("either A or B", N),
        ("14 cm", T),
        ("it is 14 CM", T),
        ("12 cm and 14 cm", N),
        ("a very long remark about " + "x" * 80 + " 14 cm", N),
        ("Z", F),
        ("", N),
    ],
)
def test_letters_and_options(text: str, wanted: bool | None) -> None:
    """Fails if a letter counts that is not among the last words, or one of several."""
    assert told(kit.choice_rule, "B", text, *LENGTHS) is wanted


@pytest.mark.parametrize(
    ("text", "wanted"), [("14", T), ("140", T), ("-14", T), ("14.5", T), ("15", N), ("A", T)]
)
def test_open_rows_of_mmmu_contain_the_gold(text: str, wanted: bool | None) -> None:
    """Fails if the kit's known fault is mended here: a comparison would not be one."""
    assert told(kit.choice_rule, "14", text) is wanted
    assert told(kit.known_choice_rule, "14", text) is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Yes", T),
        ("no.", F),
        ("**Yes**", T),
        ("yes, there is no doubt", N),
        ("I know", N),
        ("The answer is yes.", T),
        ("", N),
    ],
)
def test_yes_or_no(text: str, wanted: bool | None) -> None:
    """Fails if a text with both words is decided."""
    assert told(kit.yes_no_rule, "Yes", text) is wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("\\boxed{B}", T),
        ("\\boxed{\\text{B}}", T),
        ("\\boxed{A}", F),
        ("\\boxed{option B}", F),
        ("so it is (B).", T),
        ("B\nbecause", T),
        ("the answer is: b", T),
        ("The answer is B. It fits.", T),
        ("maybe", F),
    ],
)
def test_visulogic(text: str, wanted: bool | None) -> None:
    """Fails if what no phrase states is anything but wrong."""
    assert told(kit.visulogic_rule, "B", text) is wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Answer: C", T),
        ("Option A gives 3 N, which is wrong. Answer: C", F),
        ("C: 3 N", T),
        ("**C**", T),
        ("3 N", N),
        ("The correct one is D", F),
    ],
)
def test_phyx(text: str, wanted: bool | None) -> None:
    """Fails if another letter than the first behind such a word decides."""
    assert told(kit.phyx_rule, "C", text) is wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<answer>4</answer>", T),
        ("the final answer is: 4.", T),
        ("The answer is: 4.", T),
        ("4", T),
        ("<answer>4 m</answer>", N),
        ("5", N),
    ],
)
def test_seephys(text: str, wanted: bool | None) -> None:
    """Fails if anything but equal text is decided without a judge."""
    assert told(kit.seephys_rule, "4", text) is wanted
    assert told(kit.judge_rule, "4", text) is None
