"""Datasets: what a sample says about its picture is what the picture shows."""

import re
from collections import Counter

import numpy as np
import pytest

from r1v3.data import builders
from r1v3.data.builders import (
    SKILL_KINDS,
    base_corpus,
    cold_start,
    connector_mix,
    questions,
)
from r1v3.data.chains import TeacherConfig
from r1v3.data.compose import GRID, Cell
from r1v3.data.digits import scans
from r1v3.data.images import load_image
from r1v3.data.sample import Sample
from r1v3.data.tasks import BUILDERS, EMPTY_CELL, IN_DOMAIN, OUT_OF_DOMAIN
from r1v3.rewards import accuracy_reward
from r1v3.rewards.format import format_reward

TEACHER = TeacherConfig()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[Cell]]:
    """Collects the cells of every picture that is composed."""
    seen: list[list[Cell]] = []
    compose = builders.compose

    def watch(cells: list[Cell], rng: np.random.Generator) -> np.ndarray:
        seen.append(cells)
        return compose(cells, rng)

    monkeypatch.setattr(builders, "compose", watch)
    return seen


def scan_ids(pictures: list[list[Cell]]) -> set[int]:
    return {c.content for cells in pictures for c in cells if isinstance(c.content, int)}


@pytest.mark.parametrize("split", ["train", "rl", "validation", "test"])
def test_composed_pictures_never_cross_splits(split: str, drawn: list[list[Cell]]) -> None:
    """A test scan in a training picture would let the model be scored on what it memorized."""
    questions(split, (*IN_DOMAIN, *OUT_OF_DOMAIN), 24, 0)
    cold_start(split, 12, 0, TEACHER)
    base_corpus(split, 32, 0)
    base_corpus(split, 16, 0, SKILL_KINDS)
    connector_mix(split, 16, 0, TEACHER)
    used = scan_ids(drawn)
    assert len(used) > 50
    assert used <= set(scans().split[split].tolist())


def test_questions_take_turns_over_their_domains_and_carry_their_answer() -> None:
    samples = questions("rl", IN_DOMAIN, 9, 0)
    assert [s.domain for s in samples] == list(IN_DOMAIN) * 3
    assert [s.index for s in samples] == list(range(9))
    for sample in samples:
        assert sample.split == "rl" and sample.response is None and len(sample.images) == 1
        assert load_image(sample.images[0]).size == (64, 64)
        assert sample.prompt[0]["content"] == f"<image>\n{sample.question}"
        boxed = f"\\boxed{{{sample.ground_truth}}}"
        assert accuracy_reward(boxed, sample.ground_truth, options=sample.options) == 1
        wrong = "\\boxed{D}" if sample.options else "\\boxed{777}"
        assert accuracy_reward(wrong, sample.ground_truth, options=sample.options) == 0


def test_cold_start_responses_earn_full_reward_and_match_the_ground_truth() -> None:
    result = cold_start("train", 60, 0, TEACHER)
    assert len(result.samples) == 60
    for sample in result.samples:
        response = sample.response
        assert response is not None and response.count("</think>") == 1
        assert "<think>" not in response
        assert format_reward(response) == 1
        assert accuracy_reward(response, sample.ground_truth, options=sample.options) == 1
    assert {s.domain for s in result.samples} == set(IN_DOMAIN)
    assert result.written >= 60 + result.abandoned
    again = sum(bool(re.search("Wait|Hmm|Alternatively", str(s.response))) for s in result.samples)
    assert result.rechecks == again > 0


def test_rejected_chains_are_counted_and_never_kept() -> None:
    """A teacher that always slips is only right where its check mends it."""
    poor = TeacherConfig(glance_sharpness=0.3, doubt=0.0, slip=0.0, check=0.0)
    result = cold_start("train", 30, 1, poor, tries=2)
    assert result.abandoned > 0
    assert result.written > 30 + result.abandoned
    for sample in result.samples:
        text = str(sample.response)
        assert accuracy_reward(text, sample.ground_truth, options=sample.options) == 1


def test_the_base_corpus_has_no_picture_with_a_chain_of_thought() -> None:
    """SFT must be seen to teach what the base model is not taught."""
    kinds = Counter()
    for sample in base_corpus("train", 96, 0):
        response = str(sample.response)
        assert "think>" not in response and sample.extra_info["thinking"] is False
        assert not re.search("Wait|Hmm|Alternatively", response)
        kinds["picture" if sample.images else "text"] += 1
        if sample.images:
            assert "Ones" not in response and "So " not in response
        else:
            assert accuracy_reward(response, sample.ground_truth, options=sample.options) == 1
    assert kinds["picture"] > 0 and kinds["text"] > 0 and kinds.total() == 96


