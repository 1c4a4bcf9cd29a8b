"""Group relative policy optimisation (report, section 3.3, eq. 1 to 7), one straight line.

sample -> reward -> filter -> advantages -> clipped loss -> step -> critical-token entropy, all
from one forward pass per gradient step.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1v3.config import GRPO
from r1v3.data.encoding import Example, collate, model_image_shape
from r1v3.data.sample import Sample
from r1v3.data.schema import load_samples
from r1v3.data.words import expand_words
from r1v3.engine.contract import Batch
from r1v3.engine.hf import HFEngine
from r1v3.evaluation.sampling import Policy
from r1v3.evaluation.statistics import score as score_interval
from r1v3.kernels import group_advantages, grpo_loss
from r1v3.model.internvl import load_model
from r1v3.rewards import LLMVerifier, Reward, score
from r1v3.rollout.local import Rollout, Sampling
from r1v3.trainer.critical_tokens import CriticalTokenMonitor
from r1v3.trainer.interrupt import StageInterrupted, StopRequest
from r1v3.trainer.metrics import MetricsLogger
from r1v3.trainer.stage import (
    begin,
    build_engine,
    encode_all,
    learning_rate,
    order,
    progress_bar,
    publish,
    require_fresh,
    resume,
    save,
    set_threads,
    torch_stream,
)

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


class Trainer:
    """The GRPO stage, step by step."""

    def __init__(self, config: GRPO, *, resuming: bool) -> None:
        self.config, self.run = config, Path(config.run)
        require_fresh("grpo", self.run, resuming)
        begin("grpo", config, self.run)
        set_threads(config.threads)
        self.engine = build_engine(
            config,
            config.modules.model_dump(),
            config.optimizer,
            temperature=config.decoding.temperature or 1.0,
        )
        shape = model_image_shape(self.engine.model, config.max_tiles)
        tokenizer = self.engine.tokenizer
        self.samples = load_samples(config.train_data)
        self.examples = encode_all(config.train_data, self.samples, tokenizer, shape)
        self.validation = load_samples(config.validation_data)
        # A picture that cannot be decoded is to be found now, not when steps would be lost.
        encode_all(config.validation_data, self.validation, tokenizer, shape)
        self.policy = Policy(self.engine.model, tokenizer, shape)
        self.verifier = make_verifier(config)
        self.reference = self._reference() if config.loss.kl_coef > 0 else None
        self.monitor = CriticalTokenMonitor(
            expand_words(tokenizer, config.monitor.words),
            high_entropy_nats=config.monitor.high_entropy_nats,
        )
        self.step = 0
        loaded = resume("grpo", self.run, self.engine, resuming)
        if loaded is not None:
            self.step = loaded.step
        self.resume_after = loaded.step if loaded is not None else (0 if resuming else None)

    def _reference(self) -> HFEngine:
        assert self.config.model is not None
        return HFEngine(
            load_model(self.config.model, device=self.config.device),
            self.engine.tokenizer,
            modules={},
            temperature=self.engine.temperature,
        )

    def max_tokens(self) -> int:
        """The response length allowed at this step (progressive length)."""
        allowed = self.config.decoding.max_tokens
        for change in self.config.lengths:
            if self.step >= change.step:
                allowed = change.max_tokens
        return allowed

    def sample_group(self, indices: list[int], key: int) -> tuple[Rollout, list[Reward]]:
        """Completions and rewards of the prompts with these positions in the training data."""
        config = self.config
        rollout, texts = self.policy.complete(
            [self.examples[i] for i in indices],
            Sampling(config.decoding.temperature, self.max_tokens()),
            group_size=config.group_size,
            generator=torch_stream(config.seed, "rollout", self.step, key),
        )
        asked: list[Sample] = [self.samples[i] for i in indices for _ in range(config.group_size)]
        rewards = score(texts, asked, weight=config.rewards.accuracy_weight, verifier=self.verifier)
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
            [g] * len(chosen),
            baseline=config.advantage.baseline,
            scale=config.advantage.scale,
            eps=config.advantage.eps,
        )
        return Episode(
            [self.examples[index] for index, _, _ in chosen],
            _join([rollout for _, rollout, _ in chosen], self.engine.tokenizer.pad_token_id),
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
        for gradient_step in range(config.gradient_steps):
            start, stop = gradient_step * share, (gradient_step + 1) * share
            starts = list(range(start, stop, size))
            batches = [whole.slice(i, min(i + size, stop)) for i in starts]
            rate = learning_rate(
                self.step * config.gradient_steps + gradient_step, total, config.optimizer
            )
            metrics = self._gradient_step(batches, starts, episode, old, share * g, rate)
        return metrics

    def _old_logprobs(self, whole: Batch, episode: Episode, size: int) -> Tensor | None:
        """The old policy's log-probs [P * G, R]; None: the current ones, detached."""
        if self.config.loss.old_logprobs == "rollout":
            return episode.rollout.logprobs
        if self.config.gradient_steps == 1:
            return None
        old = torch.zeros(whole.response_ids.shape)
        g = self.config.group_size
        with torch.no_grad():
            for i in range(0, len(whole.prompt_ids), size):
                logprobs, _ = self.engine.forward(whole.slice(i, i + size))
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
        loss_config, g = self.config.loss, self.config.group_size
        collected: list[dict[str, Tensor]] = []
        normalizer = float(sequences)
        if loss_config.aggregation == "token-mean":
            normalizer = float(sum(int(batch.loss_mask.sum()) for batch in batches))
        elif loss_config.aggregation == "constant":
            normalizer = float(sequences * self.config.decoding.max_tokens)
        references = None
        if self.reference is not None:
            with torch.no_grad():
                references = [self.reference.forward(batch)[0] for batch in batches]
        self.monitor.reset()

        def loss_fn(logprobs: Tensor, entropy: Tensor, index: int) -> Tensor:
            batch, first = batches[index], starts[index] * g
            rows = slice(first, first + len(logprobs))
            self.monitor.update(batch.response_ids, entropy.detach(), batch.loss_mask)
            loss, metrics = grpo_loss(
                logprobs,
                None if old is None else old[rows, : logprobs.shape[1]],
                episode.advantages[rows],
                batch.loss_mask,
                ref_logprobs=None if references is None else references[index],
                clip_low=loss_config.clip_low,
                clip_high=loss_config.clip_high,
                dual_clip=loss_config.dual_clip,
                kl_coef=loss_config.kl_coef,
                kl=loss_config.kl,
                aggregation=loss_config.aggregation,
                normalizer=normalizer,
            )
            behaviour = episode.rollout.logprobs[rows, : logprobs.shape[1]]
            gap = (logprobs.detach() - behaviour)[batch.loss_mask].abs().sum()
            collected.append({**metrics, "rollout_gap": gap})
            return loss

        own = episode.advantages[starts[0] * g : starts[0] * g + sequences]
        if float(own.abs().sum()) == 0 and references is None:
            with torch.no_grad():
                for index, batch in enumerate(batches):
                    loss_fn(*self.engine.forward(batch), index)
            zeros = {f"grad_norm_{part}": 0.0 for part in self.engine.parts}
            step = {"loss": 0.0, "learning_rate": rate, "grad_norm": 0.0, **zeros}
        else:
            step = self.engine.train_step(batches, loss_fn, learning_rate=rate)
        return {**step, **_combine(collected), **self.monitor.result()}

    def validate(self) -> dict[str, Any]:
        """Accuracy on the validation questions, by sampling as in training."""
        config = self.config
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

    def save(self) -> None:
        """A checkpoint to resume from and to select from: all are kept."""
        save("grpo", self.run, self.step, self.engine, {}, keep=None)

    def loop(self) -> None:
        """Train to the last step; a stop request saves first."""
        config = self.config
        with (
            StopRequest() as stop,
            MetricsLogger(
                self.run,
                "grpo",
                resume_after=self.resume_after,
                histogram_edges={"entropy_histogram": self.monitor.bin_edges},
            ) as log,
            progress_bar("grpo", config.steps, self.step, _SHOWN) as bar,
        ):
            while self.step < config.steps:
                metrics = self.take_step()
                last = self.step == config.steps
                if last or self.step % config.validate_every == 0:
                    metrics |= self.validate()
                log.log(self.step, metrics)
                bar.update(self.step, metrics)
                if last or stop.requested or self.step % config.checkpoint_every == 0:
                    self.save()
                if stop.requested:
                    raise StageInterrupted(
                        f"grpo stopped at step {self.step} of {config.steps} and was saved; "
                        "go on with --resume"
                    )


