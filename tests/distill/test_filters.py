"""Every filter has chains that pass and chains that do not, in English and in Chinese."""

from typing import Any

import pytest

from r1v3.config import Distill, Filters
from r1v3.distill.chain import Chain, read_chain
from r1v3.distill.filters import FILTERS, caught_by
from r1v3.distill.grade import caught, verdict
from r1v3.distill.questions import Question

ENGLISH = (
    "The picture shows a right triangle with legs of 3 and 4. By the Pythagorean theorem the "
    "hypotenuse is the root of 9 + 16, which is 5. So the answer is 5."
)
CHINESE = (
    "图中是一个直角三角形，两条直角边分别是3和4。根据勾股定理，斜边的平方等于9加16，也就是25，所以斜边等于5。"
    "因此答案是5。"
)
ANSWERS = {"en": "The hypotenuse is \\boxed{5}.", "zh": "斜边长为\\boxed{5}。"}
# Long sentences that differ, for thoughts of many words.
STEPS = [f"Step {n} adds {n} to the sum, so that it is {n * (n + 1) // 2} now." for n in range(99)]
SCHRITTE = [f"第{n}步把{n}加到总和上面，现在的总和是{n * (n + 1) // 2}。" for n in range(99)]


def question(**changes: Any) -> Question:
    fields: dict[str, Any] = {
        "id": "q", "text": "How long is the hypotenuse?", "ground_truth": "5", "options": None,
        "domain": "geometry", "data_source": "tests", "split": None, "index": 1, "files": (),
    }  # fmt: skip
    return Question(**{**fields, **changes})


def reply(thought: str | None, answer: str, finish: str = "stop") -> Chain:
    return read_chain({"reasoning": thought, "content": answer, "finish": finish})


def names(chain: Chain, asked: Question | None = None, **changes: Any) -> list[str]:
    return caught_by(chain, asked or question(), Filters(**changes))


@pytest.mark.parametrize(("thought", "language"), [(ENGLISH, "en"), (CHINESE, "zh")])
def test_a_good_chain_passes(thought: str, language: str) -> None:
    """Fails if a filter drops what the whole pipeline is for."""
    for content in (ANSWERS[language], ANSWERS[language] + "\n"):
        assert names(reply(thought, content)) == []
    tagged = f"<think>\n{thought}\n</think>\n\n{ANSWERS[language]}"
    assert names(reply(None, tagged)) == []
    assert names(reply("", tagged.removeprefix("<think>"))) == []
    chain = reply(None, tagged)
    assert chain.response == f"{thought}\n</think>\n\n{ANSWERS[language]}"
    assert verdict(question(), chain) is True


