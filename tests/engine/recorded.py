"""One recorded rollout batch and what an engine makes of it, for engines to be compared on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from r1v3.config import PolicyLoss
from r1v3.data.batch import Batch
from r1v3.data.encoding import Example, collate
from r1v3.engine.contract import Engine
from r1v3.rollout.contract import Request, Sampling, TokenRules
from r1v3.rollout.copies import Copies
from r1v3.rollout.exchange import everywhere as everywhere_rows
from r1v3.rollout.local import LocalSampler
from r1v3.trainer.policy_loss import PolicyLossFn, Targets, normalizer
from tests import tiny
from tests.engine.replicas import everywhere, own_numbers

GROUP = 2
# Tiles and words of each prompt: one picture, text alone, two pictures, one picture.
PROMPTS = [(1, 6), (0, 2), (2, 3), (1, 1)]
LENGTHS = [4, 1, 3, 5, 2, 6, 0, 3]
MICRO_BATCHES = [(0, 1), (1, 2), (2, 4)]
TRAINING = {"weight_decay": 0.1, "max_grad_norm": 0.5, "temperature": 0.9}
LEARNING_RATES = (3e-3, 2e-3)
# Clipping on both sides bites on the recorded log-probs. The second weighs tokens by their
# importance, which takes the log-probs before the loss.
LOSSES = (
    PolicyLoss(kl_coef=0.1, aggregation="token-mean", old_logprobs="rollout", dual_clip=3.0),
    PolicyLoss(kl_coef=0.1, old_logprobs="rollout", importance_cap=1.3),
)


def a_model() -> InternVLForConditionalGeneration:
    """Weights of which none is zero, one, or equal to another that it could be mistaken for."""
    net = tiny.model()
    tiny.sharpen(net)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return net


def examples() -> list[Example]:
    """The prompts."""
    return [
        tiny.an_example(seed, tiles=tiles, words=words)
        for seed, (tiles, words) in enumerate(PROMPTS)
    ]


def pairs() -> list[tuple[Example, Sequence[int]]]:
    """Every response with its prompt."""
    responses = [tiny.an_example(90 + i, response=n).response_ids for i, n in enumerate(LENGTHS)]
    return [(examples()[row // GROUP], response) for row, response in enumerate(responses)]


def whole_batch() -> Batch:
    """All prompts with their responses."""
    responses = [response for _, response in pairs()]
    return collate(examples(), 0, responses=responses, group_size=GROUP)


def micro_batches() -> list[Batch]:
    """The batch in micro-batches, of which one has no pictures."""
    whole = whole_batch()
    return [whole.slice(start, stop) for start, stop in MICRO_BATCHES]


def write_rollout(engine: Engine, file: Path) -> None:
    """Record log-probs of an older policy, of a reference, and advantages."""
    generator = torch.Generator().manual_seed(3)
    found: dict[str, Tensor] = {"advantages": torch.randn(len(LENGTHS), generator=generator)}
    for index, (logprobs, _) in enumerate(evaluated(engine)):
        for name in ("rollout", "reference"):
            noise = 0.3 * torch.randn(logprobs.shape, generator=generator)
            found[f"{index}.{name}"] = logprobs + noise * (logprobs != 0)
    save_file(found, file)


def evaluated(engine: Engine) -> list[tuple[Tensor, Tensor]]:
    """Log-probs and entropies of all micro-batches, on every rank."""
    batches = micro_batches()
    mine = own_numbers(engine, batches)
    return everywhere(engine, mine, engine.evaluate([batches[i] for i in mine]))


def row_targets(file: Path) -> list[Targets]:
    """The targets of every completion alone, as wide as it is long."""

    def cut(value: Tensor, row: int, width: int) -> Tensor:
        return value[row : row + 1, :width] if value.dim() == 2 else value[row : row + 1]

    places = [(one, row) for one in all_targets(file) for row in range(len(one.loss_mask))]
    return [
        Targets(**{k: cut(v, row, width) for k, v in vars(one).items()})
        for (one, row), width in zip(places, LENGTHS, strict=True)
    ]


def all_targets(file: Path) -> list[Targets]:
    """The targets of the recorded rollout, of each micro-batch."""
    recorded, batches = load_file(file), micro_batches()
    return [
        Targets(
            batch.loss_mask,
            recorded["advantages"][start * GROUP : stop * GROUP],
            recorded[f"{index}.rollout"],
            batch.loss_mask,
            recorded[f"{index}.rollout"],
            recorded[f"{index}.reference"],
        )
        for index, (batch, (start, stop)) in enumerate(zip(batches, MICRO_BATCHES, strict=True))
    ]


def losses(config: PolicyLoss, targets: list[Targets]) -> PolicyLossFn:
    """The GRPO loss of the recorded rollout on some of its micro-batches."""
    return PolicyLossFn(config, targets, normalizer(config.aggregation, LENGTHS, 0))


def train(
    engine: Engine, number: int, batches: list[Batch], targets: list[Targets]
) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
    """Gradient step `number` on these micro-batches; the outputs of all, on every rank."""
    mine = own_numbers(engine, batches)
    metrics, outputs = engine.train_step(
        [batches[i] for i in mine],
        losses(LOSSES[number], [targets[i] for i in mine]),
        learning_rate=LEARNING_RATES[number],
    )
    return metrics, everywhere(engine, mine, outputs)


@dataclass
class Seen:
    """Numbers, the same on every rank, and tensors."""

    metrics: list[dict[str, float]]
    tensors: dict[str, Tensor]


def step(engine: Engine, file: Path, number: int) -> dict[str, float]:
    """Gradient step `number` on the recorded rollout."""
    return train(engine, number, micro_batches(), all_targets(file))[0]


def sample(engine: Engine) -> dict[str, Tensor]:
    """Completions by the live weights, with bans, forced tokens, and rows that end early."""
    [question] = tiny.some_questions(1)
    copies = Copies.over(engine.ranks, engine.samplers.rank)
    sampler = LocalSampler(engine.decoder(), TokenRules.of(engine.tokenizer), copies)
    rollout = sampler.complete(
        [Request(example, question) for example in examples()],
        Sampling(temperature=1.0, max_tokens=14, banned=tuple(range(20, 120)), budget=5),
        group_size=GROUP,
        generator=torch.Generator().manual_seed(8),
    )
    whole = everywhere_rows(rollout, copies, len(PROMPTS), GROUP, engine.tokenizer.pad_token_id)
    return {f"rollout.{name}": value for name, value in vars(whole).items()}


def record(engine: Engine, file: Path) -> Seen:
    """Sample, evaluate, take two steps of different losses, and export."""
    seen = Seen([], sample(engine))
    for index, (logprobs, entropy) in enumerate(evaluated(engine)):
        seen.tensors |= {f"{index}.logprobs": logprobs, f"{index}.entropy": entropy}
    for number in range(len(LOSSES)):
        metrics, outputs = train(engine, number, micro_batches(), all_targets(file))
        seen.metrics.append(metrics)
        for index, output in enumerate(outputs):
            seen.tensors |= {f"step{number}.{index}.{k}": v for k, v in output.items()}
    seen.tensors |= weights(engine)
    return seen


def weights(engine: Engine) -> dict[str, Tensor]:
    """All weights by their HF-native names."""
    return {f"weight.{name}": tensor.clone() for name, tensor in engine.export_hf()}