def _has_signal(rewards: list[Reward]) -> bool:
    return len({reward.total for reward in rewards}) > 1


def _join(rollouts: list[Rollout], pad: int) -> Rollout:
    """Groups of different widths below each other."""
    width = max(rollout.mask.shape[1] for rollout in rollouts)
    joined = []
    for name in Rollout.__dataclass_fields__:
        parts = [getattr(rollout, name) for rollout in rollouts]
        if parts[0].dim() == 2:
            value = pad if name == "response_ids" else 0
            parts = [
                torch.nn.functional.pad(part, (0, width - part.shape[1]), value=value)
                for part in parts
            ]
        joined.append(torch.cat(parts))
    return Rollout(*joined)


def _combine(collected: list[dict[str, Tensor]]) -> dict[str, float]:
    """Loss metrics of a step from those of its micro-batches, weighted by their tokens."""
    tokens = torch.stack([m["tokens"].double() for m in collected])
    weights = tokens / tokens.sum().clamp(min=1)
    result = {}
    fractions = ("clip_low_fraction", "clip_high_fraction", "dual_clip_fraction")
    for key in (*fractions, "approx_kl", "ref_kl", "ratio_mean"):
        result[key] = float((torch.stack([m[key].double() for m in collected]) * weights).sum())
    result["ratio_max"] = max(float(m["ratio_max"]) for m in collected)
    result["tokens"] = int(tokens.sum())
    result["nonfinite"] = int(sum(float(m["nonfinite"]) for m in collected))
    gap = sum(float(m["rollout_gap"]) for m in collected)
    result["rollout_logprob_gap"] = gap / max(1, result["tokens"])
    return result


def train(config: GRPO, *, resuming: bool = False) -> Path:
    """Run the stage; returns the model folder `<run>/models/grpo` of the last step."""
    final = Path(config.run) / "models" / "grpo"
    if resuming and final.exists():
        return final
    trainer = Trainer(config, resuming=resuming)
    trainer.loop()
    publish(trainer.engine, final)
    return final