# Filter, thought, answer, finish, and whether it is caught.
CASES: list[tuple[str, str | None, str, str, bool]] = [
    ("refused", None, "the prompt is too long", "refused", True),
    ("no thought", None, ANSWERS["en"], "stop", True),
    ("no thought", None, ANSWERS["zh"], "stop", True),
    ("no thought", "  \n", f"<think>\n</think>{ANSWERS['en']}", "stop", True),
    ("no thought", ENGLISH, ANSWERS["en"], "stop", False),
    ("several thoughts", None, f"<think>{ENGLISH}</think>a<think>{ENGLISH}</think>b", "stop", True),
    ("several thoughts", CHINESE, f"<think>{CHINESE}</think>{ANSWERS['zh']}", "stop", True),
    ("several thoughts", CHINESE, ANSWERS["zh"], "stop", False),
    ("truncated", ENGLISH, "", "length", True),
    ("truncated", None, f"<think>{CHINESE}", "stop", True),
    ("truncated", None, f"<think>{CHINESE}</think>{ANSWERS['zh']}", "length", True),
    ("truncated", None, f"<think>{CHINESE}</think>{ANSWERS['zh']}", "stop", False),
    ("no boxed answer", ENGLISH, "The answer is 5.", "stop", True),
    ("no boxed answer", CHINESE, "答案是5。", "stop", True),
    ("no boxed answer", ENGLISH, "\\boxed{5} or \\boxed{6}", "stop", True),
    ("no boxed answer", CHINESE, "答案是\\boxed{5}。", "stop", False),
    ("special token", ENGLISH + " <img>", ANSWERS["en"], "stop", True),
    ("special token", CHINESE, ANSWERS["zh"] + "<|im_end|>", "stop", True),
    ("special token", CHINESE + "<b>", ANSWERS["zh"], "stop", False),
    ("too short", "It is 5.", ANSWERS["en"], "stop", True),
    ("too short", "是五。", ANSWERS["zh"], "stop", True),
    ("too short", "斜边等于五。", ANSWERS["zh"], "stop", False),
    ("too long", " ".join(STEPS), ANSWERS["en"], "stop", True),
    ("too long", "".join(SCHRITTE), ANSWERS["zh"], "stop", True),
    ("too long", ENGLISH, ANSWERS["en"], "stop", False),
    ("mixed languages", ENGLISH + " 所以斜边的长度就是五。", ANSWERS["en"], "stop", True),
    (
        "mixed languages",
        CHINESE + "So we are done with the hypotenuse of the triangle here.",
        ANSWERS["zh"],
        "stop",
        True,
    ),
    ("mixed languages", ENGLISH, ANSWERS["zh"] + "这就是最后的结果，不用再算了。", "stop", True),
    (
        "mixed languages",
        "Le triangle est rectangle, donc l'hypoténuse vaut la racine de vingt-cinq, soit cinq.",
        "\\boxed{5}",
        "stop",
        True,
    ),
    (
        "mixed languages",
        "図には直角三角形があります。斜辺の長さは五です。",
        "\\boxed{5}",
        "stop",
        True,
    ),
    ("mixed languages", ENGLISH + " The sign says “出口”, so exit.", ANSWERS["en"], "stop", False),
    ("mixed languages", CHINESE + "设AB=3 cm，BC=4 cm，sin A=0.8。", ANSWERS["zh"], "stop", False),
    ("mixed languages", CHINESE + "$\\text{so the area of ABC is}$", "\\boxed{5}", "stop", False),
    ("loop", ENGLISH + " Let me check this once more." * 12, ANSWERS["en"], "stop", True),
    ("loop", CHINESE + "让我再检查一遍。" * 12, ANSWERS["zh"], "stop", True),
    ("loop", ENGLISH + " ha" * 60, ANSWERS["en"], "stop", True),
    ("loop", " ".join(STEPS), ANSWERS["en"], "stop", False),
    ("loop", "".join(SCHRITTE), ANSWERS["zh"], "stop", False),
    ("loop", ENGLISH + " Wait, wait, wait, wait.", ANSWERS["en"], "stop", False),
    (
        "rambling",
        " ".join(
            f"Case {n}: we add all of the numbers in the row and compare it." for n in range(20)
        ),
        ANSWERS["en"],
        "stop",
        True,
    ),
    ("rambling", " ".join(f"Wait, is {n} right? Yes, {n}." for n in range(40)), "", "stop", True),
    ("rambling", "".join(f"等等，{n}对吗？对。" for n in range(40)), "", "stop", True),
    ("rambling", " ".join(STEPS[:40]) + " Wait, no. " + ENGLISH, ANSWERS["en"], "stop", False),
    ("rambling", "".join(SCHRITTE[:9]) + "等等。" + CHINESE, ANSWERS["zh"], "stop", False),
    ("cannot see", "I can't actually see the image here. " + ENGLISH, ANSWERS["en"], "stop", True),
    ("cannot see", "The figure isn’t provided, so I assume. " + ENGLISH, "", "stop", True),
    ("cannot see", "由于我无法直接看到这张图片，只能假设。" + CHINESE, ANSWERS["zh"], "stop", True),
    ("cannot see", "题目没有给出图片。" + CHINESE, ANSWERS["zh"], "stop", True),
    ("cannot see", ENGLISH, "I cannot see the image. \\boxed{5}", "stop", False),
    ("cannot see", "I can see the image well. " + ENGLISH, ANSWERS["en"], "stop", False),
    ("cannot see", "We can't see the image of B under the map f. " + ENGLISH, "", "stop", False),
    ("cannot see", "The figure is not drawn to scale. " + ENGLISH, ANSWERS["en"], "stop", False),
    ("cannot see", "图形没有给出比例，但可以看到。" + CHINESE, ANSWERS["zh"], "stop", False),
    ("contradiction", ENGLISH, "\\boxed{6}", "stop", True),
    ("contradiction", CHINESE, "\\boxed{6}", "stop", True),
    ("contradiction", ENGLISH + " That gives \\boxed{7}.", ANSWERS["en"], "stop", True),
    ("contradiction", ENGLISH, ANSWERS["en"], "stop", False),
    ("contradiction", CHINESE, "\\boxed{5.0}", "stop", False),
    ("contradiction", ENGLISH + " Wait, that is wrong, 3 + 4 it is.", "\\boxed{7}", "stop", False),
    ("contradiction", "We add and look and add, then it ends.", "\\boxed{7}", "stop", False),
]


