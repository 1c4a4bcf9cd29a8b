"""GRPO, run for real on a tiny model: kills, the arithmetic of a step, and its options."""

import copy
import itertools
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.config import GRPO, load
from r1v3.data.batch import Batch
from r1v3.engine.hf.engine import response_hidden
from r1v3.kernels import reference
from r1v3.rewards import Reward, score
from r1v3.rollout.contract import Rollout, TokenRules, decode_texts, join
from r1v3.trainer.division import divide
from r1v3.trainer.episode import Episode, MicroBatch, rollout_facts
from r1v3.trainer.grpo import GRPOTrainer
from r1v3.trainer.interrupt import StageInterrupted
from r1v3.trainer.metrics import comparable, read_metrics
from tests.rewards.judge_server import Answer, says, send, serving
from tests.tiny_run import (
    check_kills,
    finished,
    go_on,
    home,
    result,
    seeded_moments,
    with_positions,
    write_configs,
)

NUMBERS = itertools.count()


def trainer(folder: Path, *overrides: str) -> GRPOTrainer:
    """A trainer in a run folder of its own."""
    write_configs(folder)
    own = [f"run={folder / f'run-{next(NUMBERS)}'}", f"model={home() / 'base'}"]
    return GRPOTrainer(load(GRPO, folder / "configs/grpo.yaml", [*own, *overrides]), resuming=False)


def weights(made: GRPOTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made.engine.model.named_parameters()}


def same(before: dict[str, Tensor], made: GRPOTrainer) -> bool:
    return all(before[name].equal(p) for name, p in made.engine.model.named_parameters())


