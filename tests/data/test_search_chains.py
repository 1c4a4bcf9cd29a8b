"""Chains that search: every calculation true, every dead end real, the ending verified."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from r1v3.config import Data, Evaluate, load
from r1v3.data import digits, tasks
from r1v3.data.chains import CAREFUL_STRENGTH, GLANCE_STRENGTH, Chain
from r1v3.data.digits import reading_probabilities
from r1v3.data.search_chains import (
    Searcher,
    calculation,
    calculation_back,
    look_twice,
    sample_search,
    search_signs,
    trial,
)
from r1v3.data.search_tasks import DIFFICULTIES, SEARCH_BUILDERS, Range
from r1v3.data.tasks import Problem
from r1v3.data.tokenizer import load_tokenizer
from r1v3.rewards.rules import answers_match

ROOT = Path(__file__).resolve().parent.parent.parent
SEARCHER = Searcher(noise=6.0, check=0.5)
LINE = r"((?:-?\d+[-+x]\d=-?\d+(?:, )?)+)"
TRIAL = re.compile(rf"([-+x]+): {LINE} (fits|not)\.")
BACK = re.compile(rf"Hmm, {LINE}it fits\.")
STEP = re.compile(r"(-?\d+)([-+x])(\d)=(-?\d+)")


def problems(domain: str, difficulty: str, count: int = 60, seed: int = 0) -> list[Problem]:
    rng = np.random.default_rng(seed)
    return [SEARCH_BUILDERS[domain]("train", rng, difficulty, Range()) for _ in range(count)]


def kept(
    domain: str, difficulty: str, searcher: Searcher = SEARCHER, count: int = 60
) -> list[tuple[Problem, Chain]]:
    rng = np.random.default_rng(1)
    pairs = [(p, sample_search(p, searcher, rng)[0]) for p in problems(domain, difficulty, count)]
    return [(problem, chain) for problem, chain in pairs if chain is not None]


def follow(line: str, first: str) -> tuple[str, str, str]:
    """Further digits, signs and last value of a calculation from `first`; checks every step."""
    digits, signs, value = "", "", first
    for before, sign, digit, after in STEP.findall(line):
        assert before == value
        a, b = int(before), int(digit)
        assert int(after) == {"+": a + b, "-": a - b, "x": a * b}[sign]
        digits, signs, value = digits + digit, signs + sign, after
    return digits, signs, value


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_every_calculation_is_true_and_every_verdict_honest(difficulty: str) -> None:
    """Fails if the cold start teaches wrong sums, or to accept or refuse what it should not."""
    checks = 0
    for problem, chain in kept("operators", difficulty):
        aim = rf" \({problem.target}\)\."
        readings = re.split(rf"I see (\d+){aim}|Hmm, it is (\d+){aim}", chain.thought)[1:]
        found = []
        for first, again, text in zip(*[iter(readings)] * 3, strict=True):
            read = first or again
            for stated, line, verdict in TRIAL.findall(text):
                digits, signs, missing = follow(line, read[0])
                assert (digits, signs) == (read[1:] + problem.target, stated + "-")
                assert (missing == "0") == (verdict == "fits")
                found += STEP.findall(line)
            for line in BACK.findall(text):
                digits, _, value = follow(line, problem.target)
                assert (digits, value) == (read[:0:-1], read[0])
                found += STEP.findall(line)
                checks += 1
        assert found == STEP.findall(chain.thought)
    assert checks > 3


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_a_search_ends_with_what_fits_and_tries_nothing_twice(difficulty: str) -> None:
    """Fails if dead ends are decoration: repeated, or behind the solution."""
    lengths = []
    for problem, chain in kept("operators", difficulty, replace(SEARCHER, check=0.0)):
        read, _, last = re.split(r"(?:I see|Hmm, it is) ", chain.thought)[-1].partition(". ")
        tried = [follow(line, read[0])[1][:-1] for _, line, _ in TRIAL.findall(last)]
        assert len(set(tried)) == len(tried) and last.endswith(" fits.")
        assert last.count("fits") == 1 and tried[-1] == chain.answer
        assert answers_match(chain.answer, problem.answer)
        words = len(re.findall("Wait|Alternatively|Hmm", chain.thought))
        assert words == chain.rechecks <= SEARCHER.most_trials
        lengths.append(len(tried))
    assert set(lengths) >= {1, 2, 3}


def test_a_fixed_order_leaves_nothing_out() -> None:
    """Fails if a systematic search skips a way, or if its words do not say how trials differ."""
    searcher = Searcher(order="fixed", check=0.0, most_trials=16)
    ways = {"+++", "++-", "+-+", "+--", "-++", "-+-", "--+", "---"}
    seen = set()
    for _, chain in kept("operators", "hard", searcher, 100):
        last = chain.thought.split("it is")[-1]
        tried = re.findall(r"(?:(\w+), )?([-+]{3}): ", last)
        stated = [signs for _, signs in tried]
        assert stated == sorted(ways)[: len(stated)]
        for (_, before), (word, signs) in zip(tried, tried[1:], strict=False):
            assert word == ("Wait" if before[0] == signs[0] else "Alternatively")
        seen.add(stated[-1])
    assert len(seen) > 5


def test_some_chains_go_on_without_a_word() -> None:
    """Fails if NoWait, which bans the words, would leave a model no way to search on."""
    chains = kept("operators", "hard", replace(SEARCHER, plain=0.5, check=0.0), 100)
    trials = sum(len(TRIAL.findall(chain.thought)) - 1 for _, chain in chains)
    words = sum(len(re.findall("Wait|Alternatively", chain.thought)) for _, chain in chains)
    assert 0.35 * trials < words < 0.65 * trials
    looks = [c.rechecks for _, c in kept("two_hands", "normal", replace(SEARCHER, plain=0.5), 100)]
    assert 35 < looks.count(0) < 65
    short = [c for _, c in kept("two_hands", "normal", replace(SEARCHER, plain=1.0), 20)]
    assert not re.search("Wait|Hmm|second", "".join(chain.thought for chain in short))


def test_harder_questions_have_longer_chains() -> None:
    """Fails if length says nothing about difficulty."""
    trials = []
    for difficulty in DIFFICULTIES:
        chains = [chain for _, chain in kept("operators", difficulty, count=200)]
        trials.append(
            np.mean([c.thought.count(" not.") for c in chains if "it is" not in c.thought])
        )
    assert trials[0] + 0.2 < trials[1]


def test_a_second_look_disagrees_exactly_where_the_hands_were_read_differently() -> None:
    """Fails if "Wait" stands where nothing was found, or a disagreement is passed over."""
    kinds = set()
    for problem, chain in kept("two_hands", "hard"):
        first = re.findall(r"I see (\d+)\.", chain.thought)[0]
        second = re.findall(r"the second is (\d+)", chain.thought)[0]
        assert ("Wait" in chain.thought) == (first != second) == (chain.rechecks == 2)
        chosen = first
        if first != second:
            weighed = re.findall(rf"Hmm, {first} or {second}\. It is (\d+)\.", chain.thought)
            (chosen,) = weighed
            assert all(d in pair for d, *pair in zip(chosen, first, second, strict=True))
        digits, signs, total = follow(chain.thought, chosen[0])
        assert (digits, set(signs), total) == (chosen[1:], {"+"}, problem.answer)
        kinds.add(first == second)
    assert kinds == {True, False}


def test_the_second_hand_is_evidence() -> None:
    """Fails if weighing both hands reads no better than looking at one."""
    one = both = 0
    rng = np.random.default_rng(2)
    for problem in problems("two_hands", "hard", 300):
        chain = look_twice(problem, SEARCHER, rng)
        first = re.findall(r"I see (\d+)\.", chain.thought)[0]
        one += sum(map(int, first)) == int(problem.answer)
        both += chain.answer == problem.answer
    assert both > one + 30


@pytest.mark.parametrize(
    ("domain", "think"), [("operators", search_signs), ("two_hands", look_twice)]
)
def test_the_teacher_sees_neither_labels_nor_the_answer(
    domain: str, think: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if chains are decorated answers: with other labels it must write the same."""
    asked = problems(domain, "normal", 20)
    for strength in (GLANCE_STRENGTH, CAREFUL_STRENGTH):
        reading_probabilities(strength)
    before = [think(p, SEARCHER, np.random.default_rng(i)) for i, p in enumerate(asked)]  # type: ignore[operator]
    permuted = replace(digits.scans(), labels=(digits.scans().labels + 3) % 10)
    for module in (digits, tasks):
        monkeypatch.setattr(module, "scans", lambda: permuted)
    hidden = [replace(problem, answer="?") for problem in asked]
    after = [think(p, SEARCHER, np.random.default_rng(i)) for i, p in enumerate(hidden)]  # type: ignore[operator]
    assert after == before


