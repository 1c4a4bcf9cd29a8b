"""The processors for `generate`, called directly on the tiny vocabulary."""

import pytest
import torch

from r1v3.data.thoughts import THINK_CLOSE
from r1v3.integrations.transformers import NoWait, ThoughtBudget, banned_ids
from tests.tiny import tokenizer

WORDS = ["Wait", "Alternatively", "Hmm"]


def test_nowait_bans_every_form_and_nothing_else() -> None:
    """Fails if scores of other tokens change, or the caller's own tensor does."""
    nowait = NoWait(tokenizer())
    scores = torch.randn(3, len(tokenizer()))
    before = scores.clone()
    out = nowait(torch.zeros(3, 1, dtype=torch.int64), scores)
    assert torch.equal(scores, before)
    banned = torch.zeros(len(tokenizer()), dtype=torch.bool)
    banned[banned_ids(tokenizer(), WORDS)] = True
    assert (out[:, banned] == -torch.inf).all()
    assert torch.equal(out[:, ~banned], before[:, ~banned])


@pytest.mark.parametrize(
    "words",
    [["qqqqqq"], [], ["zebra crossing"], ["", " "], ["12345678901"], "xylophone", ["!?!?!?"],
     ["Überraschung"], ["再想一想吧"], ["antidisestablishment"]],
)  # fmt: skip
def test_words_that_no_token_writes_are_an_error(words: list[str]) -> None:
    """Fails if NoWait silently bans nothing."""
    with pytest.raises(ValueError, match="single token"):
        NoWait(tokenizer(), words)


def test_a_word_that_is_split_does_not_hinder_the_others() -> None:
    """Fails if one word of the default list that a vocabulary lacks makes NoWait unusable."""
    assert banned_ids(tokenizer(), ["qqqqqq", "Wait"]) == banned_ids(tokenizer(), ["Wait"])


def run(budget: int, written: str, steps: int, prompt: int = 3) -> str:
    """Greedy decoding of a model that goes on writing `written` over and over."""
    words = tokenizer()
    script = words.encode(written, add_special_tokens=False)
    processor = ThoughtBudget(words, budget, prompt)
    ids = torch.zeros(1, prompt, dtype=torch.int64)
    for step in range(steps):
        scores = torch.full((1, len(words)), -5.0)
        scores[0, script[step % len(script)]] = 5.0
        ids = torch.cat([ids, processor(ids, scores).argmax(-1, keepdim=True)], 1)
    return str(words.decode(ids[0, prompt:]))


@pytest.mark.parametrize("budget", range(10))
def test_an_open_thought_is_closed(budget: int) -> None:
    """Fails if the tag is not forced whole, once, at the budget."""
    out = run(budget, "So 92. ", budget + 12)
    assert out.count(f"\n{THINK_CLOSE}\n\n") == 1
    words = tokenizer()
    thought = out.partition(f"\n{THINK_CLOSE}")[0]
    assert len(words.encode(thought, add_special_tokens=False)) <= budget + 1


@pytest.mark.parametrize("end", [" {}\n\n", ".{}", "\n{}\n\n", "{}", ".\n{}\n\n"])
def test_a_closed_thought_is_left_alone(end: str) -> None:
    """Fails if a tag that merged with its neighbors is missed and a second one forced."""
    out = run(12, "So 3" + end.format(THINK_CLOSE) + "It is 3 and 3 and 3 and 3", 22)
    assert out.count(THINK_CLOSE) == 1 and f"\n{THINK_CLOSE}\n\n3" not in out


def test_rows_that_change_places_are_read_anew() -> None:
    """Fails if the state of a beam stays behind when the beam moves to another row."""
    words = tokenizer()
    close = words.encode(f"{THINK_CLOSE}", add_special_tokens=False)
    filler = words.encode("3", add_special_tokens=False) * len(close)
    budget, prompt = len(close), 2
    processor = ThoughtBudget(words, budget, prompt)
    rows = torch.tensor([[0, 0, *close], [0, 0, *filler]])
    scores = torch.zeros(2, len(words))
    for step in range(2, rows.shape[1]):
        processor(rows[:, :step], scores)
    forced = words.encode(f"\n{THINK_CLOSE}\n\n", add_special_tokens=False)
    out = processor(rows.flip(0), scores)
    assert out[0].argmax() == forced[0] and (out[0] == 0).sum() == 1
    assert torch.equal(out[1], scores[1])


@pytest.mark.parametrize(
    "arguments", [(-1, 3), (4, -1), (4, 3, "so"), (4, 3, ""), (4, 3, "</THINK>")]
)
def test_arguments_that_make_no_sense_are_named(arguments: tuple[int, int]) -> None:
    """Fails if a budget below 0 or a closing without a tag shows only as a thought that goes on."""
    with pytest.raises(ValueError, match="budget|closing"):
        ThoughtBudget(tokenizer(), *arguments)
