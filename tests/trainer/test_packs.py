"""Micro-batches as a budget of tokens: groups that are divided teach what whole ones teach."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.config import SFT, ConfigError, load
from r1v3.model.flops import Work, work_of
from r1v3.trainer.supervised import SupervisedTrainer, micro_batches
from tests.tiny_run import home, write_configs
from tests.trainer.test_grpo import micro_batches as taken
from tests.trainer.test_grpo import sampled_episode, trainer
from tests.trainer.test_skipped import with_flat_groups

Rows = list[tuple[int, ...]]


def rows_of(micro_batches: list[Any]) -> Rows:
    """(prompt, response) tokens of every row, sorted."""
    found: Rows = []
    for batch, targets in micro_batches:
        assert len(targets.advantages) == len(batch.response_ids)
        for row, (ids, mask) in enumerate(zip(batch.response_ids, batch.loss_mask, strict=True)):
            prompt = row // batch.group_size
            shown = batch.prompt_ids[prompt][batch.prompt_mask[prompt]].tolist()
            advantage = int(1e6 * targets.advantages[row])
            found.append((*shown, *ids[mask].tolist(), advantage))
    return sorted(found)


def largest_sample(episode: Any) -> int:
    [[(whole, _)]] = taken(episode, 1, len(episode.examples), 0)
    inputs = whole.input_lengths().view(-1, whole.group_size).amax(1)
    return int((whole.prompt_mask.sum(1) + inputs).max())


@pytest.mark.parametrize("extra", [0, 7, 40, 10_000])
@pytest.mark.parametrize("flat", [0, 2])
def test_packs_hold_the_budget_and_every_completion_once(
    tmp_path: Path, extra: int, flat: int
) -> None:
    """Fails if a pack would not fit the memory that was planned, a completion is lost, taken twice,
    or put beside another's prompt, picture or advantage."""
    made = trainer(tmp_path)
    episode, pad = with_flat_groups(sampled_episode(made), flat), made.engine.tokenizer.pad_token_id
    budget = largest_sample(episode) + extra
    for size, least in ((1, 1), (4, 1), (4, 6)):
        [found] = taken(episode, 1, size, pad, apart=True, tokens=budget, least=least)
        [whole] = taken(episode, 1, 4, pad)
        assert rows_of(found) == rows_of(whole)
        for batch, targets in found:
            assert work_of(batch).tokens <= budget and len(batch.prompt_ids) <= size
            assert bool(targets.advantages.any()) == bool(targets.advantages.all())
            assert batch.pixel_values is not None
            assert len(batch.pixel_values) == int(batch.tiles.sum())
        assert sum((work_of(batch) for batch, _ in found), Work()).samples == 16
        if budget > 10_000 and least == 1:
            assert len(found) == (4 if size == 1 else 1 + (flat > 0))
        if least == 6:
            assert len(found) >= 6 or extra < 10_000


def test_a_pack_has_the_pictures_of_its_prompts(tmp_path: Path) -> None:
    """Fails if prompts that are not neighbors get each other's pictures."""
    made = trainer(tmp_path)
    [[(whole, _)]] = taken(episode := sampled_episode(made), 1, 4, 0)
    assert whole.pixel_values is not None
    tiles = whole.pixel_values.split(whole.tiles.tolist())
    two, _ = episode.micro_batch(([3, 1], [12, 14, 5, 6]), 0)
    assert two.pixel_values is not None and two.group_size == 2
    assert torch.equal(two.pixel_values, torch.cat([tiles[3], tiles[1]]))
    one, _ = episode.micro_batch(([2], [9]), 0)
    assert one.pixel_values is not None and torch.equal(one.pixel_values, tiles[2])
    assert isinstance(one.pixels, tuple) and isinstance(whole.pixels, tuple)
    assert one.pixels[0] is whole.pixels[2]
    assert one.response_ids.shape[1] == int(one.loss_mask.sum())


