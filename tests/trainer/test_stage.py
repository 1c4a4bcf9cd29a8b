"""The pieces that all stages share."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1v3.config import Optimizer, Select, load
from r1v3.data.encoding import in_row
from r1v3.engine.build import set_threads
from r1v3.trainer.randomness import order, stream, torch_stream
from r1v3.trainer.schedule import learning_rate
from r1v3.trainer.stage import begin, require_fresh

KEYS = st.lists(st.one_of(st.integers(0, 2**31), st.text(min_size=1, max_size=8)), min_size=1)
FAST = settings(max_examples=60, deadline=None)


@FAST
@given(KEYS)
def test_a_stream_depends_on_its_key_alone(key: list[int | str]) -> None:
    """Otherwise a resumed run would need generator states that nobody saved."""
    first = stream(*key).integers(0, 2**63, 4)
    np.random.seed(1)
    torch.manual_seed(1)
    assert (stream(*key).integers(0, 2**63, 4) == first).all()
    assert torch_stream(*key).initial_seed() == torch_stream(*key).initial_seed()


@FAST
@given(st.integers(0, 10_000), st.integers(0, 10_000), st.sampled_from(["rollout", "order"]))
def test_streams_of_different_keys_differ(a: int, b: int, purpose: str) -> None:
    """Otherwise two steps, or sampling and shuffling, would see the same random numbers."""
    first = stream(a, purpose, b).integers(0, 2**63, 4).tolist()
    assert first != stream(a, purpose, b + 1).integers(0, 2**63, 4).tolist()
    assert first != stream(a + 1, purpose, b).integers(0, 2**63, 4).tolist()
    assert first != stream(a, purpose + "x", b).integers(0, 2**63, 4).tolist()


@FAST
@given(st.integers(1, 30), st.integers(0, 4), st.integers(0, 1000))
def test_every_pass_visits_each_item_once(count: int, passes: int, seed: int) -> None:
    """Otherwise an epoch would skip samples and repeat others."""
    entries = order(count, 0, count * passes, seed, "x")
    for start in range(0, len(entries), count):
        assert sorted(entries[start : start + count]) == list(range(count))


@FAST
@given(st.integers(1, 30), st.lists(st.integers(0, 40), max_size=6), st.integers(0, 1000))
def test_any_split_of_steps_gives_the_same_sequence(
    count: int, sizes: list[int], seed: int
) -> None:
    """Otherwise a run resumed in the middle of a pass would see other samples."""
    joined: list[int] = []
    for size in sizes:
        joined += order(count, len(joined), size, seed, "x")
    assert joined == order(count, 0, sum(sizes), seed, "x")


def test_passes_are_shuffled_differently() -> None:
    """Otherwise every epoch would come in the same order."""
    entries = order(50, 0, 100, 0, "x")
    assert entries[:50] != entries[50:]
    assert entries[:50] != order(50, 0, 50, 1, "x")


def test_no_items_are_an_error() -> None:
    """Otherwise an empty dataset would fail with a division by zero."""
    with pytest.raises(ValueError, match="training data is empty"):
        order(0, 0, 4, 0)


@FAST
@given(
    st.integers(1, 500),
    st.floats(0, 1),
    st.sampled_from(["cosine", "constant"]),
    st.floats(1e-6, 1.0),
)
def test_learning_rates_stay_within_the_peak(
    total: int, ratio: float, schedule: str, peak: float
) -> None:
    """Otherwise a schedule could overshoot, or take a step of size 0 or below."""
    config = Optimizer(learning_rate=peak, schedule=schedule, warmup_ratio=ratio)  # type: ignore[arg-type]
    rates = [learning_rate(step, total, config) for step in range(total)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    warmup = max(1, round(ratio * total))
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_warm_up_and_cosine_have_the_right_end_points() -> None:
    """Otherwise the first step would be wasted at rate 0, or the last taken at full rate."""
    config = Optimizer(learning_rate=1.0, schedule="cosine", warmup_ratio=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0, abs=1e-12) and 0 < rates[99] < 1e-3
    flat = Optimizer(learning_rate=1.0, schedule="constant", warmup_ratio=0.1)
    assert [learning_rate(step, 100, flat) for step in (9, 10, 99)] == [1.0, 1.0, 1.0]


def test_begin_writes_a_configuration_that_loads_back(tmp_path: Path) -> None:
    """Otherwise a run could not be repeated from its own folder."""
    config = Select(run=tmp_path / "run", rule="validation_accuracy")
    begin("select", config, tmp_path / "run")
    assert load(Select, tmp_path / "run/config/select.yaml") == config
    environment = tmp_path / "run/environment.json"
    first = environment.read_bytes()
    begin("select", config, tmp_path / "run")
    assert environment.read_bytes() == first


@pytest.mark.parametrize("left", ["models/sft", "checkpoints/sft"])
def test_a_stage_is_not_started_over_another(tmp_path: Path, left: str) -> None:
    """Otherwise a forgotten --resume would mix two runs in one folder."""
    require_fresh("sft", tmp_path, False)
    (tmp_path / left).mkdir(parents=True)
    require_fresh("sft", tmp_path, True)
    require_fresh("grpo", tmp_path, False)
    with pytest.raises(ValueError, match="already holds stage sft; pass --resume"):
        require_fresh("sft", tmp_path, False)


def test_a_bad_row_is_named() -> None:
    """Otherwise one broken picture among thousands could not be found."""
    with pytest.raises(ValueError, match=r"^a\.parquet row 7: no tiles$"):
        with in_row(Path("a.parquet"), 7):
            raise ValueError("no tiles")


def test_threads_are_set_only_when_asked_for() -> None:
    """Otherwise `threads: null` would change a user's own choice."""
    before = torch.get_num_threads()
    set_threads(None)
    assert torch.get_num_threads() == before
    set_threads(1)
    assert torch.get_num_threads() == 1
    set_threads(before)


def test_a_changed_configuration_is_named_when_a_stage_goes_on(tmp_path: Path) -> None:
    """Otherwise a resumed run could silently be of two experiments."""
    first = load(Select, None, [f"run={tmp_path}", "rule=critical_entropy"])
    second = load(Select, None, [f"run={tmp_path}", "rule=validation_accuracy"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin("select", first, tmp_path)
        begin("select", first, tmp_path)
    with pytest.warns(UserWarning, match="rule critical_entropy -> validation_accuracy"):
        begin("select", second, tmp_path)