@pytest.mark.parametrize("chain", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_and_resume_change_no_bit(tmp_path: Path, chain: int) -> None:
    """Otherwise a preempted run would sample, reward or learn something else than one that ran
    through."""
    moments = seeded_moments("grpo", 2)
    check_kills(tmp_path, "grpo", moments if chain else moments[::-1])


def test_a_polite_stop_saves_names_resume_and_exits_130(tmp_path: Path) -> None:
    """Otherwise Ctrl-C would lose the steps since the last checkpoint."""
    whole, changes = finished("grpo")
    write_configs(tmp_path)
    at = next(n for n, path in enumerate(changes, 1) if path.endswith("grpo.jsonl"))
    stopped = go_on(tmp_path, "grpo", at=at, number=signal.SIGINT)
    assert stopped.code == 130, stopped.output
    assert "grpo stopped at step 1 of 4" in stopped.output and "--resume" in stopped.output
    assert go_on(tmp_path, "grpo").code == 0
    mine, other = result(tmp_path / "run", "grpo"), result(whole / "run", "grpo")
    assert (mine["metrics"], mine["weights"]) == (other["metrics"], other["weights"])


def test_a_validation_that_a_stop_leaves_out_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if SIGTERM waits for hundreds of answers, or a resumed run lacks a validation."""
    whole, _ = finished("grpo")
    write_configs(tmp_path)
    own = [f"run={tmp_path / 'run'}", f"model={home() / 'base'}", "steps=4"]
    config = load(GRPO, tmp_path / "configs/grpo.yaml", own)
    made = GRPOTrainer(config, resuming=False)
    grade = made.policy.grade

    def interrupted(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return grade(*arguments, **options)

    monkeypatch.setattr(made.policy, "grade", interrupted)
    with pytest.raises(StageInterrupted, match="stopped at step 2 of 4 and was saved"):
        made.loop()
    metrics = tmp_path / "run/metrics/grpo.jsonl"
    assert [line["step"] for line in read_metrics(metrics)] == [1, 2]
    assert "validation_accuracy" not in read_metrics(metrics)[1]
    GRPOTrainer(config, resuming=True).loop()
    wanted = read_metrics(whole / "run/metrics/grpo.jsonl")
    for found, line in zip(comparable(read_metrics(metrics)), comparable(wanted), strict=True):
        assert found == line


def test_the_tiny_run_learns_from_something() -> None:
    """Otherwise every bit comparison above would compare models that were never updated."""
    folder, _ = finished("grpo")
    lines = read_metrics(folder / "run/metrics/grpo.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert sum(line["grad_norm"] > 0 and line["groups_kept"] > 0 for line in lines) >= 2
    assert [("validation_accuracy" in line) for line in lines] == [False, True, False, True]
    assert all(line["ratio_max"] == 1 == line["ratio_mean"] for line in lines)


def sampled_episode(made: GRPOTrainer) -> Episode:
    """The episode that a step of the trainer samples and rewards."""
    return made.with_advantages(made.sample_groups())


def micro_batches(
    episode: Episode, steps: int, size: int, pad: int, **options: Any
) -> list[list[MicroBatch]]:
    """The micro-batches of every gradient step."""
    packs = episode.packs(steps, size, **options)
    return [[episode.micro_batch(pack, pad) for pack in step] for step in packs]


def whole_batch(made: GRPOTrainer, episode: Episode) -> Batch:
    """All prompts of an episode with all their completions."""
    pad = made.engine.tokenizer.pad_token_id
    [[(batch, _)]] = micro_batches(episode, 1, len(episode.examples), pad)
    return batch


def double_logprobs(made: GRPOTrainer, episode: Episode) -> tuple[Any, Any, Tensor]:
    """(model, batch, log-probs with gradient) of an episode in float64, by plain PyTorch."""
    model = copy.deepcopy(made.engine.model).double()
    batch = whole_batch(made, episode)
    assert batch.pixel_values is not None
    batch = replace(batch, pixels=batch.pixel_values.double())
    logits = model.lm_head(response_hidden(model, batch)) / made.engine.temperature
    chosen = logits.log_softmax(-1).gather(-1, batch.response_ids.unsqueeze(-1)).squeeze(-1)
    return model, batch, chosen


@pytest.mark.parametrize(
    ("aggregation", "ratio_clip", "tokens"),
    [
        ("sequence-mean", "ppo", "null"),
        ("token-mean", "ppo", "null"),
        ("constant", "ppo", "null"),
        ("token-mean", "cispo", "null"),
        ("sequence-mean", "ppo", "76"),
    ],
)
def test_a_step_is_the_public_reference_in_float64(
    tmp_path: Path, aggregation: str, ratio_clip: str, tokens: str
) -> None:
    """Otherwise what trains would not be what the kernels document (eq. 4 to 7)."""
    settings = [f"loss.aggregation={aggregation}", f"loss.ratio_clip={ratio_clip}"]
    made = trainer(tmp_path, *settings, f"micro_batch_tokens={tokens}")
    episode = sampled_episode(made)
    rewards = torch.tensor([r.total for r in episode.rewards], dtype=torch.float64)
    n, g = len(rewards), made.config.group_size
    offsets = torch.arange(0, n + 1, g)
    advantages = reference.group_advantages(rewards, torch.arange(n), offsets)
    assert torch.allclose(advantages.float(), episode.advantages, atol=1e-5)
    if tokens != "null":
        packs = micro_batches(episode, 1, 4, 0, tokens=int(tokens))
        assert max(len(batch.response_ids) for batch, _ in packs[0]) < g, "no group is divided"
    model, batch, logprobs = double_logprobs(made, episode)
    width = logprobs.shape[1]
    loss, _, _ = reference.grpo_loss(
        logprobs.flatten(),
        None,
        advantages,
        batch.loss_mask.flatten(),
        torch.arange(0, n * width + 1, width),
        aggregation=aggregation,
        ratio_clip=ratio_clip,
        normalizer=float(n * 24) if aggregation == "constant" else None,
    )
    loss.backward()
    metrics = made.update(episode)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    for part, prefix in (
        ("vision", "model.vision_tower"),
        ("connector", "model.multi_modal_projector"),
        ("llm", ("model.language_model", "lm_head")),
    ):
        squares = [
            float(p.grad.square().sum())
            for name, p in model.named_parameters()
            if name.startswith(prefix) and p.grad is not None
        ]
        assert metrics[f"grad_norm_{part}"] == pytest.approx(sum(squares) ** 0.5, rel=2e-3)
    assert metrics["tokens"] == int(batch.loss_mask.sum())


def test_recorded_rewards_are_the_public_rewards_of_the_texts(tmp_path: Path) -> None:
    """Otherwise the reward that trains would differ from `r1v3.rewards.score`."""
    made = trainer(tmp_path)
    groups = made.sample_and_reward([0, 1], 0)
    rollout = join([group.rollout for group in groups], made.engine.tokenizer.pad_token_id)
    texts = decode_texts(made.engine.tokenizer, rollout, made.policy.stop_id)
    asked = [made.samples[i] for i in (0, 0, 0, 0, 1, 1, 1, 1)]
    assert score(texts, asked, weight=0.8) == [r for group in groups for r in group.rewards]


def test_micro_batches_do_not_change_a_step(tmp_path: Path) -> None:
    """Otherwise memory limits would change what is learned."""
    taken = [trainer(tmp_path, f"micro_batch_prompts={n}").take_step() for n in (4, 1)]
    for key in ("loss", "grad_norm", "ratio_mean", "approx_kl", "entropy", "critical_entropy"):
        if taken[0].get(key) is not None:
            assert taken[0][key] == pytest.approx(taken[1][key], rel=1e-3, abs=1e-6), key
    assert taken[0]["tokens"] == taken[1]["tokens"] and taken[0]["reward"] == taken[1]["reward"]


def test_the_second_gradient_step_is_off_policy(tmp_path: Path) -> None:
    """Otherwise clipping would be inert however many steps an episode takes."""
    made = trainer(tmp_path, "gradient_steps=2", "optimizer.learning_rate=0.1")
    drawn = sampled_episode(made)
    advantages = torch.tensor([1.0, -1.0] * 8)
    metrics = made.update(replace(drawn, advantages=advantages))
    assert abs(metrics["ratio_max"] - 1) > 1e-3
    assert metrics["clip_low_fraction"] + metrics["clip_high_fraction"] > 0


COVERED = [
    (1, 4, []),
    (1, 1, []),
    (2, 2, []),
    (2, 1, []),
    (2, 3, []),
    (4, 1, []),
    (4, 4, []),
    (4, 1, ["loss.old_logprobs=rollout"]),
    (2, 1, ["loss.importance_cap=2"]),
    (4, 2, ["loss.aggregation=token-mean"]),
    (2, 1, ["decoding.max_tokens=3"]),
    (4, 1, ["monitor.words=[So, Wait]", "group_size=2"]),
]


@pytest.mark.parametrize(("steps", "size", "more"), COVERED)
def test_metrics_cover_the_tokens_of_all_gradient_steps(
    tmp_path: Path, steps: int, size: int, more: list[str]
) -> None:
    """Fails if the critical-token entropy, by which checkpoints are selected, or another metric is
    that of the last gradient step alone."""
    settings = [f"gradient_steps={steps}", f"micro_batch_prompts={size}", *more]
    # Too small a rate to move a float32 weight: one pass over all tokens has the same numbers.
    made = trainer(tmp_path, "optimizer.learning_rate=1e-30", *settings)
    episode = sampled_episode(made)
    metrics = made.update(episode)
    batch = whole_batch(made, episode)
    [(logprobs, entropy)] = made.engine.evaluate([batch])
    mask, ids = batch.loss_mask, batch.response_ids
    critical = mask & torch.isin(ids, torch.tensor(made.monitor.token_ids))
    assert metrics["tokens"] == int(mask.sum()) == sum(metrics["entropy_histogram"])
    assert metrics["critical_tokens"] == int(critical.sum())
    assert metrics["entropy"] == pytest.approx(float(entropy[mask].mean()), rel=1e-4)
    if critical.any():
        wanted = float(entropy[critical].mean())
        assert metrics["critical_entropy"] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    gap = float((episode.rollout.logprobs - logprobs)[mask].mean())
    assert metrics["rollout_gap"] == pytest.approx(gap, rel=1e-3, abs=1e-6)


def test_losses_and_norms_are_means_over_the_gradient_steps(tmp_path: Path) -> None:
    """Fails if the curves of a run show every other update only."""
    made = trainer(tmp_path, "gradient_steps=4")
    episode = sampled_episode(made)
    taken: list[dict[str, float]] = []
    step = made.gradient_step

    def watched(*arguments: Any) -> Any:
        found = step(*arguments)
        taken.append(found[0])
        return found

    made.gradient_step = watched  # type: ignore[method-assign]
    metrics = made.update(replace(episode, advantages=torch.tensor([1.0, -1.0] * 8)))
    assert len(taken) == 4
    for key in ("loss", "learning_rate", "grad_norm", "grad_norm_llm"):
        assert metrics[key] == pytest.approx(sum(one[key] for one in taken) / 4)


def test_a_gradient_step_without_signal_is_skipped_whatever_the_others_hold(
    tmp_path: Path,
) -> None:
    """Otherwise the optimizer's momentum would move the weights on prompts that teach nothing."""
    made = trainer(tmp_path, "gradient_steps=2")
    episode = sampled_episode(made)
    quiet = torch.ones(16)
    quiet[:8] = 0.0
    signal_last = replace(episode, advantages=episode.advantages * 0 + quiet)
    packs = signal_last.packs(2, 2)
    (without_signal, with_signal), _ = divide(
        signal_last, packs, made.engine, made.replica_of, made.config
    )
    before = weights(made)
    made.gradient_step(without_signal, 0.01)
    assert same(before, made)
    made.gradient_step(with_signal, 0.01)
    assert not same(before, made)


def test_equal_rewards_take_no_optimizer_step(tmp_path: Path) -> None:
    """Otherwise weight decay and momentum would train on episodes that hold no information."""
    made = trainer(tmp_path, "decoding.max_tokens=1", "optimizer.weight_decay=0.5")
    before = weights(made)
    metrics = made.take_step()
    assert metrics["groups_kept"] == 0
    assert metrics["loss"] == metrics["grad_norm"] == 0
    assert same(before, made) and not made.engine.optimizer.state


def test_signal_can_be_of_the_accuracy_alone(tmp_path: Path) -> None:
    """Fails if groups that differ in their format alone are still learned from or kept, or groups
    that differ in accuracy lose their advantages."""
    by_reward, by_accuracy = trainer(tmp_path), trainer(tmp_path, "signal=accuracy")
    groups = by_reward.sample_and_reward([0, 1, 2], 0)

    def reward(accuracy: float, form: float) -> Reward:
        return Reward(0.8 * accuracy + 0.2 * form, accuracy, form, accuracy, None, None)

    right, formatted, wrong = reward(1, 1), reward(0, 1), reward(0, 0)
    graded = [[right, wrong] * 2, [formatted, wrong] * 2, [wrong] * 4]
    groups = [
        replace(group, rewards=rewards) for group, rewards in zip(groups, graded, strict=True)
    ]
    every = by_reward.with_advantages(groups)
    accurate = by_accuracy.with_advantages(groups)
    assert (every.kept, accurate.kept) == (2, 1)
    assert every.advantages[:8].all() and not every.advantages[8:].any()
    assert torch.equal(accurate.advantages[:4], every.advantages[:4])
    assert not accurate.advantages[4:].any()


def test_a_model_that_ends_its_turn_at_once_can_be_trained(tmp_path: Path) -> None:
    """Otherwise one collapsed checkpoint would end the run with an error instead of a metric."""
    made = trainer(tmp_path)
    with torch.no_grad():
        for name, parameter in made.engine.model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")) and "language" in name:
                parameter.zero_()
            elif name.endswith(("language_model.norm.weight", "embed_tokens.weight")):
                parameter.fill_(1.0)
        made.engine.model.lm_head.weight.zero_()
        made.engine.model.lm_head.weight[made.policy.stop_id] = 2.0
    metrics = made.take_step()
    assert metrics["response_length"] == 1 and metrics["truncated"] == 0
    assert metrics["reward"] == 0 and metrics["groups_kept"] == 0
    assert metrics["nonfinite"] == 0 and metrics["tokens"] == 16
    validation = made.validate(lambda: False)
    assert validation is not None and validation["validation_accuracy"] == 0


def test_strange_answers_are_rewarded_and_trained_on(tmp_path: Path) -> None:
    """Otherwise one odd completion would stop a run: an empty box, ten thousand digits."""
    made = trainer(tmp_path)
    sample = made.samples[0]
    form = "So.\n</think>\n\n\\boxed{%s}"
    texts = [form % sample.ground_truth, form % "", form % ("9" * 10_000), "\\boxed{" * 500]
    rewards = score(texts, [sample] * 4)
    assert [r.total for r in rewards] == pytest.approx([1.0, 0.0, 0.2, 0.0])
    stop, encode = made.policy.stop_id, made.engine.tokenizer.encode
    rows = [[*encode(text, add_special_tokens=False)[:200], stop] for text in texts]
    width = max(len(row) for row in rows)
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    zeros = torch.zeros(mask.shape)
    rollout = Rollout(ids, mask, zeros, zeros, mask, torch.ones(4, dtype=torch.bool))
    totals = torch.tensor([r.total for r in rewards])
    advantages = reference.group_advantages(totals, torch.arange(4), torch.tensor([0, 4]))
    episode = Episode(
        [made.examples[0]], rewards, rollout_facts(rollout), advantages, 1, rollout, range(4)
    )
    metrics = made.update(episode)
    assert metrics["nonfinite"] == 0 and 0 < metrics["grad_norm"] < float("inf")


def test_dynamic_sampling_replaces_groups_without_signal(tmp_path: Path) -> None:
    """Otherwise the filter of DAPO would train on fewer groups than it was asked for."""
    overrides = ["group_size=2", "dynamic_sampling.enabled=true", "dynamic_sampling.rounds=4"]
    made = trainer(tmp_path, *overrides)
    episode = sampled_episode(made)
    totals = [[r.total for r in episode.rewards[i : i + 2]] for i in range(0, 8, 2)]
    signal_first = [a != b for a, b in totals]
    kept = episode.metrics()["groups_kept"]
    assert signal_first == [True] * kept + [False] * (4 - kept)
    plain = sampled_episode(trainer(tmp_path, "group_size=2"))
    assert plain.metrics()["groups_kept"] < kept
    widths = {episode.rollout.response_ids.shape[0], episode.rollout.mask.shape[0]}
    assert widths == {8} and len(episode.examples) == 4
    assert not episode.rollout.mask.all(1).all() or episode.rollout.mask.shape[1] == 24


def test_responses_may_grow_during_training(tmp_path: Path) -> None:
    """Otherwise progressive response lengths would be read and ignored."""
    made = trainer(tmp_path, "lengths=[{step: 0, max_tokens: 3}, {step: 1, max_tokens: 7}]")
    assert sampled_episode(made).rollout.mask.shape[1] == 3
    made.step = 1
    assert 3 < sampled_episode(made).rollout.mask.shape[1] <= 7


def test_the_reference_kl_enters_the_loss(tmp_path: Path) -> None:
    """Otherwise `kl_coef` would be read and ignored, or measured against the moving policy."""
    made = {}
    for coefficient in (0.0, 0.5):
        one = trainer(tmp_path, f"loss.kl_coef={coefficient}", "loss.aggregation=token-mean")
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            head = one.engine.model.lm_head.weight
            head.add_(0.2 * torch.randn(head.shape, generator=generator))
        made[coefficient] = one.take_step()
    assert made[0.0]["ref_kl"] == 0 < made[0.5]["ref_kl"]
    expected = made[0.0]["loss"] + 0.5 * made[0.5]["ref_kl"]
    assert made[0.5]["loss"] == pytest.approx(expected, rel=1e-4)
    assert made[0.5]["grad_norm"] != pytest.approx(made[0.0]["grad_norm"], rel=1e-3)


def test_a_token_that_outweighs_the_others_in_the_kl_is_warned_of_once(tmp_path: Path) -> None:
    """Fails if one token far from the reference turns the update of a whole batch unseen."""
    made = trainer(tmp_path, "loss.kl_coef=0.1", "micro_batch_prompts=1", "gradient_steps=2")
    episode = sampled_episode(made)
    assert 0 <= made.update(episode)["kl_weight_max"] < 100
    watched = made.reference
    assert watched is not None
    evaluate = watched.evaluate

    def strange(batches: Any) -> Any:
        found = evaluate(batches)
        found[0][0][0, 0] += 12.0
        return found

    watched.evaluate = strange  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"step 1: a token weighs \d+,\d+ in .* \(k3\)") as said:
        metrics = [made.update(episode) for _ in range(2)][0]
    assert len([w for w in said if "weighs" in str(w.message)]) == 1
    assert metrics["ref_gap_max"] == pytest.approx(12, abs=1) and metrics["ref_gap_share"] > 0
    assert metrics["kl_weight_max"] == pytest.approx(math.exp(metrics["ref_gap_max"]), rel=1e-3)


