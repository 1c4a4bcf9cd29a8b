"""Work that is left out of a step: groups without signal, and gradients that are not finite."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from r1v3.config import SFT, load
from r1v3.trainer.loop import Skipped
from r1v3.trainer.metrics import read_metrics
from r1v3.trainer.supervised import SupervisedTrainer
from tests.tiny_run import home, write_configs
from tests.trainer.test_grpo import same, sampled_episode, trainer, weights


def with_flat_groups(episode: Any, flat: int) -> Any:
    """The episode, the last `flat` of its four groups without an advantage."""
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5] * 4)
    advantages[16 - 4 * flat :] = 0.0
    return replace(episode, advantages=advantages)


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
        [micro_batches] = episode.micro_batches(
            1, 2, made.engine.tokenizer.pad_token_id, apart=apart
        )
        if not apart:  # the whole price: every micro-batch is in the backward
            made.reference = made.engine
        step = made.engine.train_step

        def watched(batches: Any, *arguments: Any, step: Any = step, **options: Any) -> Any:
            learned.append(sum(len(batch.prompt_ids) for batch in batches))
            return step(batches, *arguments, **options)

        made.engine.train_step = watched  # type: ignore[method-assign]
        metrics, outputs = made.gradient_step(micro_batches, 1e-3)
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


def test_prompts_are_divided_evenly_among_micro_batches(tmp_path: Path) -> None:
    """Fails if one rank gets four groups and the other one, or a group is lost."""
    made = trainer(tmp_path)
    episode, pad = sampled_episode(made), made.engine.tokenizer.pad_token_id
    for flat, wanted in ((0, [2, 2]), (1, [2, 1, 1]), (2, [1, 1, 1, 1]), (3, [1, 2, 1])):
        [found] = with_flat_groups(episode, flat).micro_batches(1, 2, pad, apart=True)
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