def test_transcriptions_are_what_the_picture_shows(drawn: list[list[Cell]]) -> None:
    samples = [s for s in base_corpus("train", 64, 2, ("dense", "rows")) if s.images]
    for sample, cells in zip(samples, drawn, strict=True):
        marks = {
            (c.row, c.column): c.content
            if isinstance(c.content, str)
            else str(scans().labels[c.content])
            for c in cells
        }
        digits = {k: mark for k, mark in marks.items() if mark.isdigit()}
        if "cell by cell" in sample.question:
            shown = {divmod(i, GRID): mark for i, mark in enumerate(str(sample.response))}
            assert {k: mark for k, mark in shown.items() if mark != EMPTY_CELL} == digits
        else:
            stated = re.findall(r"\d", str(sample.response))
            assert stated == [digits[k] for k in sorted(digits)]


def test_text_only_problems_state_the_digits_they_ask_about() -> None:
    for sample in base_corpus("train", 40, 3, ("worked",)):
        assert not sample.images and "<image>" not in sample.prompt[0]["content"]
        stated = sample.question.split("\n")[0].removeprefix("The picture shows ").rstrip(".")
        if sample.domain == "arithmetic":
            a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)", stated).groups()  # type: ignore[union-attr]
            right = int(a) + int(b) if sign == "+" else int(a) - int(b)
            assert sample.ground_truth == str(right)
        if sample.domain == "counting":
            target = sample.question.split("digit ")[1][0]
            assert sample.ground_truth == str(stated.count(target))


def test_matching_asks_for_the_letter_of_an_option() -> None:
    letters = set()
    for sample in base_corpus("train", 30, 4, ("matching",)):
        asked = sample.question.split("\n")[0].removeprefix("Which option says ").rstrip("?")
        assert sample.options is not None and not sample.images
        assert sample.options["ABC".index(sample.ground_truth)] == asked
        assert f"{sample.ground_truth}. {asked}" in sample.question.split("\n")
        response = str(sample.response)
        assert accuracy_reward(response, sample.ground_truth, options=sample.options) == 1
        letters.add(sample.ground_truth)
    assert letters == set("ABC")


def test_the_connector_mix_is_wider_than_the_recipe_but_never_the_held_out_domain() -> None:
    samples = connector_mix("train", 120, 0, TEACHER)
    assert len(samples) == 120
    domains = {s.domain for s in samples}
    assert "reading" in domains and set(IN_DOMAIN) <= domains
    assert not domains & set(OUT_OF_DOMAIN)
    thinking = [s for s in samples if s.extra_info["thinking"]]
    assert len(thinking) == 60
    assert all("</think>" in str(s.response) for s in thinking)
    assert all("</think>" not in str(s.response) for s in samples if s not in thinking)
    bare = [s for s in samples if str(s.response).startswith("\\boxed")]
    assert 0 < len(bare) < 60


@pytest.mark.parametrize(
    "build",
    [
        lambda seed: questions("rl", IN_DOMAIN, 6, seed),
        lambda seed: cold_start("train", 6, seed, TEACHER).samples,
        lambda seed: base_corpus("train", 8, seed),
        lambda seed: connector_mix("train", 8, seed, TEACHER),
    ],
    ids=["questions", "cold_start", "base_corpus", "connector_mix"],
)
def test_a_seed_gives_the_same_samples_to_the_byte(build: object) -> None:
    first, again, other = (build(seed) for seed in (3, 3, 4))  # type: ignore[operator]
    assert first == again
    assert first != other


def test_longer_datasets_begin_with_the_shorter_ones() -> None:
    """Or a larger count would not be more of the same data."""
    assert questions("rl", IN_DOMAIN, 8, 0)[:4] == questions("rl", IN_DOMAIN, 4, 0)
    long: list[Sample] = cold_start("train", 8, 0, TEACHER).samples
    assert long[:4] == cold_start("train", 4, 0, TEACHER).samples


def test_every_domain_has_a_builder() -> None:
    assert {*IN_DOMAIN, *OUT_OF_DOMAIN} < set(BUILDERS)
