"""Configuration: YAML files checked against typed models, with `key=value` overrides.

Every stage has its own file and its own class here. Unknown keys are errors that name the key and
the nearest valid one. The resolved configuration is written into the run folder first.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names file, key, value and remedy."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Modules(Section):
    """Which parts of the model are trained."""

    vision: bool = True
    connector: bool = True
    llm: bool = True


class Architecture(Section):
    """A randomly initialised InternVL (only pre-training starts from one).

    tokenizer_data: sample files whose texts the tokenizer's vocabulary is learned from.
    """

    vocab_size: Positive = 512
    image_size: Positive = 64
    patch_size: Positive = 8
    rope_theta: Annotated[float, Field(gt=0)] = 1e4
    tokenizer_data: tuple[Path, ...]
    vision: dict[str, int]
    text: dict[str, int]


class Optimizer(Section):
    """AdamW and its schedule; `warmup_ratio` is the share of all steps that warms up linearly."""

    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: Share = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Share, Share] = (0.9, 0.95)
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class Decoding(Section):
    """How completions are sampled; temperature 0 is greedy."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    max_tokens: Positive = 96


class Rewards(Section):
    """Report eq. 1 to 3; the LLM verifier is off unless it has an endpoint."""

    accuracy_weight: Share = 0.8
    verifier_url: str | None = None
    verifier_model: str = "Qwen2.5-32B-Instruct"
    verifier_timeout_seconds: Annotated[float, Field(gt=0)] = 20.0
    verifier_retries: Annotated[int, Field(ge=0)] = 2


class Monitor(Section):
    """The critical tokens, and what counts as high entropy (report, section 6.5)."""

    words: tuple[str, ...] = ("Wait", "Alternatively", "Hmm")
    high_entropy_nats: Annotated[float, Field(gt=0)] = 6.8


class Stage(Section):
    """What every training and evaluation stage has.

    run: the run folder. seed: of everything random in the stage. threads: CPU threads, null for
    torch's own choice. model: the folder of the weights to start from.
    """

    run: Path
    seed: int = 0
    threads: Positive | None = None
    device: str = "cpu"
    engine: Literal["hf"] = "hf"
    model: Path | None = None
    max_tiles: Positive = 1


class Supervised(Stage):
    """Supervised tuning on responses: cold-start SFT, connector-only tuning, pre-training.

    early_stopping: validations without a better loss after which the stage ends; null trains to
    the end. The weights of the best validation loss are what the stage hands on.
    """

    architecture: Architecture | None = None
    modules: Modules = Modules()
    train_data: Path
    validation_data: Path
    epochs: Annotated[float, Field(gt=0)] = 2.0
    batch_size: Positive = 64
    micro_batch_size: Positive = 64
    optimizer: Optimizer
    monitor: Monitor = Monitor()
    validate_every: Positive = 50
    checkpoint_every: Positive = 50
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
    """DAPO's filter: groups whose rewards are all equal are replaced, at most `rounds` times."""

    enabled: bool = False
    rounds: Positive = 3


class Advantage(Section):
    """Report eq. 6 and its variants; see `r1v3.kernels.group_advantages`."""

    baseline: Literal["mean", "leave_one_out", "none"] = "mean"
    scale: Literal["group", "batch", "none"] = "group"
    eps: Annotated[float, Field(gt=0)] = 1e-6


class PolicyLoss(Section):
    """Report eq. 4, 5 and 7; see `r1v3.kernels.grpo_loss`."""

    clip_low: Annotated[float, Field(ge=0)] = 0.2
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    kl: Literal["k1", "k2", "k3"] = "k3"
    aggregation: Literal["sequence-mean", "token-mean", "sequence-sum", "constant"] = (
        "sequence-mean"
    )
    old_logprobs: Literal["current", "rollout"] = "current"