def test_rollout_logprobs_can_be_the_old_policy(tmp_path: Path) -> None:
    """Otherwise the sampler's and the trainer's log-probs would disagree by more than rounding.

    The sampler never draws special tokens, so that its log-probs are larger by what is missing of
    their probability; nothing else may differ.
    """
    made = trainer(tmp_path, "loss.old_logprobs=rollout")
    episode = sampled_episode(made)
    batch = whole_batch(made, episode)
    with torch.no_grad():
        probabilities = made.engine.model.lm_head(
            response_hidden(made.engine.model, batch)
        ).softmax(-1)
    banned = probabilities[..., list(TokenRules.of(made.engine.tokenizer).never)].double().sum(-1)
    metrics = made.update(episode)
    expected = (1 - banned)[batch.loss_mask]
    assert metrics["ratio_mean"] == pytest.approx(float(expected.mean()), abs=1e-4)
    assert metrics["ratio_max"] == pytest.approx(float(expected.max()), abs=1e-4)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=5e-3)
    gap = float(-expected.log().mean())
    assert metrics["rollout_gap"] == pytest.approx(gap, abs=1e-4)


def silent(handler: Any, body: dict[str, Any]) -> None:
    """Answers later than the client waits."""
    import time

    time.sleep(0.6)
    send(handler, b"{}")