def gradient(made: Any, episode: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The gradient of every weight before the optimizer, and the metrics of the step."""
    seen: dict[str, Tensor] = {}
    step = made.engine.optimizer.step

    def keep(*_: object) -> object:
        seen.update({n: p.grad.clone() for n, p in made.engine.trainable.items()})
        return step()

    made.engine.optimizer.step = keep
    return seen, made.update(episode)


LOSSES = (
    [],
    ["loss.aggregation=token-mean", "loss.importance_cap=2"],
    ["loss.kl_coef=0.1", "loss.old_logprobs=rollout"],
)


@pytest.mark.parametrize("more", LOSSES)
def test_divided_groups_have_the_gradient_of_whole_ones(tmp_path: Path, more: list[str]) -> None:
    """Fails if a limit of memory changes what is learned: a normalizer per pack, an advantage
    among the rows of a pack, a prompt's own gradient that is lost or counted twice."""
    whole = trainer(tmp_path, "micro_batch_prompts=4", "optimizer.max_grad_norm=1e9", *more)
    episode = replace(
        sampled_episode(whole), advantages=torch.linspace(-1, 1, 16) + torch.tensor([0.1, 0.0] * 8)
    )
    wanted, metrics = gradient(whole, episode)
    for extra in (0, 20):
        tokens = largest_sample(episode) + extra
        made = trainer(tmp_path, "optimizer.max_grad_norm=1e9", *more)
        made.config = made.config.model_copy(update={"micro_batch_tokens": tokens})
        found, others = gradient(made, episode)
        largest = max(float(value.abs().max()) for value in wanted.values())
        for name, value in wanted.items():
            assert (found[name] - value).abs().max() < 2e-6 * largest, name
        for key in ("loss", "grad_norm", "entropy", "ratio_max", "rollout_gap", "ref_kl"):
            assert others[key] == pytest.approx(metrics[key], rel=1e-5, abs=1e-7), key
        assert others["tokens"] == metrics["tokens"]
        assert others["entropy_histogram"] == metrics["entropy_histogram"]


def never() -> bool:
    return False


def supervised(folder: Path, *overrides: str) -> SupervisedTrainer:
    write_configs(folder)
    own = [f"run={folder / 'run'}", f"model={home() / 'base'}", *overrides]
    return SupervisedTrainer("sft", load(SFT, folder / "configs/sft.yaml", own), resuming=False)


def test_a_supervised_step_is_the_same_in_packs(tmp_path: Path) -> None:
    """Fails if the rows of a supervised batch teach something else in smaller micro-batches."""
    whole = supervised(tmp_path / "whole")
    longest = max(len(e.prompt_ids) + len(e.response_ids) for e in whole.train)
    packed = supervised(tmp_path / "packed", f"micro_batch_tokens={longest}")
    assert packed.validate(never) == pytest.approx(whole.validate(never), rel=1e-5)
    steps = [one.take_step() for one in (whole, packed)]
    for key in ("loss", "grad_norm", "entropy"):
        assert steps[1][key] == pytest.approx(steps[0][key], rel=1e-5)
    assert steps[0]["tokens"] == steps[1]["tokens"]
    for size, tokens in ((16, longest), (3, 10 * longest), (16, None)):
        batches = micro_batches(whole.train, size, 0, tokens)
        assert sum(len(batch.prompt_ids) for batch in batches) == len(whole.train)
        for batch in batches:
            assert len(batch.prompt_ids) <= size
            assert tokens is None or work_of(batch).tokens <= tokens


def test_a_budget_that_no_sample_fits_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Fails if a job of days ends in the step that draws its longest answer."""
    with pytest.raises(ConfigError, match="micro_batch_tokens 20 holds no response of up to 24"):
        trainer(tmp_path, "micro_batch_tokens=20")
    with pytest.raises(ConfigError, match="of up to 90 tokens"):
        trainer(tmp_path, "micro_batch_tokens=30", "lengths=[{step: 1, max_tokens: 90}]")
    with pytest.raises(ValueError, match=r"grpo\.parquet takes: a prompt of \d+ and up to 24") as e:
        trainer(tmp_path, "micro_batch_tokens=25")
    # What the message says is enough.
    needed = str(e.value).split("to ")[2].split()[0]
    made = trainer(tmp_path, f"micro_batch_tokens={needed}")
    assert made.take_step()["tokens"] > 0
    with pytest.raises(ValueError, match="less than one sample of .* or lower max_length"):
        supervised(tmp_path, "micro_batch_tokens=5")