@pytest.mark.parametrize(("name", "thought", "answer", "finish", "is_caught"), CASES)
def test_a_filter_catches_what_its_name_says(
    name: str, thought: str | None, answer: str, finish: str, is_caught: bool
) -> None:
    """Fails if a filter misses its kind of chain, or drops one that is not of its kind."""
    chain = reply(thought, answer, finish)
    assert (name in names(chain, most_words=200)) is is_caught


def test_every_filter_has_both_kinds_of_examples() -> None:
    """Fails if a filter is added without examples."""
    for name in FILTERS.keys() - {"refused"}:
        of = [is_caught for other, *_, is_caught in CASES if other == name]
        assert {True, False} <= set(of), name


def test_a_letter_and_the_value_of_its_option_do_not_contradict() -> None:
    """Fails if "so 12", answered by the letter of 12, counts as a contradiction."""
    asked = question(options=("10", "12"), ground_truth="B")
    thought = "We add both numbers in the picture step by step. So 12."
    assert names(reply(thought, "\\boxed{B}"), asked) == []
    assert names(reply(thought.replace("So 12", "So A"), "\\boxed{B}"), asked) == ["contradiction"]


def config(**filters: Any) -> Distill:
    return Distill.model_validate(
        {
            "run": "r",
            "questions": ["q.parquet"],
            "teacher": {"url": "http://x", "model": "m"},
            "filters": filters,
        }
    )


@pytest.mark.parametrize(
    ("right", "answer", "wanted"),
    [
        (True, "\\boxed{5}", []),
        (False, "\\boxed{5}", ["wrong answer"]),
        (None, "\\boxed{5}", ["no verdict"]),
        (False, "five", ["no boxed answer"]),
    ],
)
def test_verdicts_are_filters_too(right: bool | None, answer: str, wanted: list[str]) -> None:
    """Fails if a wrong chain has no reason, or a chain without an answer has two."""
    assert caught(reply(ENGLISH, answer), question(), right, config()) == wanted


def test_a_filter_that_is_off_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if who has no language identification cannot run the rest."""

    def absent() -> None:
        raise ImportError

    monkeypatch.setattr("r1v3.distill.languages._identifier", absent)
    chain = reply(ENGLISH, ANSWERS["en"])
    assert names(chain, off=["mixed languages"]) == []
    with pytest.raises(ImportError):
        names(chain)


def test_further_phrases_can_be_named() -> None:
    """Fails if a teacher's own way to say that it is blind cannot be added."""
    chain = reply("My eyes are closed. " + ENGLISH, ANSWERS["en"])
    assert names(chain) == []
    assert names(chain, blind_phrases=["my eyes are closed"]) == ["cannot see"]
