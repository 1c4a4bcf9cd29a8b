"""The training and evaluation stages, one class each."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from r1v3.config.base import Positive, Section
from r1v3.config.curriculum import Curriculum
from r1v3.config.sections import (
    Architecture,
    Decoding,
    Modules,
    Monitor,
    Optimizer,
    Parallel,
    Pictures,
    Profile,
    Rewards,
    RolloutEngine,
)


class Stage(Section):
    """Settings of every training and evaluation stage.

    run: the run folder. seed: of everything random in the stage. processes: of this machine that
    share the work, where torchrun started none. threads: CPU threads of each, null for torch's own
    choice. model: the folder of the weights to start from. engine: `hf` holds a whole model in
    every process, and splits micro-batches and questions among them; `megatron` is laid out by
    `parallel`. dtype: of the weights in the forward; gradients and optimizer state are float32 in
    any case. wandb_project: also log to Weights & Biases, which must be installed. max_tiles: most
    tiles of a picture beside its thumbnail; null takes the model's own number, `max_dynamic_patch`
    in its config.json, or 1 where that says nothing. too_long: rows that with their response, or
    the longest one that may be sampled, exceed the model's max_position_embeddings are an error, or
    are dropped and counted.
    """

    run: Path
    seed: int = 0
    processes: Positive = 1
    threads: Positive | None = None
    device: str = "cpu"
    engine: Literal["hf", "megatron"] = "hf"
    dtype: Literal["float32", "bfloat16"] = "float32"
    parallel: Parallel = Parallel()
    wandb_project: str | None = None
    model: Path | None = None
    max_tiles: Positive | None = None
    pictures: Pictures = Pictures()
    too_long: Literal["error", "drop"] = "error"

    @model_validator(mode="after")
    def _check_engine(self) -> "Stage":
        if self.engine == "hf" and self.parallel.model_ranks > 1:
            raise ValueError("`parallel` needs engine=megatron")
        if self.engine == "hf" and self.dtype != "float32":
            raise ValueError("engine hf trains in float32; dtype bfloat16 needs engine=megatron")
        return self


class Supervised(Stage):
    """Supervised tuning on responses: cold-start SFT, connector-only tuning, pre-training.

    epochs: passes over the rows. A batch goes on into the next pass where one ends; the last one of
    the stage is smaller, so that every pass sees each row once. max_length: samples of more tokens
    than this, prompt and response together, are left out; null keeps all. early_stopping:
    validations without a better loss after which the stage ends; null trains to the end. The
    weights of the best validation loss are what the stage hands on. keep: the newest checkpoints to
    keep, to resume from. micro_batch_size, micro_batch_tokens: most rows and most tokens of a
    micro-batch; null sets no limit to the tokens.
    """

    architecture: Architecture | None = None
    modules: Modules = Modules()
    train_data: Path
    validation_data: Path
    max_length: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] = 2.0
    batch_size: Positive = 64
    micro_batch_size: Positive = 64
    micro_batch_tokens: Positive | None = None
    optimizer: Optimizer
    monitor: Monitor = Monitor()
    validate_every: Positive = 50
    checkpoint_every: Positive = 50
    keep: Positive = 2
    profile: Profile = Profile()
    early_stopping: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> "Supervised":
        if (self.model is None) == (self.architecture is None):
            raise ValueError("give either `model` (a folder to start from) or `architecture`")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        return self


class SFT(Supervised):
    """Cold-start supervised fine-tuning."""


class Connector(Supervised):
    """Connector-only tuning: the same loop, with only the connector trained by default."""

    modules: Modules = Modules(vision=False, connector=True, llm=False)


class LengthStep(Section):
    """From `step` on, completions may be `max_tokens` long (progressive response length)."""

    step: Annotated[int, Field(ge=0)]
    max_tokens: Positive


class DynamicSampling(Section):
    """DAPO's filter: groups whose rewards are all equal are replaced, at most `rounds` times.

    A question whose group has signal and finds no place in the step is asked again in the next one.
    """

    enabled: bool = False
    rounds: Positive = 3


class Advantage(Section):
    """Report eq. 6 and its variants; see `r1v3.kernels.group_advantages`."""

    baseline: Literal["mean", "leave_one_out", "none"] = "mean"
    scale: Literal["group", "batch", "none"] = "group"
    eps: Annotated[float, Field(gt=0)] = 1e-6


class PolicyLoss(Section):
    """Report eq. 4, 5 and 7; see `r1v3.kernels.grpo_loss`.

    importance_cap: weigh every token by min(training / rollout probability, cap), which corrects
    for a rollout engine whose numbers differ from the trainer's; null: weight 1. kl: k3 is what
    other stacks use, k2 bounds what one token weighs; docs/runs.md compares them.
    """

    clip_low: Annotated[float, Field(ge=0)] = 0.2
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    ratio_clip: Literal["ppo", "cispo"] = "ppo"
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    kl: Literal["k1", "k2", "k3"] = "k3"
    aggregation: Literal["sequence-mean", "token-mean", "sequence-sum", "constant"] = (
        "sequence-mean"
    )
    old_logprobs: Literal["current", "rollout"] = "current"
    importance_cap: Annotated[float, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "PolicyLoss":
        if self.dual_clip is not None and self.ratio_clip == "cispo":
            raise ValueError("dual_clip must be null with ratio_clip `cispo`")
        return self


class GRPO(Stage):
    """Group relative policy optimization.

    One episode samples `prompts_per_step` x `group_size` completions and takes
    `gradient_steps` optimizer steps on them, each on an equal part of the prompts. With one step
    and `old_logprobs: current` the ratio is 1 and clipping is inert, as in the report. Prompts come
    in shuffled passes over the data; a step that ends a pass goes on into the next one.

    keep: the newest checkpoints to keep, to resume from. keep_models: of so many older ones the
    models are kept, to select from, without the optimizer's state; null keeps all.

    micro_batch_prompts, micro_batch_tokens: most prompts and most tokens of a micro-batch. A group
    of more tokens is divided among several micro-batches, each with the prompt once, which changes
    memory and time and not the gradient; null sets no limit, so that groups stay whole.

    dump_rollouts_every: steps after which the completions of a step are written as Parquet.

    signal: a group is learned from where the rewards of its completions differ, or where the
    accuracies do: completions that differ in their format alone are then not compared.

    measure_all: pass groups that nothing is learned from through the model too, so that entropies
    and the other metrics of tokens cover them; that costs their forward and changes no gradient.
    """

    modules: Modules = Modules()
    train_data: Path
    validation_data: Path
    steps: Positive
    prompts_per_step: Positive = 32
    group_size: Annotated[int, Field(gt=1)] = 32
    gradient_steps: Positive = 1
    micro_batch_prompts: Positive = 4
    micro_batch_tokens: Positive | None = None
    decoding: Decoding = Decoding()
    lengths: tuple[LengthStep, ...] = ()
    curriculum: Curriculum = Curriculum()
    dynamic_sampling: DynamicSampling = DynamicSampling()
    signal: Literal["reward", "accuracy"] = "reward"
    measure_all: bool = False
    advantage: Advantage = Advantage()
    loss: PolicyLoss = PolicyLoss()
    rewards: Rewards = Rewards()
    rollout: RolloutEngine = RolloutEngine()
    optimizer: Optimizer
    monitor: Monitor = Monitor()
    validate_every: Positive = 20
    validation_samples: Positive = 1
    checkpoint_every: Positive = 20
    keep: Positive = 2
    keep_models: Annotated[int, Field(ge=0)] | None = None
    profile: Profile = Profile()
    dump_rollouts_every: Positive | None = None

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response of any step."""
        later = [change.max_tokens for change in self.lengths]
        later += [stage.max_tokens or 0 for stage in self.curriculum.stages]
        return max([self.decoding.max_tokens, *later])

    @model_validator(mode="after")
    def _check(self) -> "GRPO":
        if self.model is None:
            raise ValueError("`model` must name the folder of the weights to start from")
        if self.decoding.temperature == 0:
            raise ValueError(
                "decoding.temperature must be above 0: greedy completions of a prompt are all the "
                "same, so that no group has an advantage, and have no log-probs to train on"
            )
        if self.prompts_per_step % self.gradient_steps:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} must be a multiple of gradient_steps "
                f"{self.gradient_steps}"
            )
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < self.longest_response:
            raise ValueError(
                f"micro_batch_tokens {self.micro_batch_tokens} holds no response of up to "
                f"{self.longest_response} tokens with its prompt: raise it, or lower "
                "decoding.max_tokens and `lengths`"
            )
        if self.loss.aggregation == "constant" and self.decoding.max_tokens < 1:
            raise ValueError("aggregation `constant` divides by decoding.max_tokens")
        return self


class Select(Section):
    """Checkpoint selection by critical-token entropy, the validation score beside it."""

    run: Path
    rule: Literal["critical_entropy", "validation_accuracy"] = "critical_entropy"


class Evaluate(Stage):
    """Scores one checkpoint in decoding modes, on questions that no tuning looked at."""

    name: str = "checkpoint"
    data: tuple[Path, ...]
    out_of_domain: tuple[str, ...] = ()
    modes: tuple[Literal["slow", "nothink", "nowait"], ...] = ("slow", "nothink", "nowait")
    budgets: tuple[Positive, ...] = ()
    samples: Positive = 5
    mode_samples: Positive = 1
    decoding: Decoding = Decoding()
    rollout: RolloutEngine = RolloutEngine()
    batch_prompts: Positive = 64
    transcripts: Annotated[int, Field(ge=0)] = 12
    monitor: Monitor = Monitor()
