"""Budgeted thoughts: when the closing tag is forced, in texts that split it in every way."""

import pytest

from r1v3.data.thoughts import THINK_CLOSE, BudgetedThought

FORCED = (101, 102, 103)
FORCED_TEXTS = dict(zip(FORCED, ("\n</", "think", ">\n\n"), strict=True))


def play(written: list[str], budget: int) -> list[str]:
    """The completion of a model that writes these tokens wherever nothing is forced."""
    thought, out, rest = BudgetedThought(budget, FORCED), [], list(written)
    while rest:
        forced = thought.forced_token()
        assert forced == thought.forced_token(), "asking twice must change nothing"
        text = rest.pop(0) if forced is None else FORCED_TEXTS[forced]
        thought.read(text)
        out.append(text)
    return out


# Spellings of a tag that the model writes itself, by the tokens it may come in.
TAGS = [
    ["</think>"], ["</", "think", ">"], [" </", "think", ">\n\n"], [".</", "think", ">"],
    ["\n", "</", "think", ">\n\n"], ["<", "/", "t", "h", "i", "n", "k", ">"], ["<", "/think>"],
    ["</thi", "nk>"], ["x</think", ">y"], ["</think", ">"], ["a </", "think>b"],
]  # fmt: skip


@pytest.mark.parametrize("tag", TAGS, ids="|".join)
def test_a_tag_written_in_time_is_the_only_one(tag: list[str]) -> None:
    """Fails if a tag is missed because of its tokens, and a second one is forced behind it."""
    for budget in range(3 + len(tag), 3 + len(tag) + 3):
        out = "".join(play(["a", "b", "c", *tag, "d", "e", "f", "g"], budget))
        assert out.count(THINK_CLOSE) == 1


@pytest.mark.parametrize("tag", TAGS, ids="|".join)
def test_a_tag_that_is_being_written_is_not_cut(tag: list[str]) -> None:
    """Fails if a budget that ends within a tag breaks it in two."""
    written = ["a", "b", "c", *tag, "d", "e", "f", "g"]
    for budget in range(4, 3 + len(tag)):
        out = play(written, budget)
        if "".join(out[:budget]).endswith(("</", "</t", "</think", "<", "</thi", "/", "/t")):
            assert "".join(out).count(THINK_CLOSE) == 1


@pytest.mark.parametrize("budget", range(12))
def test_an_open_thought_is_closed_exactly_at_its_budget(budget: int) -> None:
    """Fails if the tag comes a token early or late, or is not whole."""
    out = play([f"w{i}" for i in range(30)], budget)
    assert out[budget : budget + 3] == list(FORCED_TEXTS.values())
    assert "".join(out).count(THINK_CLOSE) == 1


@pytest.mark.parametrize("at", range(1, 11))
def test_a_thought_that_is_opened_again_has_its_own_budget(at: int) -> None:
    """Fails if a model escapes its budget by opening a second thought."""
    answer = ["</think>", *["x"] * at, "<think>", *["y"] * 20]
    out = play(answer, 4)
    reopened = out.index("<think>")
    assert out[reopened + 5 : reopened + 8] == list(FORCED_TEXTS.values())


@pytest.mark.parametrize(
    "text",
    [
        "</ think>", "</thinking>", "< /think>", "<think>", "</THINK>", "</thin k>", "think>",
        "</b>", "<//think>", "&lt;/think&gt;", "</thin",
    ],
)  # fmt: skip
def test_what_only_resembles_the_tag_closes_nothing(text: str) -> None:
    """Fails if other text counts as the end of the thought, which then has no budget."""
    out = "".join(play([text, *["z"] * 20], 5))
    assert out.count("\n</think>\n\n") == 1
