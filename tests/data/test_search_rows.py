"""The datasets of the search recipe."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from r1v3.config import ConfigError, Data, Search, load
from r1v3.data.digits import scans
from r1v3.data.recipe import build
from r1v3.data.sample import Sample
from r1v3.data.schema import load_samples
from r1v3.data.search_chains import Searcher
from r1v3.data.search_rows import (
    IN_DOMAIN_KINDS,
    OUT_OF_DOMAIN_KINDS,
    Mix,
    search_cold_start,
    search_questions,
)
from r1v3.data.search_tasks import SEARCH_IN_DOMAIN, SEARCH_OUT_OF_DOMAIN
from r1v3.data.tasks import IN_DOMAIN
from r1v3.rewards import score

ROOT = Path(__file__).resolve().parent.parent.parent
COUNTS = {
    "sft": 24,
    "sft_validation": 6,
    "grpo": 12,
    "grpo_validation": 6,
    "connector": 12,
    "connector_validation": 6,
    "test_in_domain": 12,
    "test_out_of_domain": 8,
}
SPLIT = {"sft": "train", "connector": "train", "grpo": "rl", "test_in_domain": "test",
         "test_out_of_domain": "test"}  # fmt: skip


def test_every_dataset_has_its_count_split_and_domains(tmp_path: Path) -> None:
    """Fails if a held-out domain is trained, or a difficulty is missing from a row."""
    paths = build(Data(run=tmp_path, tasks="search", **COUNTS))
    assert set(paths) == set(COUNTS)
    for name, path in paths.items():
        samples = load_samples(path)
        assert len(samples) == COUNTS[name]
        assert {s.split for s in samples} == {SPLIT.get(name, "validation")}
        domains = {str(s.domain) for s in samples}
        if name.startswith("connector"):
            assert domains <= {*SEARCH_IN_DOMAIN, *IN_DOMAIN, "reading", "grid"}
            assert domains & set(SEARCH_IN_DOMAIN)
            continue
        held_out = name == "test_out_of_domain"
        if name.startswith("sft"):
            samples = [s for s in samples if s.domain != "sums"]
            domains -= {"sums"}
        assert domains == set(SEARCH_OUT_OF_DOMAIN if held_out else SEARCH_IN_DOMAIN)
        assert {s.extra_info["difficulty"] for s in samples} == {"normal", "hard"}
        for sample in samples:
            assert ("trials" in sample.extra_info) == (sample.domain in ("operators", "column"))
    account = json.loads((tmp_path / "data" / "statistics.json").read_text())
    assert account["chains_train"]["questions_kept"] == COUNTS["sft"]
    assert account["test_in_domain"]["domains"] == {"operators": 9, "two_hands": 3}


def test_every_response_earns_the_whole_reward() -> None:
    """Fails if the cold start teaches a form, or an answer, that GRPO then punishes."""
    mix = Mix(bare=0.3, drill=0.3)
    samples = search_cold_start("train", 60, 0, Searcher(noise=8.0), mix).samples
    assert {str(s.domain) for s in samples} == {*SEARCH_IN_DOMAIN, "sums"}
    for thinking in (True, False):
        rows = [s for s in samples if s.thinking == thinking]
        rewards = score([str(s.response) for s in rows], rows, thinking=thinking)
        assert len(rows) > 8 and {reward.total for reward in rewards} == {1.0}


@pytest.mark.parametrize("name", ["bare", "drill"])
def test_bare_answers_and_sums_are_as_many_as_asked(name: str) -> None:
    """Fails if NoThink is a mode that the model was never shown, or if sums crowd out questions."""

    def share(part: float) -> float:
        samples = search_cold_start("train", 100, 0, Searcher(), Mix(**{name: part})).samples
        return float(np.mean([not s.thinking for s in samples]))

    assert share(0.0) == 0.0 and share(1.0) == 1.0 and 0.1 < share(0.3) < 0.5


def test_drills_are_true_and_have_no_picture() -> None:
    """Fails if the arithmetic that searches rest on is taught wrong."""
    samples = search_cold_start("train", 30, 0, Searcher(), Mix(drill=1.0)).samples
    for sample in samples:
        steps = re.findall(r"(-?\d+)([-+])(\d)=(-?\d+)", str(sample.response))
        assert len(steps) > 8 and not sample.images
        target = re.findall(r"give \((-?\d+)\)\?", sample.question)[0]
        verdicts = re.findall(r"-(\d)=(-?\d+) (fits|not)\.", str(sample.response))
        assert len(verdicts) == 5 and {asked for asked, _, _ in verdicts} == {target}
        assert all((missing == "0") == (said == "fits") for _, missing, said in verdicts)
        assert sample.ground_truth == str(sum(said == "fits" for _, _, said in verdicts))
        for a, sign, b, c in steps:
            assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_a_shorter_dataset_is_the_beginning_of_a_longer_one() -> None:
    """Fails if a run with fewer questions asks others, so that runs cannot be compared."""
    searcher = Searcher()
    long, short = (search_questions("rl", IN_DOMAIN_KINDS, n, 0, searcher) for n in (9, 4))
    assert long[:4] == short
    assert search_questions("rl", IN_DOMAIN_KINDS, 4, 1, searcher) != short
    long, short = (search_cold_start("train", n, 0, searcher).samples for n in (9, 4))
    assert long[:4] == short


def test_splits_share_no_handwriting() -> None:
    """Fails if a picture of the test is composed of scans that training saw."""
    parts = [set(ids.tolist()) for ids in scans().split.values()]
    assert sum(map(len, parts)) == len(set.union(*parts))
    pictures: dict[str, set[bytes]] = {}
    for split in scans().split:
        samples = search_questions(split, OUT_OF_DOMAIN_KINDS, 8, 0, Searcher())
        pictures[split] = {s.images[0] for s in samples}
    assert len(set.union(*pictures.values())) == sum(map(len, pictures.values()))


@pytest.mark.parametrize("signs", ["", "+", "-+", "+-*", "++"])
def test_signs_that_leave_nothing_to_choose_are_refused(signs: str) -> None:
    """Fails if a configuration is accepted for which no question has one solution."""
    with pytest.raises(ValueError, match="signs"):
        Search(signs=signs)


def test_the_recipe_is_complete_and_an_unknown_task_is_refused() -> None:
    """Fails if `r1v3 demo --configs configs/search` would build another recipe's data."""
    config = load(Data, ROOT / "configs/search/data.yaml")
    assert config.tasks == "search"
    assert {name for name, count in config.model_dump().items() if name in COUNTS and count} == set(
        COUNTS
    )
    names = {path.name for path in (ROOT / "configs/demo").glob("*.yaml")}
    assert {path.name for path in (ROOT / "configs/search").glob("*.yaml")} == names
    with pytest.raises(ConfigError, match="tasks"):
        load(Data, ROOT / "configs/search/data.yaml", ["tasks=chess"])


def test_the_demo_is_what_it_was(tmp_path: Path) -> None:
    """Fails if rows of the demo get new keys, so that its files and numbers change."""
    rows: list[Sample] = load_samples(build(Data(run=tmp_path, sft=3))["sft"])
    known = {"split", "index", "domain", "options", "question", "answer", "response", "thinking"}
    assert all(set(row.extra_info) == known for row in rows)
    assert [row.domain for row in rows] == list(IN_DOMAIN)
