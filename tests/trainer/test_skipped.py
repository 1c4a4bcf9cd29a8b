"""Work that is left out of a step: groups without signal, and gradients that are not finite."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.config import SFT, load
from r1v3.trainer.division import divide
from r1v3.trainer.episode import Part
from r1v3.trainer.loop import Skipped
from r1v3.trainer.metrics import read_metrics
from r1v3.trainer.supervised import SupervisedTrainer
from tests.tiny_run import home, write_configs
from tests.trainer.test_grpo import micro_batches, same, sampled_episode, trainer, weights


def with_flat_groups(episode: Any, flat: int) -> Any:
    """The episode, the last `flat` of its four groups without an advantage."""
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5] * 4)
    advantages[16 - 4 * flat :] = 0.0
    return replace(episode, advantages=advantages)


def parted(made: Any, episode: Any, *, apart: bool = True) -> Part:
    """The only gradient step of an episode."""
    packs = episode.packs(1, 2, apart=apart)
    [part], _ = divide(episode, packs, made.engine, made.replica_of, made.config)
    return part


def at_the_whole_price(part: Part) -> Part:
    """The same step with every micro-batch in the backward."""
    return replace(part, learned=[*part.learned, *part.measured], measured=[], learns=True)


@pytest.mark.parametrize("flat", [0, 1, 2, 3, 4])
def test_groups_without_an_advantage_are_not_trained_and_change_nothing(
    tmp_path: Path, flat: int
) -> None:
    """Fails if a group that teaches nothing costs a backward, or leaving it out changes the
    gradient, the divisor of the loss, or a metric of all tokens."""
    learned: list[int] = []
    results = []
    for apart in (True, False):
        made = trainer(tmp_path)
        episode = with_flat_groups(sampled_episode(made), flat)
        part = parted(made, episode, apart=apart)
        if not apart:
            part = at_the_whole_price(part)
        step = made.engine.train_step

        def watched(batches: Any, *arguments: Any, step: Any = step, **options: Any) -> Any:
            learned.append(sum(len(batch.prompt_ids) for batch in batches))
            return step(batches, *arguments, **options)

        made.engine.train_step = watched  # type: ignore[method-assign]
        metrics, outputs = made.gradient_step(part, 1e-3)
        rows = {
            key: torch.cat([output[key].flatten() for output in outputs]).double()
            for key in ("token_logprobs", "token_entropy", "tokens")
        }
        results.append((metrics, {key: float(value.sum()) for key, value in rows.items()}, made))
    assert learned == ([4 - flat] if flat < 4 else []) + [4]
    (ours, sums, made), (theirs, others, _) = results
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-7)
    assert sums == pytest.approx(others, rel=1e-5)
    assert (ours["grad_norm"] > 0) == (flat < 4)


@pytest.mark.parametrize("steps", [1, 2])
def test_groups_without_an_advantage_cost_nothing_and_move_no_bit(
    tmp_path: Path, steps: int
) -> None:
    """Fails if such a group passes through the model at all, for old log-probs or for metrics, or
    the weights after a step are other bits than with it in the backward."""
    settings = [f"gradient_steps={steps}", "micro_batch_prompts=1", "optimizer.weight_decay=0.1"]
    left: list[tuple[int, dict[str, Tensor], float]] = []
    for more in (["measure_all=false"], []):
        made = trainer(tmp_path, *settings, *more)
        passed: list[int] = []
        head = made.engine.head

        def watched(batch: Any, head: Any = head, passed: list[int] = passed) -> Any:
            passed.append(len(batch.prompt_ids))
            return head(batch)

        made.engine.head = watched  # type: ignore[method-assign]
        episode = with_flat_groups(sampled_episode(made), 3)
        metrics = made.update(episode)
        left.append((sum(passed), weights(made), metrics["entropy"]))
    # Old log-probs where there are several steps, and the step itself.
    assert [passed for passed, *_ in left] == [steps, 4 * steps]
    assert left[0][2] != left[1][2], "the flat groups have the entropy of the others"
    made = trainer(tmp_path, *settings)
    part = parted(made, with_flat_groups(sampled_episode(made), 3))
    made.gradient_step(at_the_whole_price(part), made.config.optimizer.learning_rate)
    for moved in [left[0][1], left[1][1], *([weights(made)] if steps == 1 else [])]:
        assert all(torch.equal(moved[name], value) for name, value in left[0][1].items())


def test_an_episode_without_any_signal_has_metrics(tmp_path: Path) -> None:
    """Fails if a step in which nothing is learned ends with an error."""
    made = trainer(tmp_path, "measure_all=false")
    metrics = made.update(with_flat_groups(sampled_episode(made), 4))
    assert metrics["tokens"] == 0 and metrics["entropy"] is None and metrics["grad_norm"] == 0


def test_prompts_are_divided_evenly_among_micro_batches(tmp_path: Path) -> None:
    """Fails if one rank gets four groups and the other one, or a group is lost."""
    made = trainer(tmp_path)
    episode, pad = sampled_episode(made), made.engine.tokenizer.pad_token_id
    for flat, wanted in ((0, [2, 2]), (1, [2, 1, 1]), (2, [1, 1, 1, 1]), (3, [1, 2, 1])):
        [found] = micro_batches(with_flat_groups(episode, flat), 1, 2, pad, apart=True)
        sizes = [len(batch.prompt_ids) for batch, _ in found]
        assert sizes == wanted, flat
        prompts = torch.cat([batch.prompt_ids[:, -1] for batch, _ in found])
        assert len(prompts) == 4


def test_skipped_steps_are_counted_in_a_row() -> None:
    """Fails if steps far apart would end a stage, or a stage that learns nothing would go on."""
    skipped, nan = Skipped(3), math.nan
    assert skipped.count([1.0, nan]) == 1 and not skipped.too_many
    assert skipped.count([math.inf]) == 1 and not skipped.too_many
    assert skipped.count([0.0]) == 0 and skipped.in_a_row == 0
    assert skipped.count([nan, nan]) == 2 and not skipped.too_many
    assert skipped.count([-math.inf]) == 1 and skipped.too_many


def supervised(folder: Path, *overrides: str, resuming: bool = False) -> SupervisedTrainer:
    write_configs(folder)
    own = [f"run={folder / 'run'}", f"model={home() / 'base'}", *overrides]
    return SupervisedTrainer("sft", load(SFT, folder / "configs/sft.yaml", own), resuming=resuming)


def spoil(made: Any, steps: set[int]) -> None:
    """Make the gradient of these steps infinite: one weight of the head's loss is."""
    step = made.engine.train_step

    def spoiled(batches: Any, loss: Any, **options: Any) -> Any:
        if made.step + 1 not in steps:
            return step(batches, loss, **options)
        return step(batches, lambda *a: (loss(*a)[0] * math.inf, loss(*a)[1]), **options)

    made.engine.train_step = spoiled