class GRPO(Stage):
    """Group relative policy optimisation.

    One episode samples `prompts_per_step` x `group_size` completions and takes
    `gradient_steps` optimizer steps on them, each on an equal share of the prompts. With one step
    and `old_logprobs: current` the ratio is 1 and clipping is inert, as in the report.
    """

    modules: Modules = Modules()
    train_data: Path
    validation_data: Path
    steps: Positive
    prompts_per_step: Positive = 32
    group_size: Annotated[int, Field(gt=1)] = 32
    gradient_steps: Positive = 1
    micro_batch_prompts: Positive = 4
    decoding: Decoding = Decoding()
    lengths: tuple[LengthStep, ...] = ()
    dynamic_sampling: DynamicSampling = DynamicSampling()
    advantage: Advantage = Advantage()
    loss: PolicyLoss = PolicyLoss()
    rewards: Rewards = Rewards()
    optimizer: Optimizer
    monitor: Monitor = Monitor()
    validate_every: Positive = 20
    validation_samples: Positive = 1
    checkpoint_every: Positive = 20

    @model_validator(mode="after")
    def _check(self) -> "GRPO":
        if self.model is None:
            raise ValueError("`model` must name the folder of the weights to start from")
        if self.prompts_per_step % self.gradient_steps:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} must be a multiple of gradient_steps "
                f"{self.gradient_steps}"
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
    batch_prompts: Positive = 64
    transcripts: Annotated[int, Field(ge=0)] = 12
    monitor: Monitor = Monitor()


class Teacher(Section):
    """See `r1v3.data.chains.TeacherConfig`."""

    glance_sharpness: Annotated[float, Field(gt=0)] = 1.5
    doubt: Share = 0.7
    slip: Share = 0.05
    check: Share = 0.2


class Data(Section):
    """Datasets of the handwriting recipe; a count of 0 leaves that dataset out."""

    run: Path
    seed: int = 0
    teacher: Teacher = Teacher()
    tries: Positive = 4
    base: Annotated[int, Field(ge=0)] = 0
    base_validation: Annotated[int, Field(ge=0)] = 0
    explained: Annotated[int, Field(ge=0)] = 0
    explained_validation: Annotated[int, Field(ge=0)] = 0
    skills: Annotated[int, Field(ge=0)] = 0
    skills_validation: Annotated[int, Field(ge=0)] = 0
    sft: Annotated[int, Field(ge=0)] = 0
    sft_validation: Annotated[int, Field(ge=0)] = 0
    grpo: Annotated[int, Field(ge=0)] = 0
    grpo_validation: Annotated[int, Field(ge=0)] = 0
    connector: Annotated[int, Field(ge=0)] = 0
    connector_validation: Annotated[int, Field(ge=0)] = 0
    test_in_domain: Annotated[int, Field(ge=0)] = 0
    test_out_of_domain: Annotated[int, Field(ge=0)] = 0


ConfigT = TypeVar("ConfigT", bound=Section)


def load(kind: type[ConfigT], path: Path | str | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file, apply `a.b=value` overrides, and validate.

    Args:
        kind: the stage's class.
        path: the file, or None for overrides alone. `{run}` in a value stands for `run`.
        overrides: `key=value` strings; values are parsed as YAML.

    Raises:
        ConfigError: names the file, the key, what was given and what would be right.
    """
    name = str(path) if path is not None else "the command line"
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} must hold a mapping of keys, not {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    if isinstance(tree.get("run"), str):
        tree = _substitute(tree, tree["run"])
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(kind, name, error)) from error


def _substitute(value: Any, run: str) -> Any:
    """`{run}` in any string below stands for the run folder."""
    if isinstance(value, str):
        return value.replace("{run}", run)
    if isinstance(value, dict):
        return {key: _substitute(item, run) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, run) for item in value]
    return value


def _override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} must look like key=value or section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {section!r} is not a section")
        node = child
    # YAML 1.1 reads 1e-5 as text; where a number is wanted, validation makes it one.
    node[last] = value


def _explain(kind: type[Section], name: str, error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        location = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key `{location}`{_nearest(kind, problem['loc'])}")
        elif problem["type"] == "missing":
            lines.append(f"missing key `{location}`")
        elif location:
            lines.append(f"`{location}` = {problem['input']!r}: {problem['msg']}")
        else:
            lines.append(problem["msg"].removeprefix("Value error, "))
    return f"{name}: " + "; ".join(lines)


def _nearest(kind: type[Section], location: tuple[int | str, ...]) -> str:
    """` (did you mean ...?)` for an unknown key, from the fields of the section it stands in."""
    section: Any = kind
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        if field is None:
            return ""
        candidates = [field.annotation, *get_args(field.annotation)]
        models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not models:
            return ""
        section = models[0]
    keys = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), keys, n=1, cutoff=0.5)
    if close:
        return f" (did you mean `{close[0]}`?)"
    return f" (known keys: {', '.join(keys)})"


def to_yaml(config: Section) -> str:
    """The resolved configuration as YAML that `load` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