def test_wrong_and_endless_chains_are_rejected() -> None:
    """Fails if a misreading that reaches the target by luck is taught."""
    (problem,) = problems("operators", "normal", 1)
    impossible = replace(problem, answer="0")
    assert sample_search(impossible, SEARCHER, np.random.default_rng(0), 3) == (None, 3)
    hopeless = replace(problem, target="99")
    assert search_signs(hopeless, SEARCHER, np.random.default_rng(0)) is None


def test_the_same_seed_writes_the_same_chains() -> None:
    """Fails if two builds of a dataset differ."""
    assert kept("operators", "hard") == kept("operators", "hard")


def test_calculations_by_hand() -> None:
    """3+5 is 8 and 8-1 is 7; back, 7+1 is 8 and 8-5 is 3."""
    assert calculation((3, 5, 1), "+-") == "3+5=8, 8-1=7"
    assert calculation((3, 9, 1), "-+") == "3-9=-6, -6+1=-5"
    assert calculation((2, 3, 4), "+x") == "2+3=5, 5x4=20"
    assert calculation_back((3, 5, 1), "+-", 7) == "7+1=8, 8-5=3"
    assert trial((3, 5, 1), "+-", 7) == "+-: 3+5=8, 8-1=7, 7-7=0 fits."
    assert trial((3, 5, 1), "--", 7) == "--: 3-5=-2, -2-1=-3, -3-7=-10 not."


def test_the_longest_chain_fits_the_evaluation_of_the_recipe() -> None:
    """Fails if the cold start teaches what decoding would cut off, or words of many tokens."""
    tokenizer = load_tokenizer(ROOT / "assets/tiny-internvl")
    config = load(Evaluate, ROOT / "configs/search/eval.yaml")
    taught = load(Data, ROOT / "configs/search/data.yaml").search
    searcher = replace(SEARCHER, order=taught.order, most_trials=taught.most_trials)
    longest = 0
    for difficulty in DIFFICULTIES:
        for _, chain in kept("operators", difficulty, searcher, 100):
            text = f"{chain.thought}\n</think>\n\n\\boxed{{{chain.answer}}}"
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids) == text
            longest = max(longest, len(ids))
    assert 100 < longest < config.decoding.max_tokens
    for word in (" Wait", " Alternatively", " Hmm", " not", " fits"):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1
