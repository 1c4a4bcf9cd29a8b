"""`python -m benchmarks.cluster_step`: a model of a training step of the 38B on a cluster.

It is no measurement: operations are the project's own counts (`r1v3.model.flops`), at a
stated rate; communication, kernels' efficiency and memory are left out. Lengths are drawn: the mean
of a prompt's responses is log-normal (sigma 0.6), responses around it gamma (shape 3), cut at the
preset's longest. What it shows is how much of the GPUs' time waiting costs, in a 1F1B schedule of
the engine (`simulate`), over many steps of different lengths:

- before: whole groups, given to replicas in turn, layers [22, 42] as the 8k preset needed them;
- after: what the trainer does with the preset's `micro_batch_tokens`: `pack_groups`,
  `longest_first`, `pipeline_order`, layers as in the preset.

`over ideal` is the time over that of the undivided groups' operations spread evenly over all GPUs,
so that a prompt that is repeated counts against the packs. `step` adds the parts of a step that the
project does not compute: their seconds are assumed, the same on every cluster, and stand in the
result (`PARTS`). Whole groups at a mean of 8,000 tokens, where responses reach 16,384, fit the
memory of no number of GPUs; their time is what they would take.
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import InternVLConfig

from benchmarks import machine
from r1v3 import files
from r1v3.balance import longest_first, pack_groups, pipeline_order, worthwhile
from r1v3.config import GRPO, load
from r1v3.model.flops import Dimensions, Work
from r1v3.model.parts import PARTS as PARTS_OF_MODEL
from r1v3.plan.job import TEXT_TOKENS, stage_layers
from r1v3.plan.schedule import simulate, stage_costs

SCHEMA = 1
PRESETS = Path(__file__).parents[1] / "configs" / "r1v3-38b"
GPUS = (64, 128, 256)
MEANS = (4000, 8000)
# Operations a second of one GPU in training, and the spread of lengths.
RATE = 300e12
SIGMA, SHAPE = 0.6, 3.0
BEFORE_LAYERS = (22, 42)
MODULES = dict.fromkeys(PARTS_OF_MODEL, True)
# Seconds of the other parts of a step, by mean length: assumed, from an estimate of 64 GPUs with
# synchronous vLLM on 8 x TP8, whose generation waits for the longest response, and rewards on one
# rank.
PARTS = {
    4000: {"weights": 9.0, "generation": 85.0, "completions": 15.0, "rewards": 12.0, "batch": 15.0},
    8000: {"weights": 9.0, "generation": 99.0, "completions": 30.0, "rewards": 12.0, "batch": 22.0},
}


@dataclass(frozen=True)
class Step:
    """Means over simulated steps: seconds of training, over ideal, micro-batches of a replica."""

    gpus: int
    mean: int
    way: str
    seconds: float
    ideal: float
    over_ideal: float
    micro_batches: float


def draw_lengths(seed: int, mean: int, longest: int, prompts: int, group: int) -> list[list[int]]:
    """Response tokens of every prompt's completions."""
    chosen = random.Random(seed)
    means = [mean * math.exp(chosen.gauss(-(SIGMA**2) / 2, SIGMA)) for _ in range(prompts)]
    return [
        [min(longest, max(1, round(chosen.gammavariate(SHAPE, one / SHAPE)))) for _ in range(group)]
        for one in means
    ]


def pack_work(prompt: int, tiles: int, responses: Sequence[int]) -> Work:
    """The work of a prompt with some of its responses."""
    return Work.of([prompt], responses, sum(responses), tiles)


