"""Group relative policy optimization (report, section 3.3, eq. 1 to 7).

`GRPOTrainer.take_step` is the algorithm: sample -> reward -> advantages -> loss -> step.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1v3.balance import worthwhile
from r1v3.config import GRPO
from r1v3.data.encoding import Example, encode_all, model_image_shape, record_max_tiles
from r1v3.data.lengths import PositionLimit, check_micro_batch_tokens
from r1v3.data.sample import Sample
from r1v3.data.tiles import ImageShape, TileCache
from r1v3.data.words import expand_words
from r1v3.engine.build import Training, build_engine, resolve_max_tiles
from r1v3.evaluation.policy import Policy
from r1v3.evaluation.statistics import score as score_interval
from r1v3.kernels import group_advantages
from r1v3.model.parts import PARTS
from r1v3.progress import say
from r1v3.rewards import LLMVerifier, Reward, score
from r1v3.rollout.build import build_sampler
from r1v3.rollout.contract import Request, Sampling, decode_texts, join
from r1v3.trainer.critical_tokens import CriticalTokenMonitor
from r1v3.trainer.curriculum import Course, facts_of, grouped_accuracy
from r1v3.trainer.episode import Episode, Group, MicroBatch, has_signal
from r1v3.trainer.loop import Skipped, run_steps
from r1v3.trainer.policy_loss import (
    HIGH_WEIGHT,
    PolicyLossFn,
    Targets,
    combine,
    covariance,
    gap_metrics,
)
from r1v3.trainer.randomness import torch_stream
from r1v3.trainer.record import NothingToDo, write_finished
from r1v3.trainer.rollout_file import write_rollouts
from r1v3.trainer.schedule import learning_rate
from r1v3.trainer.stage import OpenStage, open_stage, publish, resume
from r1v3.trainer.stopwatch import Stopwatch
from r1v3.trainer.telemetry import Telemetry

_SHOWN = ("reward", "accuracy", "response_length", "critical_entropy", "validation_accuracy")


class GRPOTrainer:
    """The GRPO stage, one step at a time; see `loop.Steps`."""

    # Whether the weight of a token in the KL gradient was warned of.
    warned = False

    def take_step(self) -> dict[str, Any]:
        """Sample, reward and update once; return the metrics of the step."""
        started, failures = time.perf_counter(), self.verifier_failures()
        if self.course.advance(self.step):
            self.questions = self.course.questions()
            say(
                f"grpo: stage {self.course.number + 1} of {len(self.course.stages)} of the "
                f"curriculum begins after step {self.step}",
                shown=self.engine.ranks.is_main,
            )
        with self.sampling():
            groups = self.sample_groups()
        episode = self.with_advantages(groups)
        self.dump_rollouts(groups, episode)
        with self.stopwatch.part("training"):
            metrics = self.update(episode)
        self.step += 1
        several = len(self.course.stages) > 1
        return {
            **episode.metrics(),
            **({"curriculum_stage": self.course.number + 1} if several else {}),
            "rows_dropped": self.dropped,
            "verifier_failures": sum(self.engine.ranks.gather(self.verifier_failures() - failures)),
            **metrics,
            **self.stopwatch.take(),
            "seconds": time.perf_counter() - started,
        }

    def sample_groups(self) -> list[Group]:
        """Sample and reward this step's prompts, with dynamic sampling until enough have signal."""
        dynamic, size = self.config.dynamic_sampling, self.config.prompts_per_step
        signal = self.config.signal
        groups: list[Group] = []
        for n in range(dynamic.rounds if dynamic.enabled else 1):
            groups += self.sample_and_reward(self.questions.take(size), key=n)
            if sum(has_signal(group.rewards, signal) for group in groups) >= size:
                break
        # Groups with signal first; the others fill the places that are left.
        groups.sort(key=lambda group: not has_signal(group.rewards, signal))
        self.questions.put_back([g.index for g in groups[size:] if has_signal(g.rewards, signal)])
        return groups[:size]

    def sample_and_reward(self, indices: list[int], key: int) -> list[Group]:
        """Sample and reward completions of the prompts at these positions of the training data."""
        config, g = self.config, self.config.group_size
        asked = [
            Request(self.examples[i], self.samples[i], pictures=config.pictures) for i in indices
        ]
        with self.stopwatch.part("generation"):
            rollout = self.sampler.complete(
                asked,
                Sampling(config.decoding.temperature, self.max_tokens()),
                group_size=g,
                generator=torch_stream(config.seed, "rollout", self.step, key),
            )
        samples = [self.samples[i] for i in indices for _ in range(g)]

        def rewarded(own: range) -> list[Reward]:
            rows = slice(own.start, own.stop)
            part = rollout.rows(rows.start, rows.stop)
            texts = decode_texts(self.engine.tokenizer, part, self.policy.stop_id)
            weight = config.rewards.accuracy_weight
            return score(texts, samples[rows], weight=weight, verifier=self.verifier)

        # Time limits and a verifier's answers may differ from rank to rank; rewards must not.
        with self.stopwatch.part("reward"):
            rewards = self.engine.ranks.divide(len(samples), rewarded)
        return [
            Group(i, self.examples[i], rollout.rows(n * g, n * g + g), rewards[n * g : n * g + g])
            for n, i in enumerate(indices)
        ]

    def with_advantages(self, groups: list[Group]) -> Episode:
        """Compare the completions of each group with each other; without a signal, with nothing."""
        rewards = [reward for group in groups for reward in group.rewards]
        advantages = group_advantages(
            torch.tensor([reward.total for reward in rewards]),
            self.config.group_size,
            **self.config.advantage.model_dump(),
        )
        kept = [has_signal(group.rewards, self.config.signal) for group in groups]
        if self.config.signal == "accuracy":
            advantages *= torch.tensor(kept).repeat_interleave(self.config.group_size)
        rollout = join([group.rollout for group in groups], self.engine.tokenizer.pad_token_id)
        examples = [group.example for group in groups]
        return Episode(examples, rollout, rewards, advantages, sum(kept))

    def dump_rollouts(self, groups: list[Group], episode: Episode) -> None:
        """Write the completions of this step to <run>/rollouts/grpo, if it is the turn of one."""
        every, step = self.config.dump_rollouts_every, self.step + 1
        if every is None or step % every:
            return
        indices = [group.index for group in groups]
        texts = decode_texts(self.engine.tokenizer, episode.rollout, self.policy.stop_id)
        path = self.run / "rollouts" / self.name / f"step-{step:06d}.parquet"
        samples = [self.samples[i] for i in indices]
        self.engine.ranks.on_main(lambda: write_rollouts(path, episode, indices, samples, texts))

    def update(self, episode: Episode) -> dict[str, Any]:
        """Take the gradient steps of an episode, each on an equal part of its prompts.

        Returns:
            Metrics over the tokens of all gradient steps, each with the weights that its step
            found; the loss, the learning rate and the gradient norms are means over the steps.
        """
        config, n = self.config, self.config.gradient_steps
        optimizer = self.course.optimizer(config.optimizer)
        parts = episode.micro_batches(
            n,
            config.micro_batch_prompts,
            self.engine.tokenizer.pad_token_id,
            apart=self.reference is None,
            tokens=config.micro_batch_tokens,
            least=worthwhile(config, self.engine.replicas.size),
        )
        parts = [self.with_fixed_logprobs(micro_batches) for micro_batches in parts]
        self.telemetry.start()
        steps = [
            self.gradient_step(
                micro_batches,
                learning_rate(self.step * n + i, self.total * n, optimizer),
            )
            for i, micro_batches in enumerate(parts)
        ]
        batches = [batch for part in parts for batch, _ in part]
        machine = self.telemetry.finish(batches)
        targets = [one for part in parts for _, one in part]
        outputs = [output for _, found in steps for output in found]
        self.monitor.reset()
        for batch, output in zip(batches, outputs, strict=True):
            self.monitor.update(batch.response_ids, output["token_entropy"], batch.loss_mask)
        return {
            **{key: sum(metrics[key] for metrics, _ in steps) / n for key in steps[0][0]},
            **combine(targets, outputs, config.loss.importance_cap),
            **self.gap_metrics(targets, outputs),
            "logprob_advantage_covariance": covariance(targets, outputs),
            "steps_skipped": self.skipped.count([metrics["grad_norm"] for metrics, _ in steps]),
            **self.monitor.result(),
            **machine,
        }

    def gap_metrics(
        self, targets: Sequence[Targets], outputs: Sequence[dict[str, Tensor]]
    ) -> dict[str, float]:
        """Return `policy_loss.gap_metrics`; warn once when one token outweighs all others."""
        kl = self.config.loss.kl
        metrics = gap_metrics(targets, outputs, kl)
        if (weight := metrics.get("kl_weight_max", 0.0)) > HIGH_WEIGHT and not self.warned:
            self.warned = True
            warnings.warn(
                f"step {self.step + 1}: a token weighs {weight:,.0f} in the gradient of the KL "
                f"({kl}), where others weigh about their gap: the policy has left the reference "
                f"there by {metrics['ref_gap_max']:.1f} nats at most. loss.kl=k2 is linear in the "
                "gap; later steps show it as kl_weight_max",
                stacklevel=2,
            )
        return metrics

    def with_fixed_logprobs(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """Add the log-probs of the policies that do not move: the old one and the reference.

        With one gradient step the old policy is the current one, whose log-probs the loss has.
        """
        batches = [batch for batch, _ in micro_batches]
        targets = [one for _, one in micro_batches]
        if self.config.loss.old_logprobs == "rollout":
            targets = [replace(one, old_logprobs=one.rollout_logprobs) for one in targets]
        elif self.config.gradient_steps > 1:
            found = self.engine.evaluate(batches)
            targets = [
                replace(one, old_logprobs=logprobs)
                for one, (logprobs, _) in zip(targets, found, strict=True)
            ]
        if self.reference is not None:
            found = self.reference.evaluate(batches)
            targets = [
                replace(one, ref_logprobs=logprobs)
                for one, (logprobs, _) in zip(targets, found, strict=True)
            ]
        return list(zip(batches, targets, strict=True))

    def gradient_step(
        self, micro_batches: list[MicroBatch], rate: float
    ) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
        """Take one optimizer step; where every advantage is zero and there is no KL term, none.

        Micro-batches without an advantage or a KL term have no gradient: of them the log-probs and
        entropies are computed, for the metrics alone.

        Returns:
            Metrics and outputs, as `Engine.train_step`.
        """
        batches = [batch for batch, _ in micro_batches]
        targets = [one for _, one in micro_batches]
        loss = PolicyLossFn(self.config.loss, targets, self.config.decoding.max_tokens)
        learned = [
            i for i, one in enumerate(targets) if self.reference is not None or one.advantages.any()
        ]
        others = [i for i in range(len(batches)) if i not in learned]
        evaluated = self.engine.evaluate([batches[i] for i in others]) if others else []
        outputs = {i: loss.metrics(*values, i) for i, values in zip(others, evaluated, strict=True)}
        zeros = dict.fromkeys(["grad_norm", *(f"grad_norm_{part}" for part in PARTS)], 0.0)
        metrics = {"loss": 0.0, "learning_rate": rate, **zeros}
        if learned:
            metrics, found = self.engine.train_step(
                [batches[i] for i in learned],
                lambda head, i: loss(head, learned[i]),
                learning_rate=rate,
            )
            outputs |= dict(zip(learned, found, strict=True))
        return metrics, [outputs[i] for i in range(len(batches))]

    def validate(self) -> dict[str, Any]:
        """Return the accuracy on the validation questions, sampled as in training."""
        config = self.config
        # vLLM schedules all questions itself; of others, as many completions as a step samples.
        together = config.prompts_per_step * config.group_size
        if config.rollout.engine != "local":
            together = len(self.validation) * config.validation_samples
        with self.sampling():
            answers = self.policy.answer(
                self.validation,
                Sampling(config.decoding.temperature, self.max_tokens()),
                repeats=config.validation_samples,
                generator=torch_stream(config.seed, "validation"),
                batch_prompts=max(1, together // config.validation_samples),
            )
        result = score_interval(answers.correct, answers.tokens)
        correct = answers.correct.mean(axis=1).tolist()
        self.course.validated(correct)
        apart: dict[str, float] = {}
        if (key := config.curriculum.validate_by) is not None:
            apart = grouped_accuracy(correct, self.validation_facts, key)
        return {
            **{f"validation_accuracy_{name}": value for name, value in apart.items()},
            "validation_accuracy": result.accuracy,
            "validation_low": result.low,
            "validation_high": result.high,
        }

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Keep the sampler awake, with the current weights, inside the block."""
        with self.stopwatch.part("weights"):
            self.sampler.update_weights(self.engine.export_hf(), self.step)
            self.sampler.wake()
        try:
            yield
        finally:
            self.sampler.sleep()

    def max_tokens(self) -> int:
        """Return the longest response allowed at this step (curriculum, or progressive length)."""
        if self.course.current.max_tokens is not None:
            return self.course.current.max_tokens
        allowed = self.config.decoding.max_tokens
        for change in self.config.lengths:
            if self.step >= change.step:
                allowed = change.max_tokens
        return allowed

    def verifier_failures(self) -> int:
        """Return how many answers this process's verifier has left without a verdict so far."""
        return 0 if self.verifier is None else self.verifier.failures.total()

    @property
    def finished(self) -> bool:
        """See `loop.Steps.finished`."""
        return self.step >= self.total

    def state(self) -> dict[str, Any]:
        """See `loop.Steps.state`."""
        return {"questions": self.questions.state(), "curriculum": self.course.state()}

    def loop(self) -> None:
        """Train to the last step; keep models of checkpoints, to select from."""
        run_steps(
            self,
            validate_every=self.config.validate_every,
            checkpoint_every=self.config.checkpoint_every,
            keep=self.config.keep,
            keep_models=self.config.keep_models,
            shown=_SHOWN,
        )

    def __init__(self, config: GRPO, *, resuming: bool) -> None:
        config = resolve_max_tiles(config)
        self.name, self.config, self.run = "grpo", config, Path(config.run)
        self.step, self.total = 0, config.steps
        self.stopwatch, self.cache = Stopwatch(), TileCache()
        self.skipped = Skipped(config.optimizer.max_skipped)
        stage = open_stage(self.name, config, resuming=resuming)
        ranks = stage.ranks
        temperature = config.decoding.temperature
        training = Training(config.modules, config.optimizer)
        self.engine = build_engine(config, ranks, training, temperature=temperature)
        # The policy that training started from, for the KL term.
        self.reference = None
        if config.loss.kl_coef > 0:
            self.reference = build_engine(config, ranks, temperature=temperature)
        tokenizer = self.engine.tokenizer
        shape = model_image_shape(self.engine.config, config.max_tiles, config.pictures)
        record_max_tiles(self.engine.config, shape.max_tiles)
        longest = config.longest_response
        limit = PositionLimit.of(self.engine.config, config.too_long, longest)
        self.validation, asked, _ = self.encode(
            config.validation_data, stage.validation, shape, limit
        )
        self.course = self.encode_questions(stage, shape, limit)
        self.questions = self.course.questions()
        longest_prompt = max(len(example.prompt_ids) for example in [*self.examples, *asked])
        self.sampler = build_sampler(
            config.rollout,
            config,
            tokenizer,
            ranks=ranks,
            max_length=longest_prompt + longest,
            local=lambda: (self.engine.decoder(), self.engine.samplers),
        )
        self.policy = Policy(self.sampler, tokenizer, shape, self.cache, ranks)
        self.policy.remember(self.validation, asked)
        self.verifier = make_verifier(config)
        self.telemetry = Telemetry(
            self.engine.config,
            config.modules.model_dump(),
            device=config.device,
            dtype=config.dtype,
            ranks=ranks,
        )
        self.monitor = CriticalTokenMonitor(
            expand_words(tokenizer, config.monitor.words),
            high_entropy_nats=config.monitor.high_entropy_nats,
        )
        loaded = resume(self.name, self.run, self.engine, resuming)
        if loaded is not None:
            self.step = loaded.step
            # Checkpoints of an earlier version have no curriculum.
            self.course.restore(loaded.state.get("curriculum", self.course.state()))
            self.questions = self.course.questions()
            self.questions.restore(loaded.state["questions"])
        self.resume_after = self.step if resuming else None

    def encode_questions(self, stage: OpenStage, shape: ImageShape, limit: PositionLimit) -> Course:
        """Encode the questions of all stages of the curriculum; return the course through them."""
        config, rates = self.config, self.config.curriculum.pass_rates
        self.samples: list[Sample] = []
        self.examples: list[Example] = []
        self.dropped, facts = 0, {}
        for file, given in {config.train_data: stage.train, **stage.further}.items():
            samples, examples, dropped = self.encode(file, given, shape, limit)
            check_micro_batch_tokens(
                config.micro_batch_tokens, file, examples, config.longest_response
            )
            facts[file] = facts_of(samples, rates)
            self.samples += samples
            self.examples += examples
            self.dropped += dropped
        self.validation_facts = facts_of(self.validation, rates)
        return Course(config, facts, self.validation_facts)

    def encode(
        self, path: Path, samples: list[Sample], shape: ImageShape, limit: PositionLimit
    ) -> tuple[list[Sample], list[Example], int]:
        """Return the samples of a file that fit, encoded, and how many were dropped: too long, or
        with a truncated picture."""
        ranks = self.engine.ranks
        examples = encode_all(
            path, samples, self.engine.tokenizer, shape, ranks=ranks, cache=self.cache
        )
        kept = limit.rows(path, examples, shown=ranks.is_main)
        dropped = len(samples) - len(kept)
        return [samples[i] for i in kept], [examples[i] for i in kept], dropped


def make_verifier(config: GRPO) -> LLMVerifier | None:
    """Return the LLM verifier of the configuration, or None when it names no endpoint."""
    rewards = config.rewards
    if rewards.verifier_url is None:
        return None
    return LLMVerifier(
        rewards.verifier_url,
        rewards.verifier_model,
        timeout_seconds=rewards.verifier_timeout_seconds,
        retries=rewards.verifier_retries,
    )


def train(config: GRPO, *, resuming: bool = False) -> Path:
    """Run the stage; return the model folder `<run>/models/grpo` of the last step."""
    final = Path(config.run) / "models" / "grpo"
    try:
        trainer = GRPOTrainer(config, resuming=resuming)
    except NothingToDo:
        return final
    try:
        trainer.loop()
    finally:
        trainer.cache.close()
    trainer.sampler.close()
    publish(trainer.engine, final)
    trainer.engine.ranks.on_main(lambda: write_finished(trainer.name, config))
    return final
