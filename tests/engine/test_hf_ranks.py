"""A data-parallel HFEngine learns what one process learns, in real processes over gloo."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.hf_worker import CASES, MODULES
from tests.processes import made_once, run_ranks

# More micro-batches than ranks.
UNEVEN = ("three", "balanced")
NAMES = [f"{case} {modules}" for case in CASES for modules in MODULES]


@functools.cache
def results(who: str) -> dict[str, Any]:
    folder, _ = made_once("hf-ranks", lambda folder: run_ranks("tests.engine.hf_worker", 2, folder))
    return torch.load(folder / f"{who}.pt", weights_only=True)  # type: ignore[no-any-return]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {path: value}
    return {k: v for key, item in items for k, v in flat(item, f"{path}/{key}").items()}


def without_shares(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if not key.startswith("/mine")}


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_has_the_same_bits(name: str) -> None:
    """Fails if ranks drift apart: their next gradients would be of different weights."""
    first, second = (flat(results(f"rank{rank}")[name]) for rank in range(2))
    first, second = (without_shares(one) for one in (first, second))
    assert first.keys() == second.keys()
    assert [key for key in first if not same(first[key], second[key])] == []


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(UNEVEN)])
def test_up_to_one_micro_batch_a_rank_gives_the_bits_of_one_process(name: str) -> None:
    """Fails if a gradient is lost, counted twice, scaled by the ranks, or put in another's place;
    or if a parameter that nothing reached is decayed."""
    split, alone = flat(results("rank0")[name]), flat(results("alone")[name])
    split, alone = (without_shares(one) for one in (split, alone))
    assert split.keys() == alone.keys()
    assert [key for key in split if not same(split[key], alone[key])] == []


@pytest.mark.parametrize("modules", MODULES)
def test_ranks_share_micro_batches_by_their_cost(modules: str) -> None:
    """Fails if a rank with the only pictures is given as many micro-batches as one without."""
    shares = [results(who)[f"balanced {modules}"]["mine"] for who in ("rank0", "rank1")]
    assert shares == [[0], [1, 2, 3]]
    assert results("rank1")[f"three {modules}"]["mine"] == [1]


@pytest.mark.parametrize("case", UNEVEN)
@pytest.mark.parametrize("modules", MODULES)
def test_uneven_shares_sum_to_the_gradient_of_one_process(modules: str, case: str) -> None:
    """Fails if a micro-batch of an uneven split is left out or taken twice."""
    split, alone = (flat(results(who)[f"{case} {modules}"]) for who in ("rank0", "alone"))
    split, alone = (without_shares(one) for one in (split, alone))
    assert split.keys() == alone.keys()
    for key, value in split.items():
        torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-6, msg=key)


def test_pictures_that_only_one_rank_has_train_the_connector_of_both() -> None:
    """Fails if the case is not the one meant: text alone leaves the connector as it was."""
    for case, moves in (("one", True), ("texts", False)):
        steps = results("rank1")[f"{case} connector"]["steps"]
        assert (steps[0][0]["grad_norm_connector"] > 0) == moves


def test_one_rank_writes_the_model(tmp_path: Path) -> None:
    """Fails if two ranks write the same file at the same time, or none does."""
    folder, _ = made_once("hf-ranks", lambda folder: run_ranks("tests.engine.hf_worker", 2, folder))
    for name in NAMES:
        pair = [folder / f"{name.replace(' ', '-')}-{size}" for size in (1, 2)]
        weights = [(path / "model.safetensors").read_bytes() for path in pair]
        assert len(weights[0]) == len(weights[1])
        assert weights[0] == weights[1] or name.startswith(UNEVEN)
