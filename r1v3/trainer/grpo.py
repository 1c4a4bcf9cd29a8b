"""Group relative policy optimization (report, section 3.3, eq. 1 to 7).

`GRPOTrainer.take_step` is the algorithm: sample -> reward -> advantages -> loss -> step.
"""

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from r1v3.model.flops import Work
from r1v3.model.parts import PARTS
from r1v3.progress import say
from r1v3.rewards import LLMVerifier, Reward, score
from r1v3.rollout.build import build_sampler
from r1v3.rollout.contract import Request, Sampling, decode_texts, join
from r1v3.trainer.checkpoint import Loaded
from r1v3.trainer.critical_tokens import CriticalTokenMonitor
from r1v3.trainer.curriculum import Course, facts_of, grouped_accuracy
from r1v3.trainer.division import divide
from r1v3.trainer.episode import Episode, Facts, Group, MicroBatch, Part, has_signal, rollout_facts
from r1v3.trainer.loop import DUE, Skipped, run_steps
from r1v3.trainer.policy_loss import HIGH_WEIGHT, WIDTH, PolicyLossFn, combine, statistics
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
        """Sample and reward completions of the prompts at these positions of the training data.

        A completion is decoded and rewarded on the rank that sampled it, and its tokens stay there;
        every rank learns its reward, its length and how it ended.
        """
        config, g, ranks = self.config, self.config.group_size, self.engine.ranks
        asked = [
            Request(self.examples[i], self.samples[i], pictures=config.pictures) for i in indices
        ]
        with self.stopwatch.part("generation"):
            part = self.policy.complete_part(
                asked,
                Sampling(config.decoding.temperature, self.max_tokens()),
                torch_stream(config.seed, "rollout", self.step, key),
                g,
            )

        def rewarded() -> list[tuple[int, Reward, Facts]]:
            samples = [self.samples[indices[row // g]] for row in part.rows]
            weight = config.rewards.accuracy_weight
            rewards = score(part.texts, samples, weight=weight, verifier=self.verifier)
            return list(zip(part.rows, rewards, rollout_facts(part.rollout), strict=True))

        # Time limits and a verifier's answers may differ from rank to rank; rewards must not.
        with self.stopwatch.part("reward"):
            found = itertools.chain.from_iterable(ranks.call_all(rewarded))
        known = {row: (reward, facts) for row, reward, facts in found}
        groups, (start, stop) = [], (part.rows.start, part.rows.stop)
        for n, i in enumerate(indices):
            rewards, facts = zip(*(known[row] for row in range(n * g, n * g + g)), strict=True)
            first, last = (min(max(row - n * g, 0), g) for row in (start, stop))
            own = part.rollout.rows(first + n * g - start, last + n * g - start)
            groups.append(Group(i, self.examples[i], [*rewards], [*facts], own, range(first, last)))
        return groups

    def with_advantages(self, groups: list[Group]) -> Episode:
        """Compare the completions of each group with each other; without a signal, with nothing."""
        rewards = [reward for group in groups for reward in group.rewards]
        g = self.config.group_size
        advantages = group_advantages(
            torch.tensor([reward.total for reward in rewards]),
            g,
            **self.config.advantage.model_dump(),
        )
        kept = [has_signal(group.rewards, self.config.signal) for group in groups]
        if self.config.signal == "accuracy":
            advantages *= torch.tensor(kept).repeat_interleave(g)
        return Episode(
            examples=[group.example for group in groups],
            rewards=rewards,
            facts=[one for group in groups for one in group.facts],
            advantages=advantages,
            kept=sum(kept),
            rollout=join([group.rollout for group in groups], self.pad_id),
            own=[p * g + row for p, group in enumerate(groups) for row in group.own],
        )

    def dump_rollouts(self, groups: list[Group], episode: Episode) -> None:
        """Write the completions of this step to <run>/rollouts/grpo, if it is the turn of one."""
        every, step, ranks = self.config.dump_rollouts_every, self.step + 1, self.engine.ranks
        if every is None or step % every:
            return
        indices = [group.index for group in groups]
        nothing: list[Sequence[int]] = [[]] * (ranks.size - 1)
        wanted = [range(len(episode.rewards)), *nothing]
        whole = episode.fetch(wanted, ranks, self.pad_id, entropy=True)
        path = self.run / "rollouts" / self.name / f"step-{step:06d}.parquet"
        samples = [self.samples[i] for i in indices]

        def write() -> None:
            texts = decode_texts(self.engine.tokenizer, whole.rollout, self.policy.stop_id)
            write_rollouts(path, whole, indices, samples, texts)

        ranks.on_main(write)

    def update(self, episode: Episode) -> dict[str, Any]:
        """Take the gradient steps of an episode, each on an equal part of its prompts.

        Returns:
            Metrics over the tokens that the steps were taken on (with `measure_all`: over all),
            each with the weights that its step found; the loss, the learning rate and the gradient
            norms are means over the steps.
        """
        config, n = self.config, self.config.gradient_steps
        optimizer = self.course.optimizer(config.optimizer)
        packs = episode.packs(
            n,
            config.micro_batch_prompts,
            apart=self.reference is None,
            tokens=config.micro_batch_tokens,
            least=worthwhile(config, self.engine.replicas.size),
        )
        parts, works = divide(episode, packs, self.engine, self.replica_of, config)
        parts = [
            replace(
                part,
                learned=self.with_fixed_logprobs(part.learned) if part.learns else [],
                measured=self.with_fixed_logprobs(part.measured) if part.measures else [],
            )
            for part in parts
        ]
        self.telemetry.start()
        rates = [learning_rate(self.step * n + i, self.total * n, optimizer) for i in range(n)]
        steps = [self.gradient_step(part, rate) for part, rate in zip(parts, rates, strict=True)]
        machine = self.telemetry.finish(sum(works, Work()))
        outputs = [output for _, found in steps for output in found]
        return {
            **{key: sum(metrics[key] for metrics, _ in steps) / n for key in steps[0][0]},
            **self.statistics(parts, outputs, len(works)),
            "steps_skipped": self.skipped.count([metrics["grad_norm"] for metrics, _ in steps]),
            **self.monitor.result(),
            **machine,
        }

    def statistics(
        self, parts: Sequence[Part], outputs: Sequence[dict[str, Tensor]], count: int
    ) -> dict[str, Any]:
        """Return the metrics of all micro-batches of all replicas, the monitor left with theirs.

        Args:
            parts, outputs: of this rank, in the order of `gradient_step`.
            count: micro-batches of all replicas.
        """
        config, monitor = self.config, self.monitor
        numbers = [number for part in parts for number in part.numbers]
        given = [one for part in parts for one in (*part.learned, *part.measured)]
        rows = {}
        if self.engine.reports:
            for n, (batch, targets), output in zip(numbers, given, outputs, strict=True):
                entropy = output["token_entropy"]
                watched = monitor.measure(batch.response_ids, entropy, batch.loss_mask)
                rows[n] = torch.cat([statistics(targets, output, config.loss), watched])
        table = self.engine.ranks.table(rows, count, WIDTH + monitor.width)
        monitor.reset()
        for row in table[:, WIDTH:]:
            monitor.add(row)
        metrics = combine(table[:, :WIDTH])
        self.warn_of_weight(metrics)
        return metrics

    def warn_of_weight(self, metrics: dict[str, float]) -> None:
        """Warn once when one token outweighs all others in the gradient of the KL."""
        if (weight := metrics.get("kl_weight_max", 0.0)) > HIGH_WEIGHT and not self.warned:
            self.warned = True
            warnings.warn(
                f"step {self.step + 1}: a token weighs {weight:,.0f} in the gradient of the KL "
                f"({self.config.loss.kl}), where others weigh about their gap: the policy has left "
                f"the reference there by {metrics['ref_gap_max']:.1f} nats at most. loss.kl=k2 is "
                "linear in the gap; later steps show it as kl_weight_max",
                stacklevel=2,
            )

    def with_fixed_logprobs(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """Add the log-probs of the policies that do not move: the old one and the reference.

        With one gradient step the old policy is the current one, whose log-probs the loss has.
        Ranks without the head need none, and get none.
        """
        batches = [batch for batch, _ in micro_batches]
        targets = [one for _, one in micro_batches]
        if self.config.loss.old_logprobs == "rollout":
            targets = [replace(one, old_logprobs=one.rollout_logprobs) for one in targets]
        elif self.config.gradient_steps > 1:
            for i, (logprobs, _) in enumerate(self.engine.evaluate(batches)):
                targets[i] = replace(targets[i], old_logprobs=logprobs)
        if self.reference is not None:
            for i, (logprobs, _) in enumerate(self.reference.evaluate(batches)):
                targets[i] = replace(targets[i], ref_logprobs=logprobs)
        return list(zip(batches, targets, strict=True))

    def gradient_step(
        self, part: Part, rate: float
    ) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
        """Take one optimizer step; where no replica has anything to learn, none.

        Returns:
            Metrics of `Engine.train_step`, and the outputs of the learned and the measured
            micro-batches of this replica; no outputs on ranks without the head.
        """
        targets = [one for _, one in (*part.learned, *part.measured)]
        loss = PolicyLossFn(self.config.loss, targets, part.normalizer)
        evaluated: list[tuple[Tensor, Tensor]] = []
        if part.measures:
            evaluated = self.engine.evaluate([batch for batch, _ in part.measured])
        zeros = dict.fromkeys(["grad_norm", *(f"grad_norm_{name}" for name in PARTS)], 0.0)
        metrics, outputs = {"loss": 0.0, "learning_rate": rate, **zeros}, list[dict[str, Tensor]]()
        if part.learns:
            batches = [batch for batch, _ in part.learned]
            metrics, outputs = self.engine.train_step(batches, loss, learning_rate=rate)
        first = len(part.learned)
        outputs += [loss.metrics(*values, first + i) for i, values in enumerate(evaluated)]
        return metrics, outputs

    def validate(self, stopping: Callable[[], bool]) -> dict[str, Any] | None:
        """See `loop.Steps.validate`: the accuracy on the validation questions, sampled as in
        training."""
        config = self.config
        # vLLM schedules all questions itself; of others, as many completions as a step samples.
        together = config.prompts_per_step * config.group_size
        if config.rollout.engine != "local":
            together = len(self.validation) * config.validation_samples
        with self.sampling():
            graded = self.policy.grade(
                self.validation,
                Sampling(config.decoding.temperature, self.max_tokens()),
                repeats=config.validation_samples,
                generator=torch_stream(config.seed, "validation"),
                batch_prompts=max(1, together // config.validation_samples),
                stopping=stopping,
            )
        if graded is None:
            return None
        result = score_interval(*graded)
        correct = graded[0].mean(axis=1).tolist()
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
        self.pad_id = tokenizer.pad_token_id
        self.replica_of = ranks.gather(self.engine.replicas.rank)
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
        self.restore(resume(self.name, self.run, self.engine, resuming), resuming)

    def restore(self, loaded: Loaded | None, resuming: bool) -> None:
        """Go on from a checkpoint, if there is one."""
        self.unvalidated: dict[str, Any] | None = None
        if loaded is not None:
            self.step = loaded.step
            # Checkpoints of an earlier version have no curriculum.
            self.course.restore(loaded.state.get("curriculum", self.course.state()))
            self.questions = self.course.questions()
            self.questions.restore(loaded.state["questions"])
            self.unvalidated = loaded.state.get(DUE)
        # The line of a step that is still to be validated is written again.
        done = self.step - (self.unvalidated is not None)
        self.resume_after = done if resuming else None

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
