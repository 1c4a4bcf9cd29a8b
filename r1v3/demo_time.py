"""Time that the demo will take on this machine, told from a few seconds of its own work.

The work is timed on one thread in processor time, which other programs hardly change.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1v3.config import GRPO, SFT, Connector, Data, Evaluate
from r1v3.data.batch import Batch
from r1v3.data.encoding import Example, collate, encode_sample, model_image_shape
from r1v3.data.recipe import cold_start_rows
from r1v3.data.sample import Sample
from r1v3.data.tokenizer import load_tokenizer
from r1v3.engine.head import Head
from r1v3.engine.hf.engine import HFEngine
from r1v3.model.internvl import load_model
from r1v3.model.parts import PARTS

_PROMPTS, _GROUP, _STEPS = 8, 32, 6
# What decoding a completion costs in steps of a full batch, for each token of a typical response:
# a batch goes on until its longest one ends.
_STEPS_PER_TOKEN = 1.6


@dataclass(frozen=True)
class Speed:
    """Processor seconds that one piece of the demo's work takes.

    Attributes:
        sample: a question composed.
        encoded: a question made into token ids and pixels.
        pair: a prompt with its response learned from.
        response: one of a group of responses to a prompt learned from.
        prompt: a prompt prefilled.
        completion: a completion decoded.
    """

    sample: float
    encoded: float
    pair: float
    response: float
    prompt: float
    completion: float


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(model: Path, data: Data) -> Speed:
    """Do a little of everything with a model folder on one thread; return what it took.

    Args:
        data: the recipe, whose cold-start rows stand for all pictures and responses.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(model, data)
    finally:
        torch.set_num_threads(threads)


def _measure(model: Path, data: Data) -> Speed:
    tokenizer = load_tokenizer(model)
    engine = HFEngine(load_model(model), tokenizer, modules=dict.fromkeys(PARTS, True))
    shape = model_image_shape(engine.config, 1)
    rows = _PROMPTS * _GROUP
    cold_start_rows(data, 1)  # loads the scans
    samples: list[Sample] = []
    composing = _seconds(lambda: samples.extend(cold_start_rows(data, rows)))
    examples: list[Example] = []
    encoding = _seconds(
        lambda: examples.extend(encode_sample(sample, tokenizer, shape) for sample in samples)
    )
    pictured = [one for one in examples if len(one.tiles)] or examples
    tokens = sum(len(example.response_ids) for example in pictured) // len(pictured)

    def batch(chosen: list[Example], group_size: int) -> Batch:
        pad = tokenizer.pad_token_id
        responses = [[pad] * tokens] * (len(chosen) * group_size)
        return collate(chosen, pad, responses=responses, group_size=group_size)

    def loss(head: Head, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return -head.logprobs_and_entropy()[0].mean(), {}

    def learn(given: Batch) -> None:
        engine.train_step([given], loss, learning_rate=0.0)

    pairs, grouped = batch(examples[:64], 1), batch(pictured[: _PROMPTS // 4], _GROUP)
    learn(grouped)  # the first step of a process is slower
    learning = _seconds(lambda: learn(pairs)) / 64
    responding = _seconds(lambda: learn(grouped)) / (_PROMPTS // 4 * _GROUP)
    decoder, ids = engine.decoder(), torch.full((rows,), tokenizer.pad_token_id)
    asked = batch(pictured[:64], 1)
    prefilling = _seconds(lambda: decoder.prefill(asked, 1, 2)) / len(pictured[:64])
    decoder.prefill(batch(pictured[:_PROMPTS], _GROUP), _GROUP, _STEPS + 32)
    decoder.step(ids)
    decoding = _seconds(lambda: [decoder.step(ids) for _ in range(_STEPS)]) / (_STEPS * rows)
    completing = decoding * tokens * _STEPS_PER_TOKEN
    return Speed(composing / rows, encoding / rows, learning, responding, prefilling, completing)


def expected_seconds(speed: Speed, stages: Mapping[str, Any], scoring: Evaluate) -> float:
    """Return how long the stages of a demo, by name, and scoring the five models take in all."""
    data: Data = stages["data"]
    sft: SFT = stages["sft"]
    grpo: GRPO = stages["grpo"]
    connector: Connector = stages["connector"]
    composed = sum(data.model_dump(include=_COUNTS).values())
    pairs = sft.epochs * data.sft + connector.epochs * data.connector
    # A validation runs forward alone, which is a third of a step.
    checks = sft.epochs * data.sft / sft.batch_size / sft.validate_every * data.sft_validation
    pairs += checks / 3
    responses = grpo.steps * grpo.prompts_per_step * grpo.group_size
    validated = grpo.steps // grpo.validate_every * data.grpo_validation
    asked = data.test_in_domain + data.test_out_of_domain
    # base answers in one mode; sft, grpo, connector and selected in all, grpo with budgets too.
    others = len(scoring.modes) - ("slow" in scoring.modes)
    modes = 1 + 4 * len(scoring.modes) + len(scoring.budgets)
    answers = asked * (4 * scoring.samples + (1 + 4 * others + len(scoring.budgets)))
    # Every process encodes all that a stage reads; in each of the five evaluations, a question is
    # encoded once for each template.
    alone = (composed + 2 * 5 * asked) * speed.encoded
    shared = (
        composed * speed.sample
        + pairs * speed.pair
        + responses * speed.response
        + (grpo.steps * grpo.prompts_per_step + validated + asked * modes) * speed.prompt
        + (responses + validated * grpo.validation_samples + answers) * speed.completion
    )
    # Threads share matrices as small as these badly: two do 1.4 times the work of one.
    return alone + shared / sft.processes / (sft.threads or torch.get_num_threads()) ** 0.5


_COUNTS = {
    "sft",
    "sft_validation",
    "grpo",
    "grpo_validation",
    "connector",
    "connector_validation",
    "test_in_domain",
    "test_out_of_domain",
}