def step_time(
    config: GRPO, dims: Dimensions, gpus: int, mean: int, seed: int, *, balanced: bool
) -> tuple[float, float, float]:
    """Return (seconds, ideal seconds, micro-batches of a replica) of one step."""
    parallel = config.parallel
    tiles = (config.max_tiles or 1) + 1
    prompt = tiles * dims.image_tokens + TEXT_TOKENS
    groups = draw_lengths(
        seed, mean, config.longest_response, config.prompts_per_step, config.group_size
    )
    layers: Sequence[int] = BEFORE_LAYERS
    works = [pack_work(prompt, tiles, group) for group in groups]
    ideal = sum(
        f + b for work in works for f, b in stage_costs(dims, work, (dims.layers,), MODULES)
    )
    replicas = gpus // parallel.model_ranks
    if balanced:
        assert config.micro_batch_tokens is not None
        layers = stage_layers(
            dims.layers, parallel.pipeline, parallel.first_stage_layers, parallel.last_stage_layers
        )
        packs = pack_groups(
            [prompt] * len(groups),
            [[length - 1 for length in group] for group in groups],
            size=config.micro_batch_prompts,
            tokens=config.micro_batch_tokens,
            least=worthwhile(config, replicas),
        )
        works = [
            pack_work(prompt, tiles, [groups[p][row] for row in rows])
            for pack in packs
            for p, rows in pack
        ]
    ranks = parallel.tensor * parallel.context
    costs = [
        [(f / RATE / ranks, b / RATE / ranks) for f, b in one]
        for one in (stage_costs(dims, work, layers, MODULES) for work in works)
    ]
    totals = [sum(f + b for f, b in one) for one in costs]
    if balanced:
        shares = [pipeline_order(share, totals) for share in longest_first(totals, replicas)]
    else:
        shares = [list(range(rank, len(costs), replicas)) for rank in range(replicas)]
    seconds = max(simulate([costs[i] for i in share]) for share in shares)
    return seconds, ideal / gpus / RATE, len(costs) / replicas


def mean_step(config: GRPO, dims: Dimensions, gpus: int, mean: int, steps: int, way: str) -> Step:
    """Means over so many steps of different lengths."""
    found = [
        step_time(config, dims, gpus, mean, seed, balanced=way == "after") for seed in range(steps)
    ]
    seconds, ideal, count = (statistics.mean(column) for column in zip(*found, strict=True))
    over = statistics.mean(one[0] / one[1] for one in found)
    return Step(gpus, mean, way, seconds, ideal, over, count)


def step_table(steps: Sequence[Step]) -> list[dict[str, float | int | str]]:
    """Whole steps: the simulated training and the parts that are only assumed."""
    return [
        {
            "gpus": one.gpus,
            "mean": one.mean,
            "way": one.way,
            **PARTS[one.mean],
            "training": one.seconds,
            "step": one.seconds + sum(PARTS[one.mean].values()),
        }
        for one in steps
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print time over ideal before and after, and the table of whole steps."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster_step", description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="simulated steps of each kind")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be 1 or more")
    dims = Dimensions.of(InternVLConfig.from_pretrained(PRESETS / "model"))
    presets = {4000: "grpo_8k", 8000: "grpo_16k"}
    print("a model of the step, not a GPU measurement; training at 300 TFLOP/s a GPU")
    print(
        f"{'GPUs':>5}{'mean':>6}{'':>8}{'training s':>12}{'ideal s':>9}{'over ideal':>12}"
        f"{'each':>6}"
    )
    steps = []
    for mean in MEANS:
        config = load(GRPO, PRESETS / f"{presets[mean]}.yaml", [])
        for gpus in GPUS:
            for way in ("before", "after"):
                one = mean_step(config, dims, gpus, mean, options.steps, way)
                steps.append(one)
                print(
                    f"{gpus:>5}{mean:>6}{way:>8}{one.seconds:>12.1f}{one.ideal:>9.1f}"
                    f"{one.over_ideal:>12.2f}{one.micro_batches:>6.1f}"
                )
    table = step_table(steps)
    print("\nwhole steps in seconds; all but training is assumed, not measured")
    for row in table:
        print(
            "  ".join(
                f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            )
        )
    if options.json is not None:
        document = {
            "schema": SCHEMA,
            "header": machine.header("cpu"),
            "what": "A model of a training step of the 38B, 32 prompts x 32 responses: the "
            "project's operation counts in a simulated 1F1B schedule. Not a measurement.",
            "rate_flops": RATE,
            "simulated_steps": options.steps,
            "presets": presets,
            "training": [asdict(one) for one in steps],
            "assumed_seconds": PARTS,
            "steps": table,
        }
        files.write_text(options.json, json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
