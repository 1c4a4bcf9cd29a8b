"""Sections that several stages hold."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from r1v3.config.base import Fraction, Positive, Section


class Modules(Section):
    """Which parts of the model are trained."""

    vision: bool = True
    connector: bool = True
    llm: bool = True


class Architecture(Section):
    """A randomly initialized InternVL (only pre-training starts from one).

    tokenizer_data: sample files whose texts the tokenizer's vocabulary is learned from.
    """

    vocab_size: Positive = 512
    image_size: Positive = 64
    patch_size: Positive = 8
    rope_theta: Annotated[float, Field(gt=0)] = 1e4
    tokenizer_data: tuple[Path, ...]
    vision: dict[str, int]
    text: dict[str, int]


class Pictures(Section):
    """Decoding of pictures, the same for every engine.

    ground: the color that transparency is laid on. truncated: a file that ends before its last
    pixel is an error that names its row, is padded (accept), or has its row left out and counted
    (skip).
    """

    ground: Literal["white", "black"] = "white"
    truncated: Literal["error", "accept", "skip"] = "error"


DEFAULT_PICTURES = Pictures()


class Optimizer(Section):
    """AdamW and its schedule.

    warmup_ratio: the fraction of steps with linear warm-up. max_skipped: a step whose gradient is
    not finite is skipped; after so many in a row the stage ends.
    """

    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_skipped: Positive = 3


class Decoding(Section):
    """Sampling of completions; temperature 0 is greedy."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    max_tokens: Positive = 96


class Rewards(Section):
    """Report eq. 1 to 3; the LLM verifier is off unless it has an endpoint."""

    accuracy_weight: Fraction = 0.8
    verifier_url: str | None = None
    verifier_model: str = "Qwen2.5-32B-Instruct"
    verifier_timeout_seconds: Annotated[float, Field(gt=0)] = 20.0
    verifier_retries: Annotated[int, Field(ge=0)] = 2


class Monitor(Section):
    """The critical tokens, and what counts as high entropy (report, section 6.5)."""

    words: tuple[str, ...] = ("Wait", "Alternatively", "Hmm")
    high_entropy_nats: Annotated[float, Field(gt=0)] = 6.8


class Profile(Section):
    """Traces of single steps, for performance work; docs/runs.md says what is written.

    steps: of the stage, from 1. ranks: which ranks record theirs.
    """

    steps: tuple[Positive, ...] = ()
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = (0,)


class Parallel(Section):
    """Layout of the Megatron engine over the ranks of `torchrun`; the rest is data parallelism.

    context: ranks that divide the tokens of every micro-batch, for sequences that are too long for
    one. sequence: Megatron's sequence parallelism. first_stage_layers, last_stage_layers: language
    layers of the first pipeline stage, which also holds the vision tower, and of the last one,
    which holds the head; null splits evenly. recompute: activations of every layer are computed
    again in the backward (`full`) or kept. distributed_optimizer: optimizer state is sharded over
    the data- and context-parallel ranks. timeout_seconds: a collective that waits longer, because a
    rank died or hangs, ends the job.
    """

    tensor: Positive = 1
    pipeline: Positive = 1
    context: Positive = 1
    sequence: bool = False
    first_stage_layers: Positive | None = None
    last_stage_layers: Positive | None = None
    recompute: Literal["none", "full"] = "none"
    distributed_optimizer: bool = True
    timeout_seconds: Annotated[float, Field(gt=0)] = 1800.0

    @model_validator(mode="after")
    def _check(self) -> "Parallel":
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence parallelism needs tensor > 1")
        if self.pipeline == 1 and (self.first_stage_layers or self.last_stage_layers):
            raise ValueError("first_stage_layers and last_stage_layers need pipeline > 1")
        return self

    @property
    def model_ranks(self) -> int:
        """Ranks of one data-parallel replica."""
        return self.tensor * self.pipeline * self.context


class RolloutEngine(Section):
    """The sampler of GRPO's completions.

    local: the training weights themselves. vllm: vLLM in the training processes, asleep while
    they train; `tensor` ranks hold one copy. vllm-server: OpenAI-compatible servers at `urls`.
    timeout_seconds: of one request; it is then sent to another server, at most `retries` times.
    concurrency: requests under way at a time, over all servers; one has all samples of a prompt.
    weights_folder: where servers find new weights, by default `<run>/rollout-weights`; it must be
    the same path for them. trust_remote_code: let vLLM run the code in the model's folder, which
    it needs for InternVL's original layout. vllm: further arguments of `vllm.LLM` for engine vllm,
    such as {max_num_seqs: 256, load_format: dummy, quantization: fp8}; with load_format dummy the
    folder's weights are not read, only those that training hands over.
    """

    engine: Literal["local", "vllm", "vllm-server"] = "local"
    urls: tuple[str, ...] = ()
    tensor: Positive = 1
    memory_share: Fraction = 0.5
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    retries: Annotated[int, Field(ge=0)] = 3
    concurrency: Positive = 64
    weights_folder: Path | None = None
    trust_remote_code: bool = False
    vllm: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check(self) -> "RolloutEngine":
        if "trust_remote_code" in self.vllm:
            raise ValueError("`trust_remote_code` is a setting of its own, beside `vllm`")
        if self.vllm and self.engine != "vllm":
            raise ValueError("`vllm` holds arguments of engine vllm; servers are given theirs")
        if (self.engine == "vllm-server") != bool(self.urls):
            raise ValueError("`urls` names the servers of engine vllm-server, and only of it")
        return self