def test_a_stage_goes_on_after_gradients_that_are_not_finite(tmp_path: Path) -> None:
    """Fails if one bad batch ends a run of weeks, changes the weights, or is not counted."""
    made = supervised(tmp_path)
    spoil(made, {1, 2})
    before = weights(made)  # type: ignore[arg-type]
    made.take_step()
    made.take_step()
    assert same(before, made) and not made.engine.optimizer.state  # type: ignore[arg-type]
    made.take_step()
    assert not same(before, made) and made.skipped.in_a_row == 0  # type: ignore[arg-type]


def test_a_stage_that_can_learn_nothing_ends_and_resumes_with_the_next_rows(
    tmp_path: Path,
) -> None:
    """Fails if a diverged run burns its hours, or resuming meets the same rows again for ever."""
    made = supervised(tmp_path, "optimizer.max_skipped=2")
    spoil(made, {2, 3, 4})
    with pytest.raises(
        FloatingPointError, match="2 optimizer steps in a row, the last at step 3 of"
    ):
        made.loop()
    lines = read_metrics(tmp_path / "run/metrics/sft.jsonl")
    assert [line["steps_skipped"] for line in lines] == [0, 1, 1]
    assert [line["grad_norm"] is None for line in lines] == [False, True, True]
    again = supervised(tmp_path, "optimizer.max_skipped=2", resuming=True)
    assert again.step == 3 and again.seen == made.seen
    assert same(weights(made), again)  # type: ignore[arg-type]
    again.loop()
    assert again.step == again.total
