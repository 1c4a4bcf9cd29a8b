"""Group relative policy optimisation (report, section 3.3, eq. 1 to 7), one straight line.

sample -> reward -> filter -> advantages -> clipped loss -> step -> critical-token entropy, all
from one forward pass per gradient step.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1v3.config import GRPO
from r1v3.data.batch import Batch
from r1v3.data.encoding import Example, collate, encode_all, model_image_shape
from r1v3.data.sample import Sample
from r1v3.data.schema import load_samples
from r1v3.data.words import expand_words
from r1v3.engine.build import build_engine
from r1v3.engine.contract import Engine
from r1v3.evaluation.sampling import Policy
from r1v3.evaluation.statistics import score as score_interval
from r1v3.kernels import group_advantages
from r1v3.model.parts import PARTS
from r1v3.ranks import Ranks
from r1v3.rewards import LLMVerifier, Reward, score
from r1v3.rollout.build import build_sampler
from r1v3.rollout.contract import Request, Rollout, Sampling, join
from r1v3.trainer.critical_tokens import CriticalTokenMonitor
from r1v3.trainer.loop import run_steps
from r1v3.trainer.policy_loss import PolicyLossFn, Targets, combine, normalizer
from r1v3.trainer.randomness import order, torch_stream
from r1v3.trainer.schedule import learning_rate
from r1v3.trainer.stage import open_stage, publish, resume
from r1v3.trainer.telemetry import Telemetry

_SHOWN = ("reward", "accuracy", "response_length", "critical_entropy", "validation_accuracy")


@dataclass(frozen=True)
class Episode:
    """The completions of one step: P groups of G, with their rewards and advantages [P * G]."""

    examples: list[Example]
    rollout: Rollout
    rewards: list[Reward]
    advantages: Tensor
    groups_kept: int

    def batch(self, pad: int, group_size: int) -> Batch:
        """The training batch: prompts and sampled responses."""
        given = [
            [i for i, m in zip(ids, mask, strict=True) if m]
            for ids, mask in zip(
                self.rollout.response_ids.tolist(), self.rollout.mask.tolist(), strict=True
            )
        ]
        return collate(self.examples, pad, responses=given, group_size=group_size)


def make_verifier(config: GRPO) -> LLMVerifier | None:
    """The LLM verifier of the configuration, or None when it has no endpoint."""
    rewards = config.rewards
    if rewards.verifier_url is None:
        return None
    return LLMVerifier(
        rewards.verifier_url,
        rewards.verifier_model,
        timeout_seconds=rewards.verifier_timeout_seconds,
        retries=rewards.verifier_retries,
    )


class GRPOTrainer:
    """The GRPO stage, step by step."""

    def __init__(self, config: GRPO, *, resuming: bool) -> None:
        self.name, self.config, self.run = "grpo", config, Path(config.run)
        self.total = config.steps
        ranks = open_stage("grpo", config, resuming=resuming)
        self.engine = build_engine(
            config,
            config.modules.model_dump(),
            config.optimizer,
            ranks,
            temperature=config.decoding.temperature or 1.0,
        )
        shape = model_image_shape(self.engine.config, config.max_tiles)
        tokenizer = self.engine.tokenizer
        self.samples = load_samples(config.train_data)
        self.examples = encode_all(config.train_data, self.samples, tokenizer, shape)
        self.validation = load_samples(config.validation_data)
        # A picture that cannot be decoded is to be found now, not when steps would be lost.
        asked = encode_all(config.validation_data, self.validation, tokenizer, shape)
        longest_prompt = max(len(example.prompt_ids) for example in [*self.examples, *asked])
        self.sampler = build_sampler(
            config.rollout,
            config,
            tokenizer,
            ranks=ranks,
            max_length=longest_prompt + self._most_tokens(),
            local=lambda: (self.engine.decoder(), self.engine.replicas),
        )
        self.policy = Policy(self.sampler, tokenizer, shape)
        self.telemetry = Telemetry(
            self.engine.config,
            config.modules.model_dump(),
            device=config.device,
            dtype=config.dtype,
            ranks=ranks,
        )
        self.verifier = make_verifier(config)
        self.reference = self._reference(ranks) if config.loss.kl_coef > 0 else None
        self.monitor = CriticalTokenMonitor(
            expand_words(tokenizer, config.monitor.words),
            high_entropy_nats=config.monitor.high_entropy_nats,
        )
        self.step = 0
        loaded = resume("grpo", self.run, self.engine, resuming)
        if loaded is not None:
            self.step = loaded.step
        self.resume_after = loaded.step if loaded is not None else (0 if resuming else None)

    @property
    def finished(self) -> bool:
        """See `loop.Steps.finished`."""
        return self.step >= self.total

    def _reference(self, ranks: Ranks) -> Engine:
        """The policy that training started from, for the KL term."""
        return build_engine(
            self.config,
            None,
            self.config.optimizer,
            ranks,
            temperature=self.engine.temperature,
        )

    def max_tokens(self) -> int:
        """The response length allowed at this step (progressive length)."""
        allowed = self.config.decoding.max_tokens
        for change in self.config.lengths:
            if self.step >= change.step:
                allowed = change.max_tokens
        return allowed

    def _most_tokens(self) -> int:
        """The longest response of any step."""
        later = [change.max_tokens for change in self.config.lengths]
        return max([self.config.decoding.max_tokens, *later])

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """The sampler, awake and with the weights as they are now."""
        self.sampler.update_weights(self.engine.export_hf(), self.step)
        self.sampler.wake()
        try:
            yield
        finally:
            self.sampler.sleep()

    def sample_group(self, indices: list[int], key: int) -> tuple[Rollout, list[Reward]]:
        """Completions and rewards of the prompts with these positions in the training data."""
        config = self.config
        rollout, texts = self.policy.complete(
            [Request(self.examples[i], self.samples[i]) for i in indices],
            Sampling(config.decoding.temperature, self.max_tokens()),
            group_size=config.group_size,
            generator=torch_stream(config.seed, "rollout", self.step, key),
        )
        asked: list[Sample] = [self.samples[i] for i in indices for _ in range(config.group_size)]
        # Time limits and a verifier's answers could differ from rank to rank; rewards must not.
        weight = config.rewards.accuracy_weight
        rewards = self.engine.ranks.on_main(
            lambda: score(texts, asked, weight=weight, verifier=self.verifier)
        )
        return rollout, rewards

    def episode(self) -> Episode:
        """Sample this step's groups, replacing groups without signal if so configured."""
        config, g = self.config, self.config.group_size
        size = config.prompts_per_step
        rounds = config.dynamic_sampling.rounds if config.dynamic_sampling.enabled else 1
        pool = order(
            len(self.samples), self.step * size * rounds, size * rounds, config.seed, "grpo"
        )
        kept: list[tuple[int, Rollout, list[Reward]]] = []
        spare: list[tuple[int, Rollout, list[Reward]]] = []
        for round_ in range(rounds):
            indices = pool[round_ * size : (round_ + 1) * size]
            rollout, rewards = self.sample_group(indices, round_)
            for p, index in enumerate(indices):
                group = (index, rollout.rows(p * g, (p + 1) * g), rewards[p * g : (p + 1) * g])
                (kept if _has_signal(group[2]) else spare).append(group)
            if len(kept) >= size:
                break
        signal = min(len(kept), size)
        chosen = (kept + spare)[:size]
        rewards = [reward for _, _, group in chosen for reward in group]
        advantages = group_advantages(
            torch.tensor([reward.total for reward in rewards]),
            g,
            baseline=config.advantage.baseline,
            scale=config.advantage.scale,
            eps=config.advantage.eps,
        )
        return Episode(
            [self.examples[index] for index, _, _ in chosen],
            join([rollout for _, rollout, _ in chosen], self.engine.tokenizer.pad_token_id),
            rewards,
            advantages,
            signal,
        )

    def update(self, episode: Episode) -> dict[str, Any]:
        """The gradient steps of one episode."""
        config, g = self.config, self.config.group_size
        whole = episode.batch(self.engine.tokenizer.pad_token_id, g)
        total = config.steps * config.gradient_steps
        share = config.prompts_per_step // config.gradient_steps
        size = min(config.micro_batch_prompts, share)
        metrics: dict[str, Any] = {}
        old = self._old_logprobs(whole, episode, size)
        self.telemetry.start()
        trained: list[Batch] = []
        for gradient_step in range(config.gradient_steps):
            start, stop = gradient_step * share, (gradient_step + 1) * share
            starts = list(range(start, stop, size))
            batches = [whole.slice(i, min(i + size, stop)) for i in starts]
            rate = learning_rate(
                self.step * config.gradient_steps + gradient_step, total, config.optimizer
            )
            metrics = self._gradient_step(batches, starts, episode, old, share * g, rate)
            trained += batches
        return {**metrics, **self.telemetry.finish(trained)}

    def _old_logprobs(self, whole: Batch, episode: Episode, size: int) -> Tensor | None:
        """The old policy's log-probs [P * G, R]; None: the current ones, detached."""
        if self.config.loss.old_logprobs == "rollout":
            return episode.rollout.logprobs
        if self.config.gradient_steps == 1:
            return None
        old = torch.zeros(whole.response_ids.shape)
        g = self.config.group_size
        starts = range(0, len(whole.prompt_ids), size)
        found = self.engine.evaluate([whole.slice(i, i + size) for i in starts])
        for i, (logprobs, _) in zip(starts, found, strict=True):
            old[i * g : i * g + len(logprobs), : logprobs.shape[1]] = logprobs
        return old

    def _gradient_step(
        self,
        batches: list[Batch],
        starts: list[int],
        episode: Episode,
        old: Tensor | None,
        sequences: int,
        rate: float,
    ) -> dict[str, Any]:
        """One optimizer step over micro-batches; skipped when no reward differs in its group."""
        g = self.config.group_size
        references: list[Tensor | None] = [None] * len(batches)
        if self.reference is not None:
            references = [logprobs for logprobs, _ in self.reference.evaluate(batches)]
        targets = [
            Targets.of(batch, start * g, episode.advantages, episode.rollout, old, reference)
            for batch, start, reference in zip(batches, starts, references, strict=True)
        ]
        loss = PolicyLossFn(
            self.config.loss,
            targets,
            normalizer(self.config.loss, batches, sequences, self.config.decoding.max_tokens),
        )
        own = episode.advantages[starts[0] * g : starts[0] * g + sequences]
        if float(own.abs().sum()) == 0 and self.reference is None:
            found = self.engine.evaluate(batches)
            outputs = [loss.metrics(*values, i) for i, values in enumerate(found)]
            zeros = {f"grad_norm_{part}": 0.0 for part in PARTS}
            step = {"loss": 0.0, "learning_rate": rate, "grad_norm": 0.0, **zeros}
        else:
            step, outputs = self.engine.train_step(batches, loss, learning_rate=rate)
        self.monitor.reset()
        for batch, output in zip(batches, outputs, strict=True):
            self.monitor.update(batch.response_ids, output["token_entropy"], batch.loss_mask)
        return {
            **step,
            **combine(targets, outputs, self.config.loss.importance_cap),
            **self.monitor.result(),
        }

    def validate(self) -> dict[str, Any]:
        """Accuracy on the validation questions, by sampling as in training."""
        config = self.config
        with self.sampling():
            correct, tokens = self.policy.grade(
                self.validation,
                Sampling(config.decoding.temperature, self.max_tokens()),
                samples_each=config.validation_samples,
                generator=torch_stream(config.seed, "validation"),
            )
        result = score_interval(correct, tokens)
        return {
            "validation_accuracy": result.accuracy,
            "validation_low": result.low,
            "validation_high": result.high,
        }

    def take_step(self) -> dict[str, Any]:
        """Sample, reward and update once; the step's metrics."""
        started = time.perf_counter()
        failures = self._verifier_failures()
        with self.sampling():
            episode = self.episode()
        sampled = time.perf_counter()
        metrics = self.update(episode)
        self.step += 1
        n = len(episode.rewards)
        lengths = episode.rollout.mask.sum(1).float()
        return {
            "reward": sum(r.total for r in episode.rewards) / n,
            "accuracy": sum(r.accuracy for r in episode.rewards) / n,
            "format": sum(r.format for r in episode.rewards) / n,
            "response_length": float(lengths.mean()),
            "truncated": float((~episode.rollout.finished).float().mean()),
            "groups_kept": episode.groups_kept,
            "verifier_failures": self._verifier_failures() - failures,
            **metrics,
            "seconds_rollout": sampled - started,
            "seconds": time.perf_counter() - started,
        }

    def _verifier_failures(self) -> int:
        """Answers left without a verdict so far in this process."""
        return 0 if self.verifier is None else self.verifier.failures.total()

    def state(self) -> dict[str, Any]:
        """See `loop.Steps.state`: everything follows from the step."""
        return {}

    def loop(self) -> None:
        """Train to the last step; all checkpoints are kept, to select from."""
        run_steps(
            self,
            validate_every=self.config.validate_every,
            checkpoint_every=self.config.checkpoint_every,
            keep=None,
            shown=_SHOWN,
        )


def _has_signal(rewards: list[Reward]) -> bool:
    return len({reward.total for reward in rewards}) > 1


def train(config: GRPO, *, resuming: bool = False) -> Path:
    """Run the stage; returns the model folder `<run>/models/grpo` of the last step."""
    final = Path(config.run) / "models" / "grpo"
    if resuming and final.exists():
        return final
    trainer = GRPOTrainer(config, resuming=resuming)
    trainer.loop()
    trainer.sampler.close()
    publish(trainer.engine, final)
    return final