@pytest.mark.parametrize("answer", [says("bananas"), silent], ids=["nonsense", "time-out"])
def test_a_broken_verifier_is_counted_and_the_step_goes_on(tmp_path: Path, answer: Answer) -> None:
    """Otherwise a judge that hangs or babbles would stop training, or reward by chance."""
    with serving(answer) as server:
        made = trainer(
            tmp_path,
            f"rewards.verifier_url={server.url}",
            "rewards.verifier_timeout_seconds=0.2",
            "rewards.verifier_retries=0",
            "steps=1",
        )
        made.loop()
    assert server.requests
    line = read_metrics(made.run / "metrics/grpo.jsonl")[0]
    plain = trainer(tmp_path).take_step()
    assert line["verifier_failures"] > 0
    assert (line["reward"], line["loss"]) == (plain["reward"], plain["loss"])


def test_questions_beyond_the_models_positions_are_refused_or_dropped(tmp_path: Path) -> None:
    """Fails if completions run past the model's positions, where its numbers mean nothing."""
    made = trainer(tmp_path)
    lengths = sorted(len(example.prompt_ids) for example in made.examples)
    limit = lengths[len(lengths) // 2] + 30
    small = [f"model={with_positions(tmp_path / 'base', limit)}"]
    assert trainer(tmp_path, *small, "decoding.max_tokens=2").dropped == 0
    # The longest response of the whole stage counts, not that of its first step.
    growing = "lengths=[{step: 2, max_tokens: 30}]"
    with pytest.raises(ValueError, match=rf"{limit} positions .* row \d+: .* up to 30 = "):
        trainer(tmp_path, *small, growing)
    dropping = trainer(tmp_path, *small, growing, "too_long=drop")
    fitting = sum(length + 30 <= limit for length in lengths)
    assert len(dropping.samples) == len(dropping.examples) == fitting < len(lengths)
    assert dropping.take_step()["rows_dropped"] == len(lengths) - fitting
    assert sorted({g.index for g in dropping.sample_groups()})[-1] < fitting


def test_a_step_says_where_its_time_went() -> None:
    """Fails if a part is not timed, or time is counted twice: nobody knew what to speed up."""
    folder, _ = finished("grpo")
    lines = read_metrics(folder / "run/metrics/grpo.jsonl")
    parts = [f"seconds_{part}" for part in ("weights", "generation", "reward", "training")]
    for line in lines:
        assert all(line[part] > 0 for part in parts)
        # Weights are handed over for the validation of the step before as well.
        assert sum(line[part] for part in parts[1:]) <= line["seconds"]
        assert ("seconds_validation" in line) == ("validation_accuracy" in line)
    assert ["seconds_saving" in line for line in lines] == [False, True, True, True]
